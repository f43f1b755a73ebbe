"""Every family of the zoo: diffusers' own image alone, in company and served, or a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zoo.all import FAMILIES, lacks
from zoo.family import Family
from zoo.measure import measure

IMAGE = r"image that it is given|wants image_embeds"


@pytest.mark.slow
@pytest.mark.parametrize("one", FAMILIES, ids=lambda one: one.name)
def test_images_are_diffusers_own(one: Family, tmp_path: Path) -> None:
    if lacks(one):
        pytest.skip(f"needs {one.needs}")
    row = measure(one, tmp_path)
    for found in (row.sample, row.company, row.served):
        if isinstance(found, str):
            assert re.search(one.refused or (IMAGE if one.kind == "image" else "^$"), found)
        else:
            assert found <= 1
