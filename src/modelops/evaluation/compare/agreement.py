"""Agreement of the images of two evaluations, to check that the gated model is the served one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, ModelopsError
from modelops.base.files import sha256_file
from modelops.base.images import read_image
from modelops.evaluation.per_image import measured_image, read_per_image
from modelops.evaluation.prompts import image_name
from modelops.evaluation.samples import COMPLETE
from modelops.metrics.alignment import per_prompt
from modelops.metrics.features import Lite0Extractor
from modelops.metrics.images import SSIM_WINDOW, Lpips, psnr, ssim
from modelops.metrics.intervals import Interval, bootstrap_mean
from modelops.metrics.multiple import bounded_rate
from modelops.metrics.protocol import protocol_id
from modelops.records.base import Measurement
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
PAIRWISE_KEYS = (
    "pair_identical_rate", "pair_psnr", "pair_ssim", "pair_lpips", "pair_cosine_lite0",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Agreement:
    """Differences between two evaluations' images of the same prompts and seeds.

    Attributes:
        n: images compared.
        identical: images without any difference.
        largest: largest difference of a pixel, in grey levels 0 to 255.
    """

    n: int
    identical: int
    largest: int


@dataclass(frozen=True, slots=True)
class ImagePair:
    """Pair of images of one prompt and seed.

    Attributes:
        rows: place of each among the images that its evaluation made.
    """

    prompt: str
    seed: int
    first: Path
    second: Path
    rows: tuple[int, int]

    def read(self) -> tuple[Image, Image]:
        return read_image(self.first), read_image(self.second)


def compare_images(one: str | Path, other: str | Path) -> Agreement:
    """Compare the images that two evaluations share.

    Args:
        one, other: evaluation records that still have their samples beside them.

    Raises:
        EvaluationError: they have no image in common, one is gone, or two differ in size.
        IntegrityError: an image is not the one that was measured.
    """
    differences = []
    for pair in pair_images(one, other):
        first, second = pair.read()
        if first.shape != second.shape:
            raise EvaluationError(f"{pair.second.name}: {first.shape} and {second.shape}")
        differences.append(int(np.abs(first.astype(np.int16) - second).max()))
    return Agreement(len(differences), differences.count(0), max(differences))


def pair_images(one: str | Path, other: str | Path) -> list[ImagePair]:
    """Pair the images of the same prompt and seed of both evaluations, in the first's order.

    Args:
        one, other: evaluation records with their samples and per-image values beside them.

    Raises:
        EvaluationError: they have no image in common, or a file is gone.
        IntegrityError: an image is not the one that was measured.
        UsageError: a file is not an evaluation record.
    """
    ours, theirs = _made_images(Path(one)), _made_images(Path(other))
    pairs = [
        ImagePair(prompt, seed, path, theirs[prompt, seed][1], (row, theirs[prompt, seed][0]))
        for (prompt, seed), (row, path) in ours.items()
        if (prompt, seed) in theirs
    ]
    if not pairs:
        raise EvaluationError(f"{one} and {other} have no image of the same prompt and seed")
    return pairs


def pairwise_measures(
    record_a: str | Path,
    record_b: str | Path,
    *,
    lpips_weights: Path | None = None,
    lpips_net: str = "alex",
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Measurement]:
    """Measure how alike two evaluations' images are, prompts resampled.

    Images of the same prompts and seeds are compared.

    `pair_identical_rate` (bytes equal), `pair_psnr` in dB over the pairs that differ (it is
    infinite for the others), `pair_ssim`, `pair_lpips`, and `pair_cosine_lite0`. Each is a mean
    over prompts, or the reason why it cannot be measured.

    Args:
        record_a, record_b: paths of evaluation records, with samples beside them.
        lpips_weights, lpips_net: torchvision's weights of LPIPS's backbone, and which it is.

    Raises:
        EvaluationError: the evaluations have no image in common, or a file beside them is gone.
        IntegrityError: an image is not the one that was measured.
        UsageError: a file is not an evaluation record.
        MissingWeightsError: the named weights cannot be used.
    """
    pairs = pair_images(record_a, record_b)
    lpips = Lpips(lpips_weights, lpips_net) if lpips_weights is not None else None
    wanted: dict[str, Callable[[Image, Image], float]] = {"pair_psnr": psnr, "pair_ssim": ssim}
    if lpips is not None:
        wanted["pair_lpips"] = lambda a, b: float(lpips.distances([a], [b])[0])
    values, reasons = _pair_values(pairs, wanted)
    _, owner = np.unique([pair.prompt for pair in pairs], return_inverse=True)
    identical = np.array(values.pop("identical"))
    common = {"pairs": len(pairs), "paired by": "prompt and seed"}

    def mean(cells: Floats, key: str) -> Interval:
        return bootstrap_mean(cells, seed=seed, resamples=resamples, purpose=f"agreement/{key}")

    found = {
        "pair_identical_rate": _measurement(
            bounded_rate(per_prompt(identical, owner)), len(pairs), {"metric": "identical pixels"},
            common, unit="rate", better=True,
        )
    }  # fmt: skip
    differs = identical == 0
    protocols: dict[str, dict[str, Any]] = {
        "pair_psnr": {"metric": "psnr", "range": 255, "pairs": "those that differ"},
        "pair_ssim": {"metric": "ssim", "window": SSIM_WINDOW, "sigma": 1.5, "range": 255},
        "pair_lpips": dict(lpips.protocol) if lpips else {},
    }
    units = {"pair_psnr": "dB", "pair_ssim": "SSIM", "pair_lpips": "LPIPS"}
    for key, each in values.items():
        rows = differs if key == "pair_psnr" else np.ones(len(pairs), bool)
        if not rows.any():
            reasons[key] = f"all {len(pairs)} pairs are identical"
            continue
        interval = mean(per_prompt(np.array(each)[rows], owner[rows]), key)
        found[key] = _measurement(
            interval, int(rows.sum()), protocols[key], common,
            unit=units[key], better=key != "pair_lpips",
        )  # fmt: skip
    try:
        cosines = _lite0_cosines(Path(record_a), Path(record_b), pairs)
        found["pair_cosine_lite0"] = _measurement(
            mean(per_prompt(cosines, owner), "pair_cosine_lite0"), len(pairs),
            {"metric": "cosine", "features": Lite0Extractor().protocol}, common,
            unit="cosine", better=True,
        )  # fmt: skip
    except ModelopsError as error:
        reasons["pair_cosine_lite0"] = error.message
    if lpips is None:
        reasons["pair_lpips"] = "no weights of LPIPS's backbone were given"
    return found | {key: Measurement.missing(reason) for key, reason in reasons.items()}


def _pair_values(
    pairs: Sequence[ImagePair], wanted: dict[str, Callable[[Image, Image], float]]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return ({measure: value of each pair}, {measure: why not}); "identical" is 0 or 1."""
    values: dict[str, list[float]] = {"identical": [], **{key: [] for key in wanted}}
    reasons: dict[str, str] = {}
    for pair in pairs:
        first, second = pair.read()
        values["identical"].append(float(np.array_equal(first, second)))
        for key, measure in wanted.items():
            if key not in reasons:
                try:
                    values[key].append(measure(first, second))
                except ModelopsError as error:
                    reasons[key] = error.message
    return {key: found for key, found in values.items() if key not in reasons}, reasons


