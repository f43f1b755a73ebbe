"""A real release around the small real checkpoint, with its golden image."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from project_records import verdict_on


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Other tests share the cores; two spinning thread pools are slower than one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Its path is short enough for the name of a socket, which pytest's own need not be."""
    folder = Path(tempfile.mkdtemp(prefix="mo-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_release(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of `tiny_checkpoint` under a passing verdict. Read only."""
    from modelops.base.files import sha256_tree
    from modelops.releases.build import build_release
    from modelops.serving.node.golden import make_golden

    folder = tmp_path_factory.mktemp("release")
    verdict_on(sha256_tree(tiny_checkpoint)).write(folder / "verdict.json")
    golden = make_golden(tiny_checkpoint, folder / "golden.png")
    build_release(
        folder / "release",
        model_dir=tiny_checkpoint,
        verdict=folder / "verdict.json",
        name="tiny",
        version="0.1",
        defaults={"golden": golden, "steps": 4, "guidance": 3.0},
        extra_files={"golden.png": folder / "golden.png"},
        notice="Made for a test.",
    )
    return folder / "release"
