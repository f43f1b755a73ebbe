"""Fréchet distance between Gaussians fitted to two feature sets, without a matrix square root.

|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)  (Dowson and Landau, 1982; Heusel et al., 2017)

The last trace is the nuclear norm of A^T B for any A A^T = S1 and B B^T = S2. With A and B the
centred features themselves it costs one SVD of an n x m matrix, and is exact where n < D makes the
covariances singular (there `sqrtm` is not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.seeding import numpy_generator
from modelops.metrics.intervals import Interval, jackknife_interval, normal_interval

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
DDOF = 1  # covariances divide by n - 1
PAIRINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))  # of quarters into two halves


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean [D] and covariance [D, D] (ddof 1), both float64, of n feature vectors."""

    mean: Floats
    covariance: Floats
    n: int


def features_to_statistics(features: npt.NDArray[np.floating]) -> Statistics:
    """Features [N, D] to mean and covariance in float64, ddof 1."""
    data = _check_features(features)
    mean = data.mean(axis=0)
    centred = data - mean
    return Statistics(mean, centred.T @ centred / (len(data) - DDOF), len(data))


def merge_statistics(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of the union of two disjoint sets (Chan et al., 1979)."""
    n = first.n + second.n
    delta = second.mean - first.mean
    scatter = (
        first.covariance * (first.n - DDOF)
        + second.covariance * (second.n - DDOF)
        + np.outer(delta, delta) * (first.n * second.n / n)
    )
    return Statistics(first.mean + delta * (second.n / n), scatter / (n - DDOF), n)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Fréchet distance from statistics, by one symmetric eigenvalue problem."""
    trace = _trace_of_root(first.covariance, second.covariance)
    return _assemble(
        first.mean - second.mean, np.trace(first.covariance), np.trace(second.covariance), trace
    )


def features_to_frechet_distance(
    first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]
) -> float:
    """Fréchet distance between features [N, D] and [M, D], by the cheapest exact form."""
    return _distance(_check_features(first), _check_features(second))


def frechet_interval(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    seed: int,
    groups: int = 40,
    confidence: float = 0.95,
) -> Interval:
    """Compute the distance with an interval for its mean over other images, as many of each.

    The interval shows how repeatable the distance is at these n and m when the images of *both*
    sets are drawn anew; for one fixed reference it is too wide. It does not cover the distance of
    the populations: the estimate is above that, far above where n < D, and so is the interval. For
    the value at infinite n see `frechet_infinity`.

    Both sets are cut at random into four parts. The parts, and the halves they make up, are sets
    that have no image in common, so that the spread of their distances is, without bias, the
    variance at a quarter and at half the size. If the variance at full size is a + b, a in 1/n and
    b in 1/n^2, then it is 2 a + 4 b for halves and 4 a + 16 b for quarters. A jackknife gives
    a + 2 b: that was a third to two thirds too much where n is not far above D, and its intervals
    held the value in up to 100 % of simulations. With a + b they held it in 91 to 97 %, because
    low distances come with low estimates of their variance; a + 1.5 b is used (93 to 99 % while it
    was chosen; bench/bench_coverage.py measures it on other seeds).

    (Resampling with replacement does not help: repeated images lower the rank of the covariances
    and raise every draw; percentile intervals held the value in 0 to 2 %.)

    Args:
        groups: halvings, a multiple of three or rounded to one; also the degrees of freedom.

    Raises:
        EvaluationError: fewer than four images of a set, or features that are not finite.
    """
    x, y = _check_features(first), _check_features(second)
    if x.shape[1] != y.shape[1]:
        raise EvaluationError(f"features of {x.shape[1]} and {y.shape[1]} dimensions")
    if min(len(x), len(y)) < 4:
        raise EvaluationError(f"{min(len(x), len(y))} images are too few for an interval")
    if max(len(x), len(y)) <= 4 * x.shape[1]:
        # A common rotation into the span of both sets leaves the distance as it is.
        x, y = _reduce(x, y)
    generators = [numpy_generator(seed, "frechet-parts", side) for side in (0, 1)]
    rounds = max(1, round(groups / 3))
    halved, quartered = [], []
    for _ in range(rounds):
        orders = [g.permutation(len(s)) for g, s in zip(generators, (x, y), strict=True)]
        halves, quarters = _divided(x, y, *orders)
        halved.append(float(((halves[:, 0] - halves[:, 1]) ** 2).mean() / 2))
        quartered.append(float(quarters.var(ddof=1)) if len(quarters) else np.nan)
    return normal_interval(
        _distance(x, y), parts_variance(halved, quartered),
        freedom=3 * rounds, confidence=confidence,
        method=f"{3 * rounds} random halvings of both sets, with a second-order term from quarters",
    )  # fmt: skip


