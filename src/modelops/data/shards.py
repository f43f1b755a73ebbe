"""Samples to WebDataset tars and back.

A shard is a plain tar with three members a sample: ID.png, ID.txt (the caption) and ID.json (id,
caption, tags, group, license, source). The webdataset package reads them; this module reads them
too, by offset, so a training run can take any sample at any time and resume exactly.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError, IntegrityError, UsageError
from modelops.base.files import (
    atomic_directory,
    atomic_path,
    canonical_json,
    check_writable,
    parse_json,
    read_text,
    remove_leftovers,
    safe_join,
    sha256_file,
)
from modelops.base.images import decode_image, encode_png, resize_image
from modelops.base.locks import output_lock, refuse_foreign
from modelops.base.seeding import derive_seed
from modelops.data.manifest import Manifest, Sample, read_manifest
from modelops.data.split import SPLITS, read_splits

NAMED = 5  # rows in a message
SHARD_COLUMNS = ("shard", "split", "samples", "bytes", "sha256")
OnProgress = Callable[[int, int], None]  # (done, total)
_FILE = re.compile(r"(train|val|test)-[0-9]{6,}\.tar")


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample of a shard. `image` is uint8 [H, W, 3], sRGB."""

    id: str
    image: npt.NDArray[np.uint8]
    caption: str
    tags: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """One row of shard_manifest.csv; `path` is relative to the csv's folder."""

    path: str
    split: str
    samples: int
    bytes: int
    sha256: str


