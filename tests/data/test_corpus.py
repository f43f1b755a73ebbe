"""OpenMoji: captions, groups, sampling, and the same bytes twice."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from modelops.base.errors import InUseError, UsageError
from modelops.base.files import sha256_tree, temporary_name
from modelops.base.images import read_image
from modelops.base.locks import output_lock
from modelops.data.corpora import openmoji
from modelops.data.manifest import read_manifest


@pytest.fixture(scope="module")
def drawings() -> list[openmoji.Drawing]:
    return openmoji.list_drawings()


def test_coverage_is_what_the_packages_hold(drawings: list[openmoji.Drawing]) -> None:
    counts = openmoji.coverage()
    assert counts.drawings == 4495 and counts.named == len(drawings) == 3953
    assert counts.unnamed == 542


@pytest.mark.parametrize(
    ("identity", "caption"),
    [
        ("2764", "red heart"),
        ("1F1EB-1F1F7", "flag: France"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag: Scotland"),
        ("1F3F4-200D-2620-FE0F", "pirate flag"),
        ("0031-FE0F-20E3", "keycap: 1"),
        ("1F44D-1F3FD", "thumbs up: medium skin tone"),
        ("1F469-1F3FE-200D-1F9B0", "woman: medium-dark skin tone, red hair"),
        ("1F468-200D-1F469-200D-1F467", "family: man, woman, girl"),
        (
            "1F468-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FD",
            "kiss: man, man, light skin tone, medium skin tone",
        ),
        ("1F462", "woman's boot"),
        ("1F170", "A button (blood type)"),
    ],
)
def test_captions_are_as_cldr_writes_them(
    drawings: list[openmoji.Drawing], identity: str, caption: str
) -> None:
    names = {drawing.id: drawing.name for drawing in drawings}
    assert openmoji.name_to_caption(names[identity], identity) == caption


def test_every_caption_is_clean_and_almost_unique(drawings: list[openmoji.Drawing]) -> None:
    captions = [openmoji.name_to_caption(drawing.name, drawing.id) for drawing in drawings]
    assert all(caption == " ".join(caption.split()) and caption for caption in captions)
    assert not any("_" in caption or caption.startswith(":") for caption in captions)
    assert len(set(captions)) > 0.99 * len(captions)


@pytest.mark.parametrize(
    "variants",
    [
        ("1F44D", "1F44D-1F3FB", "1F44D-1F3FF"),
        ("1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FF-200D-2642-FE0F-200D-27A1-FE0F"),
        ("1F9D1-200D-1F680", "1F468-200D-1F680", "1F469-1F3FD-200D-1F680"),
        ("1F46B", "1F46D-1F3FB", "1F469-1F3FF-200D-1F91D-200D-1F469-1F3FB"),
        ("1F491", "1F468-200D-2764-FE0F-200D-1F468", "1F9D1-1F3FB-200D-2764-FE0F-200D-1F9D1-1F3FC"),
        ("1F91D", "1F91D-1F3FB", "1FAF1-1F3FF-200D-1FAF2-1F3FB"),
        ("1F46A", "1F468-200D-1F469-200D-1F467", "1F469-200D-1F466-200D-1F466"),
    ],
)
def test_variants_share_a_group(variants: tuple[str, ...]) -> None:
    assert len({openmoji.id_to_group(identity) for identity in variants}) == 1


def test_different_things_do_not(drawings: list[openmoji.Drawing]) -> None:
    apart = ["1F44D", "1F44E", "1F1EB-1F1F7", "1F1E9-1F1EA", "0031-FE0F-20E3", "2764", "27A1"]
    assert len({openmoji.id_to_group(identity) for identity in apart}) == len(apart)
    assert 1500 < len({openmoji.id_to_group(drawing.id) for drawing in drawings}) < 1800


def test_tags_name_the_slices(drawings: list[openmoji.Drawing]) -> None:
    tags = {drawing.id: openmoji.drawing_to_tags(drawing) for drawing in drawings}
    assert tags["1F469-1F3FD-200D-1F680"] == ("gender:woman", "person", "skin-tone:medium")
    assert tags["1F1EB-1F1F7"] == ("flag",)
    assert "face" in tags["1F600"] and tags["2764"] == ()
    tones = [tone for each in tags.values() for tone in each if tone.startswith("skin-tone:")]
    counts = {tone: tones.count(tone) for tone in set(tones)}
    assert len(counts) == 5 and max(counts.values()) <= 1.1 * min(counts.values())


def test_a_limit_takes_whole_groups_spread_over_the_corpus(
    drawings: list[openmoji.Drawing],
) -> None:
    taken = openmoji.take_groups(drawings, 150, 0)
    assert 140 <= len(taken) <= 150
    groups = {openmoji.id_to_group(drawing.id) for drawing in taken}
    assert taken == [drawing for drawing in drawings if openmoji.id_to_group(drawing.id) in groups]
    assert taken != openmoji.take_groups(drawings, 150, 1)
    places = [drawings.index(drawing) / len(drawings) for drawing in taken]
    assert min(places) < 0.1 and max(places) > 0.9


def test_the_corpus_is_real_and_reproducible(corpus: Path, tmp_path: Path) -> None:
    manifest = read_manifest(corpus / "manifest.parquet")
    assert manifest.quarantined == {} and 110 <= len(manifest.rows) <= 120
    row = manifest.rows[0]
    assert row.license == "CC-BY-SA-4.0" and row.source == "openmoji 17.0"
    assert row.date_collected == openmoji.release_date() == "2026-04-17"
    image = read_image(manifest.image_path(row))
    assert image.shape == (32, 32, 3)
    assert (image[0, 0] == 255).all() and image.std() > 5, "a drawing on white"
    openmoji.build_corpus(tmp_path, resolution=32, limit=120)
    assert sha256_tree(tmp_path / "images") == sha256_tree(corpus / "images")
    assert (tmp_path / "manifest.parquet").read_bytes() == manifest.path.read_bytes()


def test_a_killed_build_is_made_whole(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        openmoji.build_corpus(tmp_path, resolution=32, limit=20, on_progress=stop)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"
    prefix, suffix = temporary_name("images")  # what SIGKILL would leave
    (tmp_path / f"{prefix.replace(str(os.getpid()), '4194305')}x{suffix}").mkdir()
    path = openmoji.build_corpus(tmp_path, resolution=32, limit=20)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "manifest.parquet"]
    assert read_manifest(path).quarantined == {}


def test_pictures_of_the_user_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/holiday.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"holiday\.png"):
        openmoji.build_corpus(tmp_path, resolution=32, limit=20)
    assert (tmp_path / "images/holiday.png").read_bytes() == b"mine"


def test_one_process_at_a_time_builds_a_corpus(tmp_path: Path) -> None:
    with output_lock(tmp_path, inside=True), pytest.raises(InUseError, match="in use by process"):
        openmoji.build_corpus(tmp_path, resolution=32, limit=20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"resolution": 4}, {"resolution": 32, "limit": 0}])
def test_options_out_of_range(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        openmoji.build_corpus(tmp_path, **options)


def test_the_attribution_is_the_packages_own() -> None:
    credit = openmoji.attribution()
    assert "OpenMoji" in credit["text"] and "CC BY-SA 4.0" in credit["text"]
    assert credit["version"] == "17.0.0"


def test_rendering_is_deterministic() -> None:
    first, second = (openmoji.render_drawing("2764", 48) for _ in range(2))
    assert first == second
    image = np.asarray(read_image_bytes(first))
    red = (image[..., 0] > 150) & (image[..., 1] < 120)
    assert red.mean() > 0.2, "a red heart"


def read_image_bytes(data: bytes) -> np.ndarray:
    from modelops.base.images import decode_image

    return decode_image(data, "a.png")
