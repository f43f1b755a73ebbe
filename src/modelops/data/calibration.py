"""Hits and false alarms of a similarity threshold, measured on the given images.

A cosine of 0.95 means something else for every encoder and corpus. Positives are images against
light alterations of themselves; hard negatives are images against their nearest neighbour from
another metadata group.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from modelops.base.seeding import numpy_generator
from modelops.data.embeddings import Embeddings, Encoder
from modelops.data.manifest import Manifest
from modelops.data.neighbours import Pairs, normalize_rows
from modelops.data.rates import count_to_rate
from modelops.records.base import Measurement

SAMPLED = 64  # images altered, at most; a quarter of a small corpus, at least 16
MAX_FALSE_RATE = 0.05  # of hard negatives, at the suggested threshold
Image = npt.NDArray[np.uint8]


def shift(image: Image) -> Image:
    """Moved by 1/32 of its size to the right and down, edges repeated."""
    step = max(1, round(min(image.shape[:2]) / 32))
    padded = np.pad(image, ((step, 0), (step, 0), (0, 0)), mode="edge")
    return padded[: image.shape[0], : image.shape[1]]


def compress(image: Image) -> Image:
    """Through JPEG at quality 85."""
    from PIL import Image as Pictures

    buffer = io.BytesIO()
    Pictures.fromarray(image).save(buffer, "JPEG", quality=85)
    return np.array(Pictures.open(buffer).convert("RGB"))


def shrink(image: Image) -> Image:
    """Shrink an image to three quarters of its size."""
    from PIL import Image as Pictures

    height, width = image.shape[:2]
    size = (max(1, width * 3 // 4), max(1, height * 3 // 4))
    return np.array(Pictures.fromarray(image).resize(size, Pictures.Resampling.LANCZOS))


def darken(image: Image) -> Image:
    """Darken an image to 92 % of its brightness."""
    return np.rint(image * 0.92).astype(np.uint8)


ALTERATIONS: dict[str, Callable[[Image], Image]] = {
    "shift": shift, "jpeg": compress, "resize": shrink, "brightness": darken,
}  # fmt: skip


def calibrate_threshold(
    manifest: Manifest,
    embedded: Embeddings,
    unit: npt.NDArray[np.float32],
    candidates: Pairs,
    encoder: Encoder,
    *,
    threshold: float,
    seed: int,
) -> tuple[dict[str, Measurement], list[str]]:
    """Measure a threshold on at most 64 sampled images; returns (measurements, warnings).

    Measurements: recall_shift, recall_jpeg, recall_resize, recall_brightness, recall (all four),
    hard_negative_rate (nearest of another group at or above the threshold), precision_balanced
    (recall / (recall + hard_negative_rate): precision were positives and hard negatives equally
    many), across_groups (share of candidate pairs whose members belong to different groups) and
    suggested_threshold (the least cosine that passes at most 5 % of hard negatives).
    """
    samples = embedded.samples
    draws = numpy_generator(seed, "dedup calibration")
    wanted = min(SAMPLED, max(16, len(samples) // 4))
    taken = np.sort(draws.permutation(len(samples))[:wanted])
    images = [manifest.read_image(samples[index]) for index in taken]
    results: dict[str, Measurement] = {}
    hits = 0
    for name, alter in ALTERATIONS.items():
        altered = normalize_rows(encoder.encode(alter(image) for image in images))
        found = int(((altered * unit[taken]).sum(1) >= threshold).sum())
        hits += found
        results[f"recall_{name}"] = count_to_rate(found, len(taken), higher_is_better=True)
    recall = results["recall"] = count_to_rate(
        hits, len(taken) * len(ALTERATIONS), higher_is_better=True,
        details={"alterations": ", ".join(ALTERATIONS)},
    )  # fmt: skip
    groups = np.array([sample.group for sample in samples])
    similar = unit[taken] @ unit.T
    similar[groups[taken][:, None] == groups[None, :]] = -1.0
    nearest = similar.max(axis=1)
    nearest = nearest[nearest > -1.0]
    false = count_to_rate(
        int((nearest >= threshold).sum()), len(nearest), higher_is_better=False,
        details={"median_cosine": round(float(np.median(nearest)), 4) if len(nearest) else None},
    )  # fmt: skip
    results["hard_negative_rate"] = false
    results["precision_balanced"] = _balanced_precision(recall, false)
    across = int((groups[candidates.first] != groups[candidates.second]).sum())
    results["across_groups"] = count_to_rate(across, len(candidates), higher_is_better=False)
    results["suggested_threshold"] = _suggest(nearest, seed)
    warnings = []
    if false.value is not None and false.value > MAX_FALSE_RATE:
        warnings.append(
            f"cosine {threshold} with {encoder.name} takes {false.value:.0%} of the nearest "
            "images of other groups for duplicates; see suggested_threshold"
        )
    if not any(sample.extra.get("group") for sample in samples):
        warnings.append("the manifest has no group column: hard negatives may be real duplicates")
    return results, warnings


def _balanced_precision(recall: Measurement, false: Measurement) -> Measurement:
    """recall / (recall + false rate), with the bounds that the two intervals allow."""
    if not recall.value or recall.low is None or recall.high is None:
        return Measurement.missing("no altered image was found again")
    if false.value is None or false.low is None or false.high is None:
        return Measurement.missing("there are no images of other groups")
    low = recall.low / (recall.low + false.high)
    high = recall.high / (recall.high + false.low)
    return Measurement(
        value=recall.value / (recall.value + false.value), low=low, high=high, n=recall.n,
        method="ratio of Clopper-Pearson rates", higher_is_better=True,
    )  # fmt: skip


def _suggest(nearest: npt.NDArray[np.float32], seed: int) -> Measurement:
    """The 95th percentile of hard negatives' cosines, with a bootstrap interval."""
    if not len(nearest):
        return Measurement.missing("there are no images of other groups")
    values = nearest.astype(np.float64)
    draws = numpy_generator(seed, "dedup suggestion").integers(0, len(values), (1000, len(values)))
    quantiles = np.quantile(values[draws], 1 - MAX_FALSE_RATE, axis=1)
    value = float(np.quantile(values, 1 - MAX_FALSE_RATE))
    low, high = np.quantile(quantiles, [0.025, 0.975])
    return Measurement(
        value=value, low=min(float(low), value), high=max(float(high), value), n=len(values),
        method="95th percentile of hard negatives, bootstrap", unit="cosine",
    )  # fmt: skip