def write_shards(
    manifest_path: str | Path,
    splits_path: str | Path,
    data_dir: str | Path,
    *,
    resolution: int,
    samples_per_shard: int = 1000,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write `data_dir/shards/SPLIT-NNNNNN.tar` and `data_dir/shard_manifest.csv`.

    Images are scaled and centre-cropped to resolution x resolution and stored as PNG without
    metadata. The order of samples is shuffled by `seed`, so that a shard read in order is already
    mixed. The same input gives the same bytes.

    Returns the path of shard_manifest.csv.

    Raises:
        UsageError: a size is out of range, the splits name a sample that the manifest lacks, or
            `shards/` holds files of another origin.
        IntegrityError: an image cannot be read, or is not the one that the manifest names; the
            shards that were there stay.
        ModelopsError: the folder cannot be written, or another process writes there.
    """
    if not 8 <= resolution <= 4096:
        raise UsageError(f"resolution {resolution} is out of range", hint="use 8 to 4096 pixels")
    if samples_per_shard < 1:
        raise UsageError(f"{samples_per_shard} samples per shard", hint="use at least 1")
    manifest = read_manifest(manifest_path, check_files=False)
    splits = read_splits(splits_path)
    samples = {sample.id: sample for sample in manifest.rows}
    unknown = sorted(set(splits) - set(samples))
    if unknown:
        raise UsageError(
            f"{splits_path}: {unknown[0]!r} is not in {manifest_path}"
            + (f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""),
            hint="make the splits again: modelops data split",
        )
    root = Path(data_dir)
    check_writable(root)
    rows: list[Shard] = []
    faults: list[str] = []
    done = 0
    target = root / "shard_manifest.csv"
    with output_lock(root, inside=True):
        remove_leftovers(root)
        refuse_foreign(root / "shards", _FILE)
        with atomic_path(target) as listing, atomic_directory(root / "shards") as folder:
            for split in SPLITS:
                members = sorted(
                    (name for name, where in splits.items() if where == split),
                    key=lambda name: (derive_seed(seed, "shard order", name), name),
                )
                for number, start in enumerate(range(0, len(members), samples_per_shard)):
                    path = folder / f"{split}-{number:06d}.tar"
                    chunk = members[start : start + samples_per_shard]
                    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:  # long ids
                        for name in chunk:
                            try:
                                _add_sample(tar, samples[name], manifest, resolution)
                            except ImageError as error:
                                faults.append(f"{name}: {error.message}")
                            done += 1
                            if on_progress:
                                on_progress(done, len(splits))
                    rows.append(
                        Shard(
                            f"shards/{path.name}", split, len(chunk),
                            path.stat().st_size, sha256_file(path),
                        )
                    )  # fmt: skip
            if faults:
                more = f" (and {len(faults) - NAMED} more)" if len(faults) > NAMED else ""
                raise IntegrityError(
                    f"{manifest_path}: {len(faults)} of {len(splits)} rows cannot be packed: "
                    f"{'; '.join(faults[:NAMED])}{more}",
                    hint="put the files back, or correct the rows and run dedup and split again",
                )
            listing.write_text(_rows_to_csv(rows), "utf-8")
    return target


def _rows_to_csv(rows: list[Shard]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SHARD_COLUMNS)
    writer.writerows((row.path, row.split, row.samples, row.bytes, row.sha256) for row in rows)
    return text.getvalue()


def read_shard_manifest(path: str | Path) -> list[Shard]:
    """The rows of shard_manifest.csv.

    Raises:
        UsageError: the file is missing, lacks a column, or has a row that makes no sense.
    """
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    missing = [name for name in SHARD_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UsageError(
            f"{path}: missing column {missing[0]}", hint=f"columns: {','.join(SHARD_COLUMNS)}"
        )
    rows = []
    for row in reader:
        try:
            rows.append(
                Shard(
                    row["shard"], row["split"], int(row["samples"]), int(row["bytes"]),
                    row["sha256"],
                )
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}: line {reader.line_num}: not a shard row") from error
    if not rows:
        raise UsageError(f"{path}: lists no shards", hint="make them: modelops data shard")
    return rows


class ShardDataset:
    """Samples of one split by index: a map-style dataset for a torch DataLoader.

    Opening it reads the tars' headers only. It holds no open file, so it can be pickled to worker
    processes; each reads through its own handles.

    Args:
        shard_manifest: shard_manifest.csv.
        split: "train", "val" or "test".
        verify: compare each tar with its sha256 first.

    Raises:
        UsageError: the split has no shards.
        IntegrityError: a tar is missing, differs from its digest, or is not as the csv says.
    """

    def __init__(self, shard_manifest: str | Path, split: str, *, verify: bool = True) -> None:
        self.path = Path(shard_manifest)
        self.split = split
        root = self.path.parent
        rows = [row for row in read_shard_manifest(self.path) if row.split == split]
        if not rows:
            raise UsageError(f"{self.path}: no shards of split {split!r}")
        self.shards: list[Path] = []
        self._stamps: list[tuple[int, ...]] = []
        self._index: list[tuple[str, int, dict[str, tuple[int, int]]]] = []
        for row in rows:
            path = safe_join(root, row.path)
            if not path.is_file():
                raise IntegrityError(f"{path}: shard is missing", hint="modelops data shard")
            stamp = _stamp(path.stat())
            if verify and sha256_file(path) != row.sha256:
                raise IntegrityError(
                    f"{path}: differs from its sha256 in {self.path.name}",
                    hint="make the shards again: modelops data shard",
                )
            entries = _read_index(path)
            if len(entries) != row.samples:
                raise IntegrityError(
                    f"{path}: {len(entries)} samples, {self.path.name} says {row.samples}"
                )
            self._index += [(name, len(self.shards), parts) for name, parts in entries.items()]
            self.shards.append(path)
            self._stamps.append(stamp)
        self._handles: dict[int, tuple[int, Any]] = {}

    @property
    def ids(self) -> list[str]:
        """The ids, in index order."""
        return [name for name, _, _ in self._index]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> ShardSample:
        """The sample at `index`; its image is uint8 [H, W, 3].

        Raises:
            IndexError: out of range.
            ImageError: the stored image cannot be decoded.
            IntegrityError: a part of the sample is missing, or the tar changed meanwhile.
        """
        name, shard, _ = self._index[index]
        try:
            record = parse_json(self._read_text(index, "json"), source=f"{name}.json")
        except UsageError as error:
            raise IntegrityError(f"{self.shards[shard]}: {error.message}") from error
        if not isinstance(record, dict):
            raise IntegrityError(f"{self.shards[shard]}: {name}.json: not a JSON object")
        return ShardSample(
            id=name,
            image=decode_image(self._read(index, "png"), f"{name}.png"),
            caption=self.caption(index),
            tags=tuple(record.get("tags", ())),
            group=record.get("group", ""),
        )

    def caption(self, index: int) -> str:
        """The caption at `index`, without decoding its image."""
        return self._read_text(index, "txt")

    def captions(self) -> list[str]:
        """Return all captions, in index order."""
        return [self.caption(index) for index in range(len(self))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _read_text(self, index: int, part: str) -> str:
        try:
            return self._read(index, part).decode("utf-8")
        except UnicodeDecodeError as error:
            place = self.shards[self._index[index][1]]
            raise IntegrityError(f"{place}: {self.ids[index]}.{part}: not UTF-8 text") from error

    def _read(self, index: int, part: str) -> bytes:
        _, shard, parts = self._index[index]
        if part not in parts:
            raise IntegrityError(f"{self.shards[shard]}: sample {self.ids[index]!r} has no .{part}")
        offset, size = parts[part]
        handle = self._handle(shard).fileno()
        if _stamp(os.fstat(handle)) != self._stamps[shard]:
            raise IntegrityError(
                f"{self.shards[shard]}: changed since it was opened",
                hint="leave shards alone while they are read",
            )
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise IntegrityError(f"{self.shards[shard]}: ends before sample {self.ids[index]!r}")
        return data

    def _handle(self, shard: int) -> Any:
        """An open handle of this process; after a fork the parent's is not used."""
        process = os.getpid()
        owner, handle = self._handles.get(shard, (0, None))
        if owner != process:
            handle = self.shards[shard].open("rb")
            self._handles[shard] = (process, handle)
        return handle

    def close(self) -> None:
        """Close the handles of this process; the next read opens them again."""
        for owner, handle in self._handles.values():
            if owner == os.getpid():
                handle.close()
        self._handles = {}

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()


def _add_sample(tar: tarfile.TarFile, sample: Sample, manifest: Manifest, resolution: int) -> None:
    image = resize_image(manifest.read_image(sample), resolution)
    record = {
        "id": sample.id,
        "caption": sample.caption,
        "tags": list(sample.tags),
        "group": sample.group,
        "license": sample.license,
        "source": sample.source,
    }
    parts = {
        "png": encode_png(image),
        "txt": sample.caption.encode("utf-8"),
        "json": canonical_json(record).encode("utf-8"),
    }
    for suffix, data in parts.items():
        info = tarfile.TarInfo(f"{sample.id}.{suffix}")
        info.size = len(data)
        info.mode = 0o644
        tar.addfile(info, io.BytesIO(data))


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    """Values that change when a file is replaced or written to."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """{id: {extension: (offset, size)}} of a tar's regular members, in order."""
    entries: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    name, _, suffix = member.name.partition(".")
                    entries.setdefault(name, {})[suffix] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise IntegrityError(f"{path}: not a readable tar: {error}") from error
    return entries
