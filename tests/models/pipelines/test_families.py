"""Every family of the zoo: diffusers' own image alone, in company and served, or a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zoo.all import FAMILIES, lacks
from zoo.family import Family
from zoo.measure import measure

IMAGE = "image that it is given"


@pytest.mark.slow
@pytest.mark.parametrize("one", FAMILIES, ids=lambda one: one.name)
def test_images_are_diffusers_own(one: Family, tmp_path: Path) -> None:
    if lacks(one):
        pytest.skip(f"needs {one.needs}")
    row = measure(one, tmp_path)
    for column, found in (("sample", row.sample), ("company", row.company), ("served", row.served)):
        if isinstance(found, str):
            wants_image = IMAGE if one.kind == "image" and column == "served" else "^$"
            assert re.search(one.refused or wants_image, found)
        else:
            assert found <= 1
