"""Nearest training pictures of samples, against those of real held-out pictures.

A sample close to a training picture proves nothing by itself: held-out pictures have close training
neighbours too. What counts is the difference to their base rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.errors import EvaluationError
from modelops.metrics.intervals import (
    Interval,
    bootstrap_median,
    bootstrap_median_difference,
    clopper_pearson,
)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Nearest training picture of each query."""

    distance: npt.NDArray[np.float64]  # [N] cosine distance, 1 - cosine, in [0, 2]
    index: npt.NDArray[np.int64]  # [N] row of the training features


def nearest_neighbours(
    queries: npt.NDArray[np.floating], training: npt.NDArray[np.floating]
) -> Neighbours:
    """Nearest row of training [M, D] by cosine for each of queries [N, D]; exact, through FAISS.

    Raises:
        EvaluationError: no training features, or a feature that is zero or not finite.
    """
    import faiss

    if len(training) == 0:
        raise EvaluationError("no training pictures to compare with")
    index = faiss.IndexFlatIP(training.shape[1])
    index.add(_unit(training))
    similarity, rows = index.search(_unit(queries), 1)
    return Neighbours(1.0 - similarity[:, 0].astype(np.float64), rows[:, 0].astype(np.int64))


def memorization_intervals(
    samples: Neighbours,
    heldout: Neighbours,
    *,
    seed: int,
    near_copy_cosine: float = 0.95,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """{"samples", "heldout", "gap"}: median distances and samples minus held-out;
    {"near_copies", "near_copies_heldout"}: rates of cosine >= near_copy_cosine."""
    limit = 1.0 - near_copy_cosine
    options = {"seed": seed, "resamples": resamples}
    return {
        "samples": bootstrap_median(samples.distance, purpose="nearest/samples", **options),
        "heldout": bootstrap_median(heldout.distance, purpose="nearest/heldout", **options),
        "gap": bootstrap_median_difference(
            samples.distance, heldout.distance, purpose="nearest/gap", **options
        ),
        "near_copies": _rate(samples.distance <= limit),
        "near_copies_heldout": _rate(heldout.distance <= limit),
    }


def _rate(hits: npt.NDArray[np.bool_]) -> Interval:
    return clopper_pearson(int(hits.sum()), len(hits))


def _unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    data = np.ascontiguousarray(vectors, np.float32)
    lengths = np.linalg.norm(data, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise EvaluationError("a feature vector is zero or not finite")
    return np.ascontiguousarray(data / lengths)
