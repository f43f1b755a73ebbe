"""The image block-list: knows a listed image again, not another, and refuses bad lists."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from modelops.base.errors import UsageError
from modelops.safety.blocklist import (
    BlockListFilter,
    ListedImage,
    image_to_bits,
    read_blocklist,
    write_blocklist,
)
from modelops.safety.image import ImageVerdict, SafetyFilterError
from modelops.safety.probe import probe_images, require_working

pytest.importorskip("imagehash")
Drawings = list[np.ndarray]


@pytest.fixture
def folder(tmp_path: Path, drawings: Drawings) -> Path:
    (tmp_path / "list" / "symbols").mkdir(parents=True)
    for index, image in enumerate(drawings[:2]):
        Image.fromarray(image).save(tmp_path / "list" / "symbols" / f"{index}.png")
    return tmp_path / "list"


def disguises(image: np.ndarray) -> list[np.ndarray]:
    picture = Image.fromarray(image)
    jpeg = io.BytesIO()
    picture.save(jpeg, "jpeg", quality=60)
    made = [
        picture.resize((300, 300), Image.Resampling.BICUBIC),
        picture.resize((40, 40), Image.Resampling.BOX),
        ImageEnhance.Brightness(picture).enhance(0.7),
        Image.open(jpeg),
    ]
    return [np.asarray(one.convert("RGB")) for one in made]


def test_a_listed_picture_is_known_again_and_others_pass(folder: Path, drawings: Drawings) -> None:
    found = BlockListFilter(read_blocklist(folder))
    itself = found.check(drawings[:2])
    assert [v.score for v in itself] == [1.0, 1.0] and all(v.blocked for v in itself)
    assert not any(verdict.blocked for verdict in found.check(drawings[2:]))
    assert found.nearest(drawings[1])[0].label == "symbols/1.png"


def test_most_disguises_of_a_listed_picture_are_seen_through(drawings: Drawings) -> None:
    seen = []
    for image in drawings:
        digest = np.packbits(image_to_bits(image)).tobytes().hex()
        found = BlockListFilter([ListedImage(digest, "")])
        seen += [verdict.blocked for verdict in found.check(disguises(image))]
    assert np.mean(seen) >= 0.8


def test_31_bits_are_a_match_and_32_are_none(drawings: Drawings) -> None:
    bits = image_to_bits(drawings[0])
    for distance, blocked in ((0, True), (31, True), (32, False), (256, False)):
        other = bits.copy()
        other[:distance] ^= True
        digest = np.packbits(other).tobytes().hex()
        verdict = BlockListFilter([ListedImage(digest, "")]).check(drawings[:1])[0]
        assert verdict.blocked is blocked
        assert verdict.score == max(0.0, 1 - distance / 62)


def test_a_list_far_from_all_probe_images_works_but_not_with_a_hash_that_never_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = BlockListFilter(read_blocklist(folder))
    assert {verdict.score for verdict in found.check(probe_images())} == {0.0}
    require_working(found)
    monkeypatch.setattr(BlockListFilter, "check", lambda self, images: [ImageVerdict(0, False)] * 4)
    with pytest.raises(SafetyFilterError, match="lets a listed image through"):
        require_working(found)


def test_hashes_can_be_shared_without_the_pictures(folder: Path, tmp_path: Path) -> None:
    listed = read_blocklist(folder)
    write_blocklist(listed, tmp_path / "list.txt")
    assert read_blocklist(tmp_path / "list.txt") == listed
    shared = BlockListFilter(read_blocklist(tmp_path / "list.txt"))
    assert shared.info == BlockListFilter(listed).info


def test_lists_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("# a list\nphash256:12  short\n")
    with pytest.raises(UsageError, match="line 2"):
        read_blocklist(tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match="no hashes"):
        read_blocklist(tmp_path / "bad.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images"):
        read_blocklist(tmp_path / "empty")
    (folder / "damaged.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"damaged\.png"):
        read_blocklist(folder)
    with pytest.raises(UsageError, match="empty"):
        BlockListFilter([])