def _lite0_cosines(one: Path, other: Path, pairs: Sequence[ImagePair]) -> Floats:
    """Compute the cosine of the Lite0 features of each pair [N]."""
    ours = _features(one, [pair.rows[0] for pair in pairs], (pair.first for pair in pairs))
    theirs = _features(other, [pair.rows[1] for pair in pairs], (pair.second for pair in pairs))
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise EvaluationError("an image has features that are zero or not finite")
    return np.asarray((ours * theirs).sum(axis=1) / lengths)


def _features(record_path: Path, rows: Sequence[int], images: Iterable[Path]) -> Floats:
    """Return Lite0 features [N, D] of some made images: those beside the record, or new ones."""
    record = read_record(record_path, EvaluationRecord)
    entry = record.files.get("features")
    path = record_path.parent / entry.path if entry else None
    if entry and path and path.is_file() and sha256_file(path) == entry.sha256:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            stored = stored["features"] if "features" in stored else np.zeros((0, 0))
        features = stored
        if len(features) > max(rows) and features.shape[1:] == (Lite0Extractor().dim,):
            return np.asarray(features[list(rows)], np.float64)
    made = Lite0Extractor().images_to_features(read_image(image) for image in images)
    return np.asarray(made, np.float64)


def _measurement(
    interval: Interval,
    n: int,
    protocol: dict[str, Any],
    details: dict[str, Any],
    *,
    unit: str,
    better: bool,
) -> Measurement:
    """Make a measurement with its protocol in `details`, as no record holds it."""
    plain = {key: value for key, value in protocol.items() if not isinstance(value, dict | list)}
    return Measurement(
        value=interval.value, low=interval.low, high=interval.high, method=interval.method, n=n,
        unit=unit, higher_is_better=better, protocol=protocol_id(protocol),
        details={**plain, **details},
    )  # fmt: skip


def _made_images(record_path: Path) -> dict[tuple[str, int], tuple[int, Path]]:
    """Return {(prompt, seed): (row among the images that were made, PNG)}."""
    record = read_record(record_path, EvaluationRecord)
    rows = read_per_image(record_path, record)
    folder = _latest_samples(record_path)
    is_folder = record.source.kind == "folder"
    found: dict[tuple[str, int], tuple[int, Path]] = {}
    made = 0
    for place, row in enumerate(rows):
        if row["failure"] is not None:
            continue
        name = image_name(row["prompt"], row["seed"], place * is_folder)
        path = measured_image(record_path, row, name, folder)
        found.setdefault((row["prompt"], row["seed"]), (made, path))
        made += 1
    return found


def _latest_samples(record: Path) -> Path:
    done = (record.with_suffix("") / "samples").glob(f"*/{COMPLETE}")
    folders = sorted(done, key=lambda path: path.stat().st_mtime_ns)
    if not folders:
        raise EvaluationError(f"{record}: its samples are gone", hint="run `modelops eval` again")
    return folders[-1].parent
