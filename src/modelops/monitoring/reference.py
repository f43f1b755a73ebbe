"""Reference of a release: its own evaluation, which later windows are compared with.

An evaluation record measures how far the images were from real ones, which does not help here. The
reference is the evaluated images themselves, as features, with their filter scores and the lengths
and scripts of their prompts. `modelops release build` puts them into the release, in two files of
`monitoring/`: about 1 MB for 400 images, 5 MB at most.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from modelops.base.environment import current_environment
from modelops.base.errors import EvaluationError, IntegrityError, ModelopsError, UsageError
from modelops.base.files import atomic_path, read_json, safe_join, sha256_file
from modelops.base.seeding import numpy_generator
from modelops.monitoring.extractors import features_protocol
from modelops.monitoring.rows import shares_to_vector
from modelops.monitoring.scripts import SCRIPTS, script_shares
from modelops.records.base import InputRef, Record
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record
from modelops.records.release import ReleaseRecord
from modelops.releases.verify import RECORD_FILE, released_evaluations

FOLDER = "monitoring"
RECORD_NAME = "reference.json"
ARRAYS_NAME = "reference.npz"
MAX_IMAGES = 2000
_NODE_NAMES = {"word lists": "words"}  # a filter in an evaluation, as a node calls it


class FilterRate(BaseModel):
    """Rate at which a filter stopped what was evaluated; `name` as the node calls it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    stopped: int
    n: int


