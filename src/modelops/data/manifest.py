"""The manifest: one row a sample, with where it comes from and under which licence.

Columns: id, filepath, caption, license, source, sha256, nsfw_flag, tags, date_collected. `filepath`
is relative to the manifest's folder, `tags` are separated by ';', `date_collected` is an ISO date.
Further columns (such as `group`) are kept. A fault of the table itself raises; a fault of one file
puts its row into quarantine with the reason.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError, ManifestError, UsageError
from modelops.base.files import atomic_path, safe_join, sha256_bytes, sha256_file, write_text
from modelops.base.images import decode_image, read_image_bytes

COLUMNS = (
    "id", "filepath", "caption", "license", "source", "sha256", "nsfw_flag", "tags",
    "date_collected",
)  # fmt: skip
MAX_CAPTION = 4096  # characters; a longer one is a paste accident, not a caption
MAX_ID = 240  # bytes: ids become names inside shards, and ID.json is a file's name once unpacked
OnProgress = Callable[[int, int], None]  # (done, total)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[^\s/\\.\x00-\x1f\x7f-\x9f]+")  # WebDataset splits names at the first dot


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row. `extra` holds the columns beyond the nine, as text, without empty ones."""

    id: str
    filepath: str
    caption: str
    license: str
    source: str
    sha256: str
    nsfw_flag: int = 0
    tags: tuple[str, ...] = ()
    date_collected: str
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Key of the samples that must stay in one split; the id if the manifest has no groups."""
        return self.extra.get("group") or self.id


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was read.

    Attributes:
        path: the file.
        root: its folder, which every filepath is relative to.
        sha256: digest of the file.
        rows: the usable samples, in file order.
        quarantined: {id: reason} of the others.
        caches: folder for what is kept about the images; None keeps it in .cache beside them.
    """

    path: Path
    root: Path
    sha256: str
    rows: list[Sample]
    quarantined: dict[str, str]
    caches: Path | None = None

    @property
    def cache(self) -> Path:
        """Folder of embeddings, features and verdicts that are kept for the next time."""
        return self.caches or self.root / ".cache"

    def image_path(self, sample: Sample) -> Path:
        """Return the path of a sample's image."""
        return self.root / sample.filepath

    def read_bytes(self, sample: Sample) -> bytes:
        """Read a sample's image file; the bytes are those that the row promises.

        Raises:
            ImageError: the file is missing, empty, unreadable, or another one than the row's.
        """
        try:
            data = read_image_bytes(self.image_path(sample))
        except ImageError as error:
            reason = error.message.removeprefix(f"{self.image_path(sample)}: ")
            raise ImageError(f"{sample.filepath}: {reason}") from error
        if not data:
            raise ImageError(f"{sample.filepath}: the file is empty")
        found = sha256_bytes(data)
        if found != sample.sha256:
            raise ImageError(
                f"{sample.filepath}: sha256 is {found[:12]}, the manifest says {sample.sha256[:12]}"
            )
        return data

    def read_image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """Read a sample's image as uint8 [H, W, 3]; see `modelops.base.images.read_image`.

        Raises:
            ImageError: it cannot be decoded, or its bytes are not those that the row promises.
        """
        return decode_image(self.read_bytes(sample), Path(sample.filepath).name)


def read_manifest(
    path: str | Path, *, check_files: bool = True, on_progress: OnProgress | None = None
) -> Manifest:
    """Read and check a manifest, parquet or csv.

    Args:
        path: the manifest.
        check_files: also compare each file with its sha256; a missing, unreadable or different file
            is quarantined.
        on_progress: called with (done, total) while files are checked.

    Raises:
        ManifestError: the table is empty, lacks a column or a required value, repeats an id, or
            names a path outside its folder; the message names the file and the row.
        UsageError: there is no such file.
    """
    source = Path(path)
    if not source.is_file():
        raise UsageError(f"{source}: no such manifest", hint="name a manifest.parquet or .csv")
    digest = sha256_file(source)
    numbered = _read_csv(source) if source.suffix.lower() == ".csv" else _read_parquet(source)
    faults: list[str] = []
    samples: list[Sample] = []
    places: dict[str, str] = {}
    quarantined: dict[str, str] = {}
    for place, record in numbered:
        try:
            sample = _record_to_sample(record, source.parent)
        except ValueError as error:
            faults.append(f"{place}: {error}")
            continue
        if sample.id in places:
            faults.append(f"{place}: id {sample.id!r} is already that of {places[sample.id]}")
            continue
        places[sample.id] = place
        if len(sample.caption) > MAX_CAPTION:
            quarantined[sample.id] = (
                f"caption has {len(sample.caption)} characters, at most {MAX_CAPTION} are taken"
            )
        else:
            samples.append(sample)
    if faults:
        more = f" (and {len(faults) - 1} more faulty rows)" if len(faults) > 1 else ""
        raise ManifestError(f"{source}: {faults[0]}{more}", hint="correct the row and run again")
    if not samples and not quarantined:
        raise ManifestError(f"{source}: the manifest has no rows", hint="add at least one sample")
    manifest = Manifest(source, source.parent, digest, samples, quarantined)
    if check_files:
        _check_files(manifest, on_progress)
    return manifest


