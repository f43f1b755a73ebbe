"""A checkpoint and an artifact of each family, made once in a test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from once import made_once


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family, as `families.make` fills it. Read only."""

    def folder_of(family: str) -> Path:
        import families

        return made_once(tmp_path_factory, family, lambda folder: families.make(family, folder))

    return folder_of