def parts_variance(halved: Sequence[float], quartered: Sequence[float]) -> float:
    """Return the variance at full size from those of halves and quarters, see `frechet_interval`.

    Where quarters are NaN, there were too few images for them: the jackknife's rule.
    """
    half = float(np.mean(halved))
    second_order = float(np.clip((np.mean(quartered) - 2 * half) / 8, 0.0, half / 4))
    return half / 2 - (0.0 if np.isnan(second_order) else second_order / 2)


def _divided(x: Floats, y: Floats, order_x: Ints, order_y: Ints) -> tuple[Floats, Floats]:
    """Distances [3, 2] of the halves that quarters make up, and [4] of the quarters, if any."""
    parts = list(zip(np.array_split(order_x, 4), np.array_split(order_y, 4), strict=True))
    smallest = min(len(rows) for part in parts for rows in part)
    if smallest > x.shape[1]:  # covariances of quarters are summed up to those of halves
        made = [(features_to_statistics(x[i]), features_to_statistics(y[j])) for i, j in parts]

        def merged(pair: tuple[int, int]) -> float:
            sides = [merge_statistics(made[pair[0]][k], made[pair[1]][k]) for k in (0, 1)]
            return frechet_distance(*sides)

        quarters = np.array([frechet_distance(*each) for each in made])
        return np.array([[merged(pair) for pair in pairing] for pairing in PAIRINGS]), quarters

    def halves(a: int, b: int) -> float:
        rows = (np.concatenate([parts[a][side], parts[b][side]]) for side in (0, 1))
        return _distance(*(data[i] for data, i in zip((x, y), rows, strict=True)))

    found = np.array([[halves(*pair) for pair in pairing] for pairing in PAIRINGS])
    if smallest < 2:
        return found, np.zeros(0)
    return found, np.array([_distance(x[i], y[j]) for i, j in parts])


def distance_to(mean: Floats, factor: Floats) -> Callable[[Floats], float]:
    """Return the function from features [N, D] to their Fréchet distance to a fixed Gaussian.

    Args:
        mean: of the Gaussian, [D].
        factor: [R, D], factor^T factor being its covariance.
    """
    from scipy.linalg import eigvalsh, svdvals

    fixed = float((factor**2).sum())

    def distance(part: Floats) -> float:
        centred = (part - part.mean(axis=0)) / np.sqrt(len(part) - DDOF)
        product = centred @ factor.T
        if len(product) <= len(factor):
            trace = float(svdvals(product, check_finite=False).sum())
        else:
            values = eigvalsh(product.T @ product, check_finite=False, overwrite_a=True)
            trace = float(np.sqrt(np.clip(values, 0.0, None)).sum())
        return _assemble(part.mean(axis=0) - mean, float((centred**2).sum()), fixed, trace)

    return distance


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """Fréchet distance extrapolated to infinitely many images of the first set.

    Attributes:
        interval: the intercept, with its interval.
        slope: of the distance over 1 / images.
        points: (number of images, mean distance) that the line was fitted to.
    """

    interval: Interval
    slope: float
    points: tuple[tuple[int, float], ...]


