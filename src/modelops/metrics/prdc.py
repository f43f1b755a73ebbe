"""Precision, recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.metrics.intervals import Interval, bootstrap_mean, clopper_pearson

Floats = npt.NDArray[np.float64]


def prdc(
    real: npt.NDArray[np.floating],
    generated: npt.NDArray[np.floating],
    *,
    seed: int,
    neighbours: int = 5,
    resamples: int = 2000,
    block: int = 1024,
) -> dict[str, Interval]:
    """{"precision", "recall", "density", "coverage"} of generated against real features [N, D].
    Features are taken `block` rows at a time, so that they may lie in a file.

    A sphere around each point reaches to its k-th nearest neighbour in its own set, itself not
    counted. Intervals are over the images whose membership is averaged, the spheres being held
    fixed: exact binomial, and BCa bootstrap for density.

    Raises:
        EvaluationError: a set has no more than `neighbours` images.
    """
    x, y = np.asarray(real), np.asarray(generated)
    if min(len(x), len(y)) <= neighbours:
        raise EvaluationError(
            f"{min(len(x), len(y))} images are too few for {neighbours} nearest neighbours"
        )
    radius_real = _radii(x, neighbours, block)
    radius_generated = _radii(y, neighbours, block)

    in_real = np.zeros(len(y))  # number of real spheres that hold each generated image
    in_generated = np.zeros(len(x), bool)
    covered = np.zeros(len(x), bool)
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        for other in range(0, len(y), block):
            columns = slice(other, other + block)
            distances = squared_distances(x[rows], y[columns])
            inside = distances < radius_real[rows, None]
            in_real[columns] += inside.sum(axis=0)
            covered[rows] |= inside.any(axis=1)
            in_generated[rows] |= (distances < radius_generated[None, columns]).any(axis=1)

    fixed = f"k = {neighbours}, spheres fixed"
    results = {}
    for name, hits in (("precision", in_real > 0), ("recall", in_generated), ("coverage", covered)):
        rate = clopper_pearson(int(hits.sum()), len(hits))
        results[name] = Interval(rate.value, rate.low, rate.high, f"{rate.method}; {fixed}")
    density = bootstrap_mean(
        in_real / neighbours, seed=seed, resamples=resamples, purpose="prdc/density"
    )
    results["density"] = Interval(
        density.value, density.low, density.high, f"{density.method}; {fixed}"
    )
    return results


def squared_distances(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> Floats:
    """Squared Euclidean distances [N, M] of vectors [N, D] and [M, D], float64, never below 0."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None]
    return np.asarray(np.clip(squares - 2.0 * (a @ b.T), 0.0, None))


def _radii(points: npt.NDArray[np.floating], neighbours: int, block: int) -> Floats:
    """Squared distance from each point to its k-th nearest other point, [N]."""
    found = []
    for start in range(0, len(points), block):
        rows = points[start : start + block]
        nearest = np.empty((len(rows), 0))  # so far
        for other in range(0, len(points), block):
            distances = squared_distances(rows, points[other : other + block])
            if other == start:
                np.fill_diagonal(distances, np.inf)  # rounding must not make it other than itself
            nearest = np.concatenate([nearest, distances], axis=1)
            if nearest.shape[1] > neighbours:
                nearest = np.partition(nearest, neighbours - 1, axis=1)[:, :neighbours]
        found.append(nearest.max(axis=1))
    return np.concatenate(found)
