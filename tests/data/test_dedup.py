"""Duplicates: found by bytes, by pixels and by an encoder; nothing is deleted unasked."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modelops.base.errors import UsageError
from modelops.base.images import read_image, resize_image
from modelops.data.dedup import clean_manifest, deduplicate, parse_kinds
from modelops.data.embeddings import CACHE, Lite0Encoder, embed_manifest
from modelops.data.manifest import Sample, read_manifest, write_manifest
from modelops.data.split import read_splits, split_manifest
from modelops.records.data import DedupReport
from modelops.records.read import read_record

Add = Callable[..., Sample]


class Thumbnails:
    """A real, quick encoder: the image at 6 x 6, about its mean. Counts what it is asked for."""

    name = "thumbnail-6"
    weights_sha256 = "0" * 64
    dim = 108

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        rows = [resize_image(image, 6).reshape(-1).astype(np.float32) - 128 for image in images]
        self.encoded += len(rows)
        return np.stack(rows) if rows else np.zeros((0, self.dim), np.float32)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def png(image: np.ndarray, level: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def test_bytes_pixels_and_near_copies_are_told_apart(tmp_path: Path, add_picture: Add) -> None:
    near = picture(0).copy()
    near[0, :8] = 255 - near[0, :8]
    rows = [
        add_picture("keep", data=png(picture(0)), caption="the long caption", tags=("a", "b")),
        add_picture("copy", data=png(picture(0))),
        add_picture("again", data=png(picture(0), level=0)),
        add_picture("near", data=png(near)),
        *(add_picture(f"other{seed}", data=png(picture(seed))) for seed in range(1, 6)),
    ]
    path = write_manifest(tmp_path / "manifest.parquet", rows)
    report = deduplicate(path, tmp_path / "dedup_report.json", threshold=0.8, encoder=Thumbnails())
    found = {cluster.kind: cluster for cluster in report.clusters}
    assert found["bytes"].keeper == found["pixels"].keeper == "keep"
    assert found["bytes"].members == ["copy"] and found["pixels"].members == ["again"]
    assert {found["embedding"].keeper, *found["embedding"].members} == {"keep", "near"}
    assert report.removable == ["again", "copy"] and report.n_exact_duplicates == 2
    assert sorted(report.components[0]) == ["again", "copy", "keep", "near"]
    assert all(cluster.reason for cluster in report.clusters)
    assert len(read_manifest(path).rows) == len(rows), "nothing is deleted"

    kept, left_out = clean_manifest(
        path, tmp_path / "dedup_report.json", tmp_path / "cleaned.parquet"
    )
    assert (kept, left_out) == (7, 2)
    kept, _ = clean_manifest(
        path, tmp_path / "dedup_report.json", tmp_path / "cleaned.parquet",
        kinds=parse_kinds("bytes,pixels,embedding"),
    )  # fmt: skip
    assert kept == 6


def test_drawings_that_differ_in_transparency_are_no_duplicates(
    tmp_path: Path, add_picture: Add
) -> None:
    """White shapes on nothing are equal on white: no kind of duplicate, even for near-duplicates;
    the same image with and without a full opacity is one, and a split keeps what training sees as
    one image together."""

    def drawing(box: tuple[int, int, int, int], ink: tuple[int, ...] = (255,) * 4) -> bytes:
        image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        image.paste(ink, box)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    full = Image.fromarray(picture(3))
    full.putalpha(255)
    buffer = io.BytesIO()
    full.save(buffer, "PNG")
    rows = [
        add_picture("left", data=drawing((0, 0, 8, 16))),
        add_picture("right", data=drawing((8, 0, 16, 16))),
        add_picture("right_again", data=drawing((8, 0, 16, 16))),
        add_picture("blank", data=png(np.full((16, 16, 3), 255, np.uint8))),
        add_picture("colour", data=png(picture(3)), tags=("a",)),
        add_picture("opaque", data=buffer.getvalue()),
        *(add_picture(f"other{seed}", data=png(picture(seed))) for seed in range(5, 9)),
    ]
    path = write_manifest(tmp_path / "manifest.parquet", rows)
    report = deduplicate(path, tmp_path / "dedup_report.json", encoder=Thumbnails())
    assert report.removable == ["opaque", "right"]
    assert not [cluster for cluster in report.clusters if cluster.kind == "embedding"]
    assert ["left", "right", "right_again", "blank"] in report.components
    assert any("4 images are equal to another on white" in line for line in report.warnings)
    kept, _ = clean_manifest(
        path, tmp_path / "dedup_report.json", tmp_path / "cleaned.csv",
        kinds=parse_kinds("bytes,pixels,embedding"),
    )  # fmt: skip
    assert kept == len(rows) - 2
    again = deduplicate(path, tmp_path / "again.json", encoder=Thumbnails())  # from the cache
    assert again.clusters == report.clusters
    split_manifest(path, tmp_path / "again.json", tmp_path, seed=0, encoder=Thumbnails())
    splits = read_splits(tmp_path / "splits.parquet")
    assert len({splits[name] for name in ("left", "right", "right_again", "blank")}) == 1


def test_bad_pictures_are_quarantined_with_a_reason(tmp_path: Path, add_picture: Add) -> None:
    good = [add_picture(f"good{seed}", data=png(picture(seed))) for seed in range(4)]
    jpeg = io.BytesIO()
    Image.fromarray(picture(9)).save(jpeg, "JPEG")
    bad = [
        add_picture("truncated", data=png(picture(7))[:200]),
        add_picture("mislabelled", data=jpeg.getvalue()),
        add_picture("wrong", sha256="0" * 64),
        add_picture("text", data=b"<html>not found</html>"),
    ]
    path = write_manifest(tmp_path / "manifest.parquet", [*bad, *good])
    report = deduplicate(path, tmp_path / "report.json", encoder=Thumbnails())
    assert set(report.quarantined) == {row.id for row in bad}
    assert report.n_images == 4
    assert "mislabelled" in report.quarantined["mislabelled"]
    assert "damaged" in report.quarantined["truncated"]
    with pytest.raises(UsageError, match="none of its images"):
        deduplicate(
            write_manifest(tmp_path / "bad.parquet", bad), tmp_path / "r.json", encoder=Thumbnails()
        )


def test_a_killed_run_goes_on_where_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.data.embeddings.CHUNK", 16)
    shutil.copytree(corpus / "images", tmp_path / "images")
    shutil.copy(corpus / "manifest.parquet", tmp_path)
    manifest = read_manifest(tmp_path / "manifest.parquet")

    def stop(done: int, total: int) -> None:
        if done >= 48:
            raise KeyboardInterrupt

    first = Thumbnails()
    with pytest.raises(KeyboardInterrupt):
        embed_manifest(manifest, first, on_progress=stop)
    assert first.encoded == 48
    second = Thumbnails()
    resumed = embed_manifest(manifest, second)
    assert second.encoded == len(manifest.rows) - 48
    damaged = next((tmp_path / ".cache" / CACHE).rglob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    third = Thumbnails()
    again = embed_manifest(manifest, third)
    assert third.encoded <= 16, "only the damaged chunk is made again"
    np.testing.assert_array_equal(again.features, resumed.features)
    straight = Thumbnails().encode(read_image(manifest.image_path(row)) for row in manifest.rows)
    np.testing.assert_array_equal(resumed.features, straight)


def test_lite0_on_real_pictures(corpus: Path, deduped: Path) -> None:
    report = read_record(deduped, DedupReport)
    manifest = read_manifest(corpus / "manifest.parquet")
    assert report.extractor == "efficientnet-lite0" and report.n_images == len(manifest.rows)
    assert report.inputs["manifest"].sha256 == manifest.sha256
    assert report.n_candidate_pairs > 0 and report.quarantined == {}
    embedded = embed_manifest(manifest, Lite0Encoder())
    place = {sample.id: index for index, sample in enumerate(embedded.samples)}
    unit = embedded.features / np.linalg.norm(embedded.features, axis=1, keepdims=True)
    for cluster in report.clusters:
        for member in cluster.members:
            assert unit[place[cluster.keeper]] @ unit[place[member]] >= 0.95 - 1e-5
    members = [member for cluster in report.clusters for member in cluster.members]
    assert len(members) == len(set(members)), "an image is deleted at most once"
    recall = report.calibration["recall_brightness"]
    assert recall.value is not None and recall.value > 0.9
    assert set(report.files) == {"dedup_candidates.png"}
    sheet = read_image(corpus / "dedup_candidates.png")
    assert sheet.shape[1] > 400 and sheet.std() > 10


def test_a_second_run_embeds_nothing_and_finds_the_same(corpus: Path, deduped: Path) -> None:
    class Broken(Lite0Encoder):
        def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
            if next(iter(images), None) is not None:
                raise AssertionError("the cache was not used")
            return np.zeros((0, self.dim), np.float32)

    cached = embed_manifest(read_manifest(corpus / "manifest.parquet"), Broken())
    assert len(cached.samples) == read_record(deduped, DedupReport).n_images


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.5}, {"neighbours": 0}])
def test_options_out_of_range(corpus: Path, tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        deduplicate(corpus / "manifest.parquet", tmp_path / "r.json", **options)
    with pytest.raises(UsageError, match="unknown kind 'byte'"):
        parse_kinds("byte")
    assert list(tmp_path.iterdir()) == []