def frechet_infinity(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    seed: int,
    splits: int = 4,
    groups: int = 10,
    confidence: float = 0.95,
) -> Extrapolation:
    """FD-infinity: the intercept of the distance over 1/n (Chong and Forsyth, CVPR 2020).

    The paper draws fifteen random subsets of 10 to 100 % of the images. Here the first set is cut
    into 1, 2, ... `splits` disjoint parts and distances of equal parts are averaged: every image
    counts as often as every other, and no draw adds noise. As in the paper the second set, the
    reference, stays as it is, and so does the bias that its own size brings.

    The interval is a delete-a-group jackknife of the whole extrapolation, over images of both sets.

    Raises:
        EvaluationError: too few images for so many parts, or features that are not finite.
    """
    x, y = _check_features(first), _check_features(second)
    if x.shape[1] != y.shape[1]:
        raise EvaluationError(f"features of {x.shape[1]} and {y.shape[1]} dimensions")
    groups = min(groups, len(x) // (2 * splits), len(y) // 2)
    if groups < 2:
        raise EvaluationError(
            f"{len(x)} and {len(y)} images are too few to extrapolate from {splits} parts"
        )
    if max(len(x), len(y)) <= 4 * x.shape[1]:
        x, y = _reduce(x, y)
    x = x[numpy_generator(seed, "frechet-infinity", 0).permutation(len(x))]
    y = y[numpy_generator(seed, "frechet-infinity", 1).permutation(len(y))]
    value, slope, points = _extrapolate(x, y, splits)
    leave_out = []
    for side, data in enumerate((x, y)):
        group = np.arange(len(data)) % groups  # each part loses as many as every other
        values = []
        for index in range(groups):
            kept = data[group != index]
            found = _extrapolate(kept, y, splits) if side == 0 else _extrapolate(x, kept, splits)
            values.append(found[0])
        leave_out.append(np.array(values))
    method = (
        f"intercept over 1/n of {splits} sizes, delete-a-group jackknife over images, "
        f"{groups} groups a side, t quantile"
    )
    interval = jackknife_interval(value, leave_out, confidence=confidence, method=method)
    return Extrapolation(interval, slope, points)


def _extrapolate(
    x: Floats, y: Floats, splits: int
) -> tuple[float, float, tuple[tuple[int, float], ...]]:
    """(intercept, slope, points) of the least-squares line of the distance over 1 / images."""
    mean, m = y.mean(axis=0), len(y)
    factor = (y - mean) / np.sqrt(m - DDOF)
    distance = distance_to(mean, covariance_rows(factor.T @ factor) if m > y.shape[1] else factor)
    inverse, distances, points = [], [], []
    for count in range(1, splits + 1):
        parts = np.array_split(x, count)
        inverse.append(float(np.mean([1.0 / len(part) for part in parts])))
        distances.append(float(np.mean([distance(part) for part in parts])))
        points.append((round(1.0 / inverse[-1]), distances[-1]))
    slope, intercept = np.polyfit(inverse, distances, 1)
    return float(intercept), float(slope), tuple(points)


def extrapolation_warning(found: Extrapolation, m: int, dimension: int) -> list[str]:
    """Return a warning if an extrapolation has too few images of either set behind it."""
    smallest = min(n for n, _ in found.points)
    notes = []
    if smallest <= dimension:
        notes.append(
            f"the smallest part has {smallest} images for {dimension} dimensions: the distance is "
            f"not yet linear in 1/n there, and the extrapolated value is still too high"
        )
    if m <= 2 * dimension:
        notes.append(
            f"the reference has {m} images for {dimension} dimensions, and its bias is not "
            f"extrapolated"
        )
    return notes


def rank_warning(n: int, m: int, dimension: int) -> list[str]:
    """Return a warning if a sample is smaller than the dimension."""
    if min(n, m) > dimension:
        return []
    return [
        f"n = {n} and {m} against {dimension} dimensions: the covariance is singular and the "
        f"distance biased upwards; compare only at the same n"
    ]


def _distance(x: Floats, y: Floats) -> float:
    n, m, dimension = len(x), len(y), x.shape[1]
    if dimension != y.shape[1]:
        raise EvaluationError(f"features of {dimension} and {y.shape[1]} dimensions")
    if n > dimension and m > dimension:
        return frechet_distance(features_to_statistics(x), features_to_statistics(y))
    from scipy.linalg import svdvals

    centred_x = (x - x.mean(axis=0)) / np.sqrt(n - DDOF)
    centred_y = (y - y.mean(axis=0)) / np.sqrt(m - DDOF)
    trace_x, trace_y = (centred_x**2).sum(), (centred_y**2).sum()
    if n > dimension:  # a factor of the large set's covariance stands in for its features
        centred_x = covariance_rows(centred_x.T @ centred_x)
    elif m > dimension:
        centred_y = covariance_rows(centred_y.T @ centred_y)
    trace = float(svdvals(centred_x @ centred_y.T, check_finite=False).sum())
    return _assemble(x.mean(axis=0) - y.mean(axis=0), trace_x, trace_y, trace)


def _assemble(difference: Floats, trace_x: float, trace_y: float, trace_root: float) -> float:
    value = float(difference @ difference + trace_x + trace_y - 2.0 * trace_root)
    if not np.isfinite(value):
        raise EvaluationError("the Fréchet distance is not finite; look for NaN images")
    return max(value, 0.0)


def _trace_of_root(first: Floats, second: Floats) -> float:
    """tr (S1 S2)^(1/2): the eigenvalues' roots of L^T S2 L, where S1 = L L^T, summed up.

    Products with a triangle take half the operations of whole ones (LAPACK's own form of both,
    dsygst, takes no more operations and 1.6 times as long in OpenBLAS), and no eigenvalue is needed
    once the matrix is tridiagonal.
    """
    from scipy.linalg import blas, eigvalsh, lapack

    # The transpose of a symmetric matrix is itself, already in the order that LAPACK wants.
    factor, singular = lapack.dpotrf(first.T, lower=1, clean=0)
    if singular:
        root = _root(first)
        inner = root @ second @ root
        values = eigvalsh((inner + inner.T) / 2, check_finite=False, overwrite_a=True)
        return float(np.sqrt(np.clip(values, 0.0, None)).sum())
    reduced = blas.dtrmm(1.0, factor, second.T, side=1, lower=1)
    reduced = blas.dtrmm(1.0, factor, reduced, side=0, lower=1, trans_a=1, overwrite_b=1)
    work = int(lapack.dsytrd_lwork(len(reduced), lower=1)[0])
    _, diagonal, beside, _, _ = lapack.dsytrd(reduced, lower=1, lwork=work, overwrite_a=1)
    return tridiagonal_trace_of_root(diagonal, beside)


def tridiagonal_trace_of_root(diagonal: Floats, beside: Floats, step: float = 0.6) -> float:
    """tr T^(1/2) of a positive semi-definite tridiagonal T, to rounding (1e-13 measured).

    From sqrt(x) = 1 / (2 pi) int log(1 + x / s) s^(-1/2) ds over s > 0: one determinant of
    1 + T / s for each node s, all nodes at once. With s = e^u the trapezoidal rule is off by the
    factor e^(-2 pi^2 / step) at any x. What is above the largest node follows from tr T and tr T^2;
    below the smallest nothing counts. A T that rounding has made indefinite goes to LAPACK, where
    negative eigenvalues count as 0.
    """
    from scipy.linalg import lapack

    squares = beside**2
    norm = float(np.abs(diagonal).max() + 2 * np.sqrt(squares.max(initial=0.0)))
    if norm == 0.0:
        return 0.0
    logs = np.arange(np.log(norm) - 78.0, np.log(norm) + 12.0, step)
    nodes = np.exp(logs)
    pivots = np.empty((len(diagonal), len(nodes)))  # of LDL^T of T + s, less s
    pivots[0] = diagonal[0]
    with np.errstate(all="ignore"):
        for row in range(1, len(diagonal)):
            pivots[row] = diagonal[row] - squares[row - 1] / (pivots[row - 1] + nodes)
        pivots /= nodes
    if not (pivots > -1.0).all():
        values = lapack.dsterf(diagonal, beside)[0] if len(beside) else diagonal
        return float(np.sqrt(np.clip(values, 0.0, None)).sum())
    total = float(np.log1p(pivots).sum(axis=0) @ np.exp(logs / 2))
    next_log = logs[-1] + step
    moments = float(diagonal.sum()), float(diagonal @ diagonal + 2 * squares.sum())
    total += moments[0] * np.exp(-next_log / 2) / -np.expm1(-step / 2)
    total -= moments[1] / 2 * np.exp(-1.5 * next_log) / -np.expm1(-1.5 * step)
    return float(total * step / (2 * np.pi))


def _root(covariance: Floats) -> Floats:
    """The symmetric root of a positive semi-definite matrix."""
    from scipy.linalg import eigh

    values, vectors = eigh(covariance, check_finite=False)
    root: Floats = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    return root


def covariance_rows(covariance: Floats) -> Floats:
    """R [D, D] with R^T R the covariance."""
    from scipy.linalg import LinAlgError, cholesky

    try:
        return np.asarray(cholesky(covariance, check_finite=False))
    except LinAlgError:  # singular
        return _root(covariance)


def _reduce(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Coordinates of both sets in an orthonormal basis of their common span, if that is smaller."""
    rows = len(x) + len(y)
    if rows >= x.shape[1]:
        return x, y
    triangle: Floats = np.asarray(np.linalg.qr(np.concatenate([x, y]).T, mode="r"))
    return np.ascontiguousarray(triangle.T[: len(x)]), np.ascontiguousarray(triangle.T[len(x) :])


def _check_features(features: npt.NDArray[np.floating]) -> Floats:
    data = np.asarray(features, np.float64)
    if data.ndim != 2 or len(data) < 2:
        raise EvaluationError(f"features of shape {data.shape}; at least two vectors are needed")
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data).all(axis=1)).sum())
        raise EvaluationError(f"{bad} of {len(data)} feature vectors are not finite")
    return data
