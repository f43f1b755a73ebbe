"""Shards: deterministic tars that webdataset reads too, the smoke test, statistics."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modelops.base.errors import IntegrityError, InUseError, UsageError
from modelops.base.files import sha256_file, sha256_tree
from modelops.base.images import encode_png, read_image
from modelops.base.locks import output_lock
from modelops.data.manifest import Sample, read_manifest, write_manifest
from modelops.data.shards import ShardDataset, read_shard_manifest, write_shards
from modelops.data.smoke import smoke_test
from modelops.data.split import SPLITS, read_splits
from modelops.data.stats import manifest_statistics
from modelops.records.data import SmokeReport
from modelops.records.read import read_record


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    shutil.copytree(shards.parent / "shards", tmp_path / "shards")
    shutil.copy(shards, tmp_path)
    return tmp_path / shards.name


def damage(manifest: Path, shard: str, position: int, data: bytes) -> None:
    """Overwrite bytes of a shard and correct its digest in the csv, as a forger would."""
    path = manifest.parent / shard
    old = sha256_file(path)
    with path.open("r+b") as handle:
        handle.seek(position)
        handle.write(data)
    manifest.write_text(manifest.read_text().replace(old, sha256_file(path)))


def test_every_sample_is_there_as_it_was(corpus: Path, split: Path, shards: Path) -> None:
    manifest = read_manifest(corpus / "manifest.parquet")
    rows = {row.id: row for row in manifest.rows}
    where = read_splits(split)
    seen: dict[str, str] = {}
    for name in SPLITS:
        dataset = ShardDataset(shards, name)
        assert len(dataset) == list(where.values()).count(name)
        for index in range(len(dataset)):
            sample = dataset[index]
            row = rows[sample.id]
            np.testing.assert_array_equal(sample.image, read_image(manifest.image_path(row)))
            assert (sample.caption, sample.tags, sample.group) == (row.caption, row.tags, row.group)
            seen[sample.id] = name
        assert dataset.captions() == [dataset[index].caption for index in range(len(dataset))]
        with pytest.raises(IndexError):
            dataset[len(dataset)]
    assert seen == where


def test_the_same_input_gives_the_same_bytes(
    corpus: Path, split: Path, shards: Path, tmp_path: Path
) -> None:
    options = {"resolution": 32, "samples_per_shard": 50}
    again = write_shards(corpus / "manifest.parquet", split, tmp_path / "a", **options)
    assert again.read_bytes() == shards.read_bytes()
    assert sha256_tree(tmp_path / "a/shards") == sha256_tree(corpus / "shards")
    other = write_shards(corpus / "manifest.parquet", split, tmp_path / "b", seed=1, **options)
    assert other.read_bytes() != shards.read_bytes()


def test_webdataset_reads_the_same_samples(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    rows = [row for row in read_shard_manifest(shards) if row.split == "train"]
    assert len(rows) > 1, "more than one shard"
    urls = [str(shards.parent / row.path) for row in rows]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    theirs = list(pipeline)
    ours = ShardDataset(shards, "train")
    assert [sample["__key__"] for sample in theirs] == ours.ids
    for index, sample in enumerate(theirs):
        np.testing.assert_array_equal(sample["png"], ours[index].image)
        assert sample["txt"] == ours[index].caption
        assert tuple(sample["json"]["tags"]) == ours[index].tags


def test_tars_hold_no_time_owner_or_path(shards: Path) -> None:
    with tarfile.open(shards.parent / "shards/train-000000.tar", "r:") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            assert "/" not in member.name


def test_a_dataset_can_be_pickled_after_use(shards: Path) -> None:
    dataset = ShardDataset(shards, "val")
    before = dataset[0]
    twin = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(twin[0].image, before.image)


def test_other_bytes_are_refused(copy: Path) -> None:
    path = copy.parent / "shards/test-000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="differs from its sha256"):
        ShardDataset(copy, "test")
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        ShardDataset(copy, "test")
    with pytest.raises(UsageError, match="no shards of split 'nope'"):
        ShardDataset(copy, "nope")


def test_a_shard_manifest_cannot_lead_outside(copy: Path) -> None:
    copy.write_text(copy.read_text().replace("shards/test-", "../shards/test-"))
    with pytest.raises(UsageError, match="outside"):
        ShardDataset(copy, "test")


def test_writing_is_all_or_nothing(corpus: Path, split: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(
            corpus / "manifest.parquet", split, tmp_path,
            resolution=32, samples_per_shard=20, on_progress=stop,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_changed_since_the_manifest_is_not_packed(
    corpus: Path, split: Path, shards: Path, tmp_path: Path
) -> None:
    """Replaced, missing or empty: refused by name before anything that was there is touched."""
    shutil.copytree(corpus / "images", tmp_path / "images")
    for name in ("manifest.parquet", "splits.parquet", "shard_manifest.csv"):
        shutil.copy(corpus / name, tmp_path)
    shutil.copytree(corpus / "shards", tmp_path / "shards")
    rows = read_manifest(tmp_path / "manifest.parquet").rows
    replaced, missing, empty = (tmp_path / row.filepath for row in rows[:3])
    Image.fromarray(read_image(replaced)[::-1]).save(replaced)
    missing.unlink()
    empty.write_bytes(b"")
    before = sha256_tree(tmp_path)
    with pytest.raises(IntegrityError, match=f"3 of {len(rows)} rows cannot be packed") as caught:
        write_shards(
            tmp_path / "manifest.parquet", tmp_path / "splits.parquet", tmp_path, resolution=32
        )
    for row, said in zip(rows, ("the manifest says", "No such file", "is empty"), strict=False):
        assert row.id in caught.value.message and said in caught.value.message
    assert sha256_tree(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "x" * 96,
        "x" * 240,
        "猫" * 80,
        "Ж" * 100,
        "عربى\u200cنص",
        "a\u0301",
        "#%&'()+,;=@[]^`{}~",
        "-",
        "🐈‍⬛",
    ],
)
def test_one_rule_for_ids(tmp_path: Path, add_picture: Callable[..., Sample], name: str) -> None:
    """Whatever id a manifest may have comes back from a shard, here and in webdataset."""
    webdataset = pytest.importorskip("webdataset")
    row = add_picture("0", id=name)
    manifest = write_manifest(tmp_path / "manifest.csv", [row])
    table = pa.table({"id": [name], "split": ["train"], "group": [name]})
    pq.write_table(table, tmp_path / "splits.parquet")
    path = write_shards(manifest, tmp_path / "splits.parquet", tmp_path, resolution=16)
    assert ShardDataset(path, "train")[0].id == name
    url = str(tmp_path / "shards/train-000000.tar")
    (sample,) = webdataset.WebDataset([url], shardshuffle=False).decode("rgb8")
    assert sample["__key__"] == name and sample["json"]["id"] == name
    with tarfile.open(url) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert (tmp_path / "unpacked" / f"{name}.json").is_file()


def test_a_tar_that_changes_while_it_is_read_is_noticed(copy: Path) -> None:
    """The digest was of other bytes: replaced before the first read, and written to after it."""
    dataset = ShardDataset(copy, "val")
    path = dataset.shards[0]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed since"):
        dataset[0]
    dataset = ShardDataset(copy, "val")
    assert dataset[0].id
    with path.open("r+b") as handle:
        handle.write(data[:1])
    os.utime(path, ns=(1, 1))
    with pytest.raises(IntegrityError, match="changed since"):
        dataset[0]


def test_one_process_at_a_time_writes_shards(corpus: Path, split: Path, tmp_path: Path) -> None:
    with output_lock(tmp_path, inside=True), pytest.raises(InUseError, match="in use by process"):
        write_shards(corpus / "manifest.parquet", split, tmp_path, resolution=16)
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_user_are_not_replaced(corpus: Path, split: Path, tmp_path: Path) -> None:
    """A folder named shards of another program, and names that look like leftovers of ours."""
    mine = [
        ".images.old/originals.txt", "images/a.png", ".keep.tmp", ".shards_backup.old/a",
        "shards/thesis.tex",
    ]  # fmt: skip
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        write_shards(corpus / "manifest.parquet", split, tmp_path, resolution=16)
    assert {name: (tmp_path / name).read_text() for name in mine} == dict.fromkeys(mine, "mine")
    (tmp_path / "shards/thesis.tex").unlink()
    for _ in range(2):
        write_shards(corpus / "manifest.parquet", split, tmp_path, resolution=16)
    for name in mine[:-1]:
        assert (tmp_path / name).read_text() == "mine"


def test_pictures_are_scaled_to_the_resolution(corpus: Path, split: Path, tmp_path: Path) -> None:
    path = write_shards(corpus / "manifest.parquet", split, tmp_path, resolution=16)
    assert ShardDataset(path, "val")[0].image.shape == (16, 16, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_smoke_test_passes_on_good_shards(shards: Path, tmp_path: Path, workers: int) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    report = smoke_test(shards, tmp_path / "smoke.json", batch_size=16, workers=workers)
    assert signal.getsignal(signal.SIGCHLD) == handler  # a DataLoader with workers sets its own
    assert report.verdict == "pass" and report.reasons == []
    assert report.n_samples == sum(row.samples for row in read_shard_manifest(shards))
    assert report.images_per_second > 0
    assert read_record(tmp_path / "smoke.json", SmokeReport) == report


def test_the_smoke_test_fails_on_damage_and_names_it(copy: Path) -> None:
    dataset = ShardDataset(copy, "test")
    offset, size = dataset._index[0][2]["png"]
    damage(copy, "shards/test-000000.tar", offset + size // 2, bytes(8))
    offset, size = dataset._index[1][2]["txt"]
    damage(copy, "shards/test-000000.tar", offset, b" " * size)
    report = smoke_test(copy, None, batch_size=8)
    assert report.verdict == "fail"
    assert any(dataset.ids[0] in reason for reason in report.reasons)
    assert any("empty caption" in reason for reason in report.reasons)


@pytest.mark.parametrize(
    ("part", "data", "said"),
    [
        ("json", b"[" * 2000, "nested too deeply"), ("json", b"[1]", "not a JSON object"),
        ("json", b"\xff", "not UTF-8"), ("txt", b"\xff", "not UTF-8"),
        ("json", b"9" * 5000, "5000 digits"),
    ],
)  # fmt: skip
def test_another_programs_odd_shard_is_named(
    tmp_path: Path, part: str, data: bytes, said: str
) -> None:
    parts = {"png": encode_png(np.zeros((8, 8, 3), np.uint8)), "txt": b"a", "json": b"{}"}
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for suffix, content in (parts | {part: data}).items():
            info = tarfile.TarInfo(f"one.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    row = f"shards/{path.name},train,1,{path.stat().st_size},{sha256_file(path)}"
    (tmp_path / "m.csv").write_text(f"shard,split,samples,bytes,sha256\n{row}\n")
    with pytest.raises(IntegrityError, match=rf"one\.{part}: .*{said}"):
        ShardDataset(tmp_path / "m.csv", "train")[0]


def test_the_smoke_test_sees_an_id_in_two_splits(copy: Path) -> None:
    (row,) = [row for row in read_shard_manifest(copy) if row.split == "test"]
    twin = "shards/val-000099.tar"
    shutil.copy(copy.parent / row.path, copy.parent / twin)
    with copy.open("a") as handle:
        handle.write(f"{twin},val,{row.samples},{row.bytes},{row.sha256}\n")
    report = smoke_test(copy, None)
    assert report.verdict == "fail" and "is in val and in test" in report.reasons[0]


def test_the_smoke_test_survives_a_missing_shard(copy: Path) -> None:
    (copy.parent / "shards/train-000001.tar").unlink()
    report = smoke_test(copy, None)
    assert report.verdict == "fail" and any("missing" in reason for reason in report.reasons)


def test_statistics_add_up(corpus: Path, deduped: Path, split: Path) -> None:
    found = manifest_statistics(corpus / "manifest.parquet", split, deduped)
    json.dumps(found, allow_nan=False)
    total = found["samples"]
    assert found["licenses"] == {"CC-BY-SA-4.0": total}
    assert sum(found["splits"].values()) == total
    assert sum(found["split_groups"].values()) == found["groups"]
    assert found["resolutions"] == {"32x32": total}
    assert found["nsfw"] == {"flagged": 0, "samples": total}
    tag = next(iter(found["tags"]))
    assert sum(part.get(tag, 0) for part in found["tags_by_split"].values()) == found["tags"][tag]
    assert found["duplicates"]["threshold"] == 0.95
