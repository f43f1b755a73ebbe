"""Two sources' images of the same prompts and seeds, from evaluation records or sample folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelops.base.errors import EvaluationError, IntegrityError, ModelopsError, UsageError
from modelops.base.files import read_json, safe_join, sha256_file
from modelops.evaluation.per_image import measured_image, read_per_image
from modelops.evaluation.prompts import image_name
from modelops.evaluation.samples import COMPLETE
from modelops.records.base import InputRef
from modelops.records.evaluation import EvaluationRecord, SourceInfo
from modelops.records.read import read_record

Planned = tuple[str, int]  # (prompt, replicate)
ALLOWED_DIFFERENCES = ("steps", "guidance")
_SAMPLES = "samples.json"


@dataclass(frozen=True, slots=True)
class Side:
    """One source's images.

    Attributes:
        source: which model source made them.
        ref: the record or samples.json they were read from.
        sampling: what must be equal on both sides.
        seeds: of every planned image.
        files: PNG of each planned image that was made.
        failures: reason for each that was not.
    """

    source: SourceInfo
    ref: InputRef
    sampling: dict[str, Any]
    seeds: dict[Planned, int]
    files: dict[Planned, Path] = field(default_factory=dict)
    failures: dict[Planned, str] = field(default_factory=dict)


def open_side(path: str | Path) -> Side:
    """Images of an evaluation record (with its samples beside it) or of a `modelops sample` folder.

    Raises:
        UsageError: the path is neither.
        EvaluationError: the record failed, or its images are gone.
        IntegrityError: a file is not the one that its record names.
    """
    source = Path(path)
    if source.is_dir():
        if not (source / _SAMPLES).is_file():
            raise UsageError(
                f"{source}: a folder without {_SAMPLES}",
                hint="give an evaluation record or a folder that `modelops sample` wrote",
            )
        return _from_samples(source)
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder")
    return _from_record(source)


def sampling_differences(a: Side, b: Side) -> dict[str, str]:
    """Return the differences of two samplings, {key: "ours against theirs"}; empty if they are
    alike.
    """
    found = {
        key: f"{a.sampling.get(key, 'absent')} against {b.sampling.get(key, 'absent')}"
        for key in sorted({*a.sampling, *b.sampling})
        if a.sampling.get(key) != b.sampling.get(key)
    }
    only_a, only_b = a.seeds.keys() - b.seeds.keys(), b.seeds.keys() - a.seeds.keys()
    if only_a or only_b:
        example = min(only_a or only_b)[0]
        found["prompts"] = (
            f"{len(only_a)} images only planned in A, {len(only_b)} only in B, such as {example!r}"
        )
    other = [planned for planned in a.seeds.keys() & b.seeds.keys()
             if a.seeds[planned] != b.seeds[planned]]  # fmt: skip
    if other:
        found["image seeds"] = f"{len(other)} differ, such as that of {min(other)[0]!r}"
    return found


def _from_record(path: Path) -> Side:
    record = read_record(path, EvaluationRecord)
    if record.status != "ok":
        raise EvaluationError(f"{path}: the evaluation {record.status}: {record.error}")
    if record.sampling is None:
        raise EvaluationError(f"{path}: does not say how its images were sampled")
    rows = read_per_image(path, record)
    side = Side(
        source=record.source,
        ref=InputRef(path=str(path), sha256=sha256_file(path)),
        # The scheduler belongs to the source, as its runtime and precision do.
        sampling=record.sampling.model_dump(exclude={"scheduler"}),
        seeds={(row["prompt"], row["replicate"]): row["seed"] for row in rows},
    )
    names: dict[Planned, tuple[str, dict[str, Any]]] = {}
    for place, row in enumerate(rows):
        planned = (row["prompt"], row["replicate"])
        if row.get("failure"):
            side.failures[planned] = row["failure"]
        else:
            counts = place * (record.source.kind == "folder")
            names[planned] = image_name(row["prompt"], row["seed"], counts), row
    folder = _samples_folder(path, {name for name, _ in names.values()})
    side.files.update({
        planned: measured_image(path, row, name, folder) for planned, (name, row) in names.items()
    })  # fmt: skip
    return side


def _samples_folder(record: Path, wanted: set[str]) -> Path:
    done = (record.with_suffix("") / "samples").glob(f"*/{COMPLETE}")
    folders = sorted((path.parent for path in done), key=lambda path: path.stat().st_mtime_ns)
    for folder in reversed(folders):
        if all((folder / name).is_file() for name in wanted):
            return folder
    raise EvaluationError(
        f"{record}: its images are not beside it", hint="run `modelops eval` again"
    )


def _from_samples(folder: Path) -> Side:
    listing = folder / _SAMPLES
    data = read_json(listing)
    try:
        side = Side(
            source=SourceInfo.model_validate(data["source"]),
            ref=InputRef(path=str(listing), sha256=sha256_file(listing)),
            sampling={key: data[key] for key in ("seed", "steps", "guidance", "height", "width")},
            seeds={},
        )
        replicates: dict[str, int] = {}
        for entry in data["images"]:
            prompt = entry["prompt"]
            planned = (prompt, replicates.get(prompt, 0))
            replicates[prompt] = planned[1] + 1
            side.seeds[planned] = entry["seed"]
            if entry["file"] is None:
                side.failures[planned] = entry["failure"]
                continue
            path = safe_join(folder, entry["file"])
            if sha256_file(path) != entry["sha256"]:
                raise IntegrityError(f"{path}: differs from the digest in {listing}")
            side.files[planned] = path
    except ModelopsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{listing}: not what `modelops sample` writes: {error!r}") from error
    return side