class DriftReference(Record):
    """monitoring/reference.json, beside the arrays it describes.

    `n_images` are images of as many prompts, the first of each; `settings` how they were sampled.
    """

    kind: Literal["drift_reference"] = "drift_reference"
    evaluation: InputRef
    model_sha256: str
    extractor: dict[str, Any]
    n_images: int
    steps: int
    guidance: float
    prompt_filter: FilterRate | None = None
    image_filter: FilterRate | None = None
    scripts: list[str]
    arrays: InputRef


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference that was read.

    Attributes:
        features: [N, D] float16, one row a prompt.
        scores: [N] float32 of the image filter; empty where none was measured.
        characters: length of each prompt [N] int32.
        scripts: shares of its letters by script, [N, len(SCRIPTS)] float32.
    """

    record: DriftReference
    features: npt.NDArray[np.float16]
    scores: npt.NDArray[np.float32]
    characters: npt.NDArray[np.int32]
    scripts: npt.NDArray[np.float32]


def build_reference(evaluation_path: str | Path, folder: str | Path) -> DriftReference:
    """Write reference.json and reference.npz of an evaluation into `folder`.

    Raises:
        EvaluationError: the evaluation has no features or no per-image values beside it, or they
            are others than its record names, or not finite as float16.
    """
    path, out = Path(evaluation_path), Path(folder)
    evaluation = read_record(path, EvaluationRecord)
    if evaluation.status != "ok" or evaluation.sampling is None or not evaluation.source.sha256:
        raise EvaluationError(f"{path}: did not end well, or does not name its model")
    protocol = features_protocol(evaluation)
    rows = read_json(_named_file(path, evaluation, "per_image"))
    features = _features(_named_file(path, evaluation, "features"), int(protocol["dim"]))
    made = [row for row in rows if row.get("failure") is None]
    if len(made) != len(features):
        raise EvaluationError(f"{path}: {len(features)} features of {len(made)} images")
    first: dict[str, int] = {}
    for place, row in enumerate(made):
        first.setdefault(row["prompt"], place)
    chosen = sorted(first.values())
    if len(chosen) > MAX_IMAGES:
        generator = numpy_generator(0, "drift-reference")
        chosen = sorted(generator.choice(chosen, MAX_IMAGES, replace=False).tolist())
    prompts = [made[place]["prompt"] for place in chosen]
    scores = [made[place].get("nsfw_score") for place in chosen]
    arrays: dict[str, Any] = {
        "features": _as_float16(features[chosen]),
        "scores": np.array([] if None in scores else scores, np.float32),
        "characters": np.array([len(prompt) for prompt in prompts], np.int32),
        "scripts": np.array(
            [shares_to_vector(script_shares(prompt)) for prompt in prompts], np.float32
        ),
    }
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise EvaluationError(f"{path}: its features or scores are not finite as float16")
    with atomic_path(out / ARRAYS_NAME) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **arrays)
    record = DriftReference(
        evaluation=InputRef(path=path.name, sha256=sha256_file(path)),
        model_sha256=evaluation.source.sha256,
        extractor=protocol,
        n_images=len(chosen),
        steps=evaluation.sampling.steps,
        guidance=evaluation.sampling.guidance,
        prompt_filter=_rate(evaluation, "prompt_block_rate"),
        image_filter=_rate(evaluation, "unsafe_rate"),
        scripts=list(SCRIPTS),
        arrays=InputRef(path=ARRAYS_NAME, sha256=sha256_file(out / ARRAYS_NAME)),
        environment=current_environment(),
    )
    record.write(out / RECORD_NAME)
    return record


def release_files(
    records: Iterable[str | Path], *, model_sha256: str, folder: str | Path
) -> tuple[dict[str, Path], str]:
    """Make the files that `modelops release build` adds: ({name in the release: file}, a remark).

    The reference is of the newest evaluation of the very model among `records`; without one, or
    without its features beside it, there are no files and the remark says why.
    """
    found: list[tuple[EvaluationRecord, Path]] = []
    for path in map(Path, records):
        try:
            record = read_record(path, EvaluationRecord)
        except ModelopsError:
            continue  # a record of another kind
        if record.status == "ok" and record.source.sha256 == model_sha256:
            found.append((record, path))
    if not found:
        return {}, "no evaluation of this model is in the release: drift cannot be held against it"
    _, path = max(found, key=lambda item: item[0].started_at)
    try:
        made = build_reference(path, folder)
    except (ModelopsError, OSError, ValueError, KeyError) as error:
        reason = error.message if isinstance(error, ModelopsError) else str(error)
        return {}, f"no reference for `modelops monitor`: {reason}"
    files = {f"{FOLDER}/{name}": Path(folder) / name for name in (RECORD_NAME, ARRAYS_NAME)}
    return files, f"reference for `modelops monitor`: {made.n_images} images of {path.name}"


def read_reference(folder: str | Path) -> Reference:
    """Read a reference from its two files.

    Raises:
        UsageError: there is none, or it cannot be read.
        IntegrityError: the arrays are not those that the record names.
    """
    top = Path(folder)
    record = read_record(top / RECORD_NAME, DriftReference)
    path = safe_join(top, record.arrays.path)
    if sha256_file(path) != record.arrays.sha256:
        raise IntegrityError(f"{path}: differs from the digest in {top / RECORD_NAME}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in ("features", "scores", "characters", "scripts")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    n, dim = record.n_images, int(record.extractor.get("dim", 0))
    fits = found["features"].shape == (n, dim) and found["characters"].shape == (n,)
    fits = fits and found["scores"].shape in ((n,), (0,))
    if not fits or found["scripts"].shape != (n, len(SCRIPTS)) or record.scripts != list(SCRIPTS):
        raise UsageError(f"{path}: arrays of other shapes than {RECORD_NAME} says")
    if not all(np.isfinite(array).all() for array in found.values()):
        raise UsageError(f"{path}: holds numbers that are not finite")
    return Reference(
        record, found["features"].astype(np.float16), found["scores"].astype(np.float32),
        found["characters"].astype(np.int32), found["scripts"].astype(np.float32),
    )  # fmt: skip


def released_reference(
    release_dir: str | Path, release: ReleaseRecord
) -> tuple[Reference | None, str]:
    """Return the reference in a release of its own model's evaluation, or why there is none.

    Raises:
        IntegrityError: it belongs to another model, or its evaluation is not in the release.
    """
    top = Path(release_dir)
    if f"{FOLDER}/{RECORD_NAME}" not in release.files:
        known = ", ".join(released_evaluations(top, release)) or "no evaluation either"
        return None, f"the release holds no {FOLDER}/{RECORD_NAME} ({known})"
    found = read_reference(top / FOLDER)
    require_released(found.record, release, str(top / FOLDER / RECORD_NAME))
    return found, ""


def require_released(record: DriftReference, release: ReleaseRecord, path: str) -> None:
    """Refuse a reference that is not of a release's own evaluation.

    Raises:
        IntegrityError: it is of another model, or its evaluation is not in the release.
    """
    if record.model_sha256 != release.model_sha256:
        raise IntegrityError(f"{path}: is of another model than the release")
    if record.evaluation.sha256 not in {file.sha256 for file in release.files.values()}:
        raise IntegrityError(
            f"{path}: its evaluation {record.evaluation.path} is not in the release",
            hint=f"name one whose digest is in {RECORD_FILE}",
        )


def _named_file(path: Path, evaluation: EvaluationRecord, name: str) -> Path:
    entry = evaluation.files.get(name)
    file = path.parent / entry.path if entry else None
    if entry is None or file is None or not file.is_file():
        raise EvaluationError(f"{path}: its {name} are not beside it")
    if sha256_file(file) != entry.sha256:
        raise EvaluationError(f"{file}: differs from the digest in {path}")
    return file


def _features(path: Path, dim: int) -> npt.NDArray[np.floating]:
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        features = stored if isinstance(stored, np.ndarray) else stored["features"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error
    if features.ndim != 2 or features.shape[1] != dim:
        raise EvaluationError(f"{path}: features of shape {features.shape}, expected [N, {dim}]")
    return np.asarray(features)


def _as_float16(features: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):  # what is infinite then is looked for
        return np.asarray(features, np.float16)


def _rate(evaluation: EvaluationRecord, key: str) -> FilterRate | None:
    metric = evaluation.metrics.get(key)
    if metric is None or metric.value is None or not math.isfinite(metric.value):
        return None
    info = evaluation.protocols.get(metric.protocol or "", {}).get("filter", {})
    return FilterRate(
        name=_NODE_NAMES.get(str(info.get("filter")), str(info.get("filter"))),
        stopped=round(metric.value * metric.n),
        n=metric.n,
    )
