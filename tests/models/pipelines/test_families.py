"""Every family of the zoo: diffusers' own image alone, in company and served, or a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zoo.all import FAMILIES, family, lacks
from zoo.family import Family
from zoo.measure import Bench, measure

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Kandinsky 2.2", "SDXL"])
def test_requests_of_other_guidance_are_served_together(name: str, tmp_path: Path) -> None:
    assert Bench(family(name), tmp_path).served_guided() <= 1