def write_manifest(path: str | Path, rows: Iterable[Sample]) -> Path:
    """Atomically write samples as parquet, or as csv if the name ends so. Same rows, same bytes.

    Raises:
        ManifestError: there are no rows, or two have the same id.
    """
    target = Path(path)
    samples = list(rows)
    if not samples:
        raise ManifestError(f"{target}: no rows to write")
    if len({sample.id for sample in samples}) < len(samples):
        raise ManifestError(f"{target}: two rows have the same id")
    extras = sorted({name for sample in samples for name in sample.extra})
    columns: dict[str, list[Any]] = {
        name: [getattr(sample, name) for sample in samples] for name in COLUMNS
    }
    columns["tags"] = [";".join(sample.tags) for sample in samples]
    for name in extras:
        columns[name] = [sample.extra.get(name, "") for sample in samples]
    if target.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_text(target, text.getvalue())
        return target
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.int64() if name == "nsfw_flag" else pa.string()) for name in columns]
    )
    with atomic_path(target) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary)
    return target


def _read_csv(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path}: line {line}: not UTF-8 text", hint="save the file as UTF-8"
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        _check_columns(path, header)
        rows: list[tuple[str, Mapping[str, Any]]] = []
        for cells in reader:
            place = f"line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise ManifestError(
                    f"{path}: {place}: {len(cells)} cells, the header has {len(header)}",
                    hint="put cells that hold commas between double quotes",
                )
            rows.append((place, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ManifestError(f"{path}: line {reader.line_num}: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        _check_columns(path, table.column_names)
        records = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ManifestError(
            f"{path}: not a readable parquet file: {reason}",
            hint="manifests are .parquet or .csv",
        ) from error
    return [(f"row {number}", record) for number, record in enumerate(records, 1)]


def _check_columns(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ManifestError(
            f"{path}: missing column{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            hint=f"a manifest has the columns {','.join(COLUMNS)}",
        )
    if len(set(names)) < len(names):
        raise ManifestError(f"{path}: a column name occurs twice")


def _record_to_sample(record: Mapping[str, Any], root: Path) -> Sample:
    """Parse a row of text cells into a Sample; ValueError names the fault."""
    cells = {name: _cell_to_text(name, value) for name, value in record.items()}
    name = cells["id"]
    if not name:
        raise ValueError("no id")
    for column in ("filepath", "caption", "license", "sha256"):
        if not cells[column]:
            raise ValueError(f"id {name!r} has no {column}")
    if len(name.encode("utf-8")) > MAX_ID or not _ID.fullmatch(name):
        raise ValueError(
            f"id {name[:40]!r} must have no space, slash or dot, no control character, and at "
            f"most {MAX_ID} bytes"
        )
    try:
        path = safe_join(root, cells["filepath"])
    except UsageError as error:
        raise ValueError(f"id {name!r}: {error}") from error
    if path.is_symlink():
        raise ValueError(f"id {name!r}: {cells['filepath']} is a symbolic link; copy the file")
    digest = cells["sha256"].lower()
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"id {name!r}: sha256 is not 64 hexadecimal digits")
    if cells["nsfw_flag"] not in ("0", "1"):
        raise ValueError(f"id {name!r}: nsfw_flag is {cells['nsfw_flag']!r}, must be 0 or 1")
    try:
        collected = date.fromisoformat(cells["date_collected"]).isoformat()
    except ValueError:
        raise ValueError(
            f"id {name!r}: date_collected {cells['date_collected']!r} is not a date like 2025-09-01"
        ) from None
    return Sample(
        id=name,
        filepath=cells["filepath"],
        caption=cells["caption"],
        license=cells["license"],
        source=cells["source"],
        sha256=digest,
        nsfw_flag=int(cells["nsfw_flag"]),
        tags=tuple(tag.strip() for tag in cells["tags"].split(";") if tag.strip()),
        date_collected=collected,
        extra={key: text for key, text in cells.items() if key not in COLUMNS and text},
    )


def _cell_to_text(column: str, value: Any) -> str:
    """Text of a cell, stripped; dates, booleans and whole floats in their manifest form."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, date):
        return value.isoformat()[:10]
    if isinstance(value, list):
        return ";".join(str(part) for part in value)
    text = str(value).strip()
    if "\0" in text:
        raise ValueError(f"column {column} holds a null byte")
    return text


def _check_files(manifest: Manifest, on_progress: OnProgress | None) -> None:
    """Move the rows whose file has not the promised bytes into quarantine."""
    usable = []
    for done, sample in enumerate(manifest.rows, 1):
        try:
            manifest.read_bytes(sample)
        except ImageError as error:
            manifest.quarantined[sample.id] = error.message
        else:
            usable.append(sample)
        if on_progress:
            on_progress(done, len(manifest.rows))
    manifest.rows[:] = usable
