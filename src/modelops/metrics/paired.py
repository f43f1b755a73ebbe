"""Differences between two sources on the same prompts and the same real pictures.

Both sources answer the same prompts and are measured against the same pictures, so what is hard for
one is hard for the other and most of the noise is common to both. Leaving out or resampling the
same prompts on both sides cancels it; adding the two intervals does not.

Every difference is second minus first. `p` is two-sided, for "there is no difference".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.errors import EvaluationError
from modelops.metrics.frechet import (
    DDOF,
    Statistics,
    features_to_frechet_distance,
    features_to_statistics,
    frechet_distance,
)
from modelops.metrics.intervals import bootstrap_mean
from modelops.seeding import numpy_generator

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
OnProgress = Callable[[int, int], None]
SUBSET = 0.4  # share of prompts and pictures in each subset of `paired_prdc`
MAX_DISTANCES = 100_000_000  # of one matrix of float64, 0.8 GB


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Second minus first with its interval.

    Attributes:
        first, second: the two values, computed anew.
        p: two-sided p-value of no difference.
        n: prompts that were paired.
        variance: of the difference, the part that more prompts make smaller.
        fixed_variance: the part that comes from the reference pictures.
        grows_together: the two parts are not known apart; `variance` holds both.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    method: str
    n: int
    variance: float
    fixed_variance: float = 0.0
    grows_together: bool = False


def paired_mean(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    purpose: str = "paired",
) -> PairedDifference:
    """Difference of means of one value per prompt [P]: BCa bootstrap over prompts, paired t test.

    Raises:
        EvaluationError: fewer than two prompts, or different prompts.
    """
    a, b = _same_length(first, second)
    difference = b - a
    made = bootstrap_mean(
        difference, seed=seed, resamples=resamples, confidence=confidence, purpose=purpose
    )
    variance = float(difference.var(ddof=1)) / len(difference)
    p, _ = _t_test(made.value, variance, len(difference) - 1)
    return PairedDifference(
        float(a.mean()), float(b.mean()), made.value, made.low, made.high, p,
        f"paired over prompts: {made.method}; t test", len(difference), variance,
    )  # fmt: skip


def paired_median(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    owner: Ints,
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    purpose: str = "paired",
) -> PairedDifference:
    """Difference of the medians of values [N]: percentile bootstrap, whole prompts resampled.

    Args:
        owner: prompt of each value, [N], the same for both.
    """
    a, b = _same_length(first, second)
    order = np.argsort(owner, kind="stable")
    a, b = a[order], b[order]
    _, starts, counts = np.unique(owner[order], return_index=True, return_counts=True)
    if len(counts) < 2:
        raise EvaluationError("fewer than two prompts in common")
    generator = numpy_generator(seed, purpose)
    draws = np.empty(resamples)
    for draw in range(resamples):
        chosen = generator.integers(0, len(counts), len(counts))
        lengths = counts[chosen]
        ends = np.cumsum(lengths)
        rows = np.repeat(starts[chosen] - (ends - lengths), lengths) + np.arange(ends[-1])
        draws[draw] = np.median(b[rows]) - np.median(a[rows])
    value = float(np.median(b) - np.median(a))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return PairedDifference(
        float(np.median(a)), float(np.median(b)), value,
        min(float(low), value), max(float(high), value),
        min(1.0, 2.0 * (beyond + 1) / (resamples + 1)),
        f"paired over prompts: percentile bootstrap of both medians, {resamples} resamples",
        len(counts), float(draws.var(ddof=1)),
    )  # fmt: skip


def paired_rate(
    first: npt.NDArray[np.integer],
    second: npt.NDArray[np.integer],
    images: npt.NDArray[np.integer],
    *,
    confidence: float = 0.95,
) -> PairedDifference:
    """Difference of two rates over the same images, clustered by prompt.

    The interval adds one prompt to each kind of disagreement (Bonett and Price, 2012), so that it
    has a width even where nobody disagrees. The test flips the sign of each prompt's difference in
    every way and is exact; with one image a prompt it is McNemar's exact test.

    Args:
        first, second: images of each prompt that count, [P].
        images: images of each prompt, the same for both, [P].
    """
    from scipy.stats import norm

    a, b, total = (np.asarray(v, np.int64) for v in (first, second, images))
    if not len(a) == len(b) == len(total) or len(a) < 2:
        raise EvaluationError("fewer than two prompts in common")
    prompts, n = len(total), int(total.sum())
    difference = (b - a) * (prompts / n)
    padded = np.concatenate([difference, [1.0, -1.0]])
    error = float(np.sqrt(padded.var() / len(padded)))
    half, centre = float(norm.ppf(0.5 + confidence / 2)) * error, float(padded.mean())
    value = float(difference.mean())
    return PairedDifference(
        float(a.sum() / n), float(b.sum() / n), value,
        max(-1.0, min(centre - half, value)), min(1.0, max(centre + half, value)),
        exact_sign_flip_p(b - a),
        "paired over prompts: Bonett-Price; "
        + ("exact McNemar test" if n == prompts else "exact sign-flip test"),
        prompts, error * error,
    )  # fmt: skip


def exact_sign_flip_p(differences: npt.NDArray[np.integer]) -> float:
    """Exact two-sided p-value that the sum of these integers is as far from 0 when signs are random

    The distribution of the sum is built up by convolution, so nothing is sampled.
    """
    sizes = np.abs(differences[differences != 0])
    if len(sizes) == 0:
        return 1.0
    distribution = np.ones(1)  # of how much counts with a plus
    for size in sizes:
        grown = np.zeros(len(distribution) + size)
        grown[: len(distribution)] += distribution / 2
        grown[size:] += distribution / 2
        distribution = grown
    sums = 2 * np.arange(len(distribution)) - int(sizes.sum())
    extreme = np.abs(sums) >= abs(int(differences.sum()))
    return min(1.0, float(distribution[extreme].sum()))


def paired_frechet(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    reference: npt.NDArray[np.floating],
    *,
    owner_first: Ints,
    owner_second: Ints,
    seed: int,
    groups: int = 40,
    confidence: float = 0.95,
    on_progress: OnProgress | None = None,
) -> PairedDifference:
    """Difference of the Fréchet distances of features [N, D] and [N', D] to a reference [M, D].

    A delete-a-group jackknife: a group of prompts is left out of both sides, then a group of
    reference pictures out of both distances. Its 95 % interval held 0 for equal sources in 95 to
    98 % of simulations, and in 98 to 100 % where the sources are as good as the reference or there
    are fewer images than dimensions: noise that both parts see is counted twice, on the safe side.

    Args:
        owner_first, owner_second: prompt of each image, [N] and [N'].
    """
    real = _checked(reference)
    sides = _FrechetSide(_checked(first), real), _FrechetSide(_checked(second), real)
    owners, prompts = (owner_first, owner_second), np.union1d(owner_first, owner_second)
    if min(len(prompts), len(real)) < 4:
        raise EvaluationError(f"{min(len(prompts), len(real))} prompts or pictures are too few")
    none = np.zeros(0, np.int64)
    plans = [
        np.array_split(
            numpy_generator(seed, "paired-groups", side).permutation(count), min(groups, count // 2)
        )
        for side, count in enumerate((len(prompts), len(real)))
    ]
    left_out: list[list[float]] = [[], []]
    total = sum(map(len, plans))
    for part, plan in enumerate(plans):
        for group in plan:
            rows, gone = [none, none], group
            if part == 0:
                rows = [np.flatnonzero(np.isin(owner, prompts[group])) for owner in owners]
                gone = none
            left_out[part].append(sides[1].without(rows[1], gone) - sides[0].without(rows[0], gone))
            if on_progress:
                on_progress(len(left_out[0]) + len(left_out[1]), total)
    parts = [
        (np.array(values), np.array([len(group) for group in plan]))
        for values, plan in zip(left_out, plans, strict=True)
    ]
    return _jackknife(
        sides[0].without(none, none), sides[1].without(none, none), parts[0], parts[1],
        n=len(prompts), confidence=confidence,
        method=f"paired over prompts: delete-a-group jackknife, {len(plans[0])} groups of prompts "
        f"and {len(plans[1])} of reference pictures, t quantile",
    )  # fmt: skip


def paired_prdc(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    reference: npt.NDArray[np.floating],
    *,
    owner_first: Ints,
    owner_second: Ints,
    seed: int,
    neighbours: int = 5,
    draws: int = 100,
    confidence: float = 0.95,
    on_progress: OnProgress | None = None,
) -> dict[str, PairedDifference]:
    """Differences of precision, recall, density and coverage, by subsampling (Politis and Romano,
    1994): the spread of the difference over random subsets of prompts and pictures, scaled up.

    Nearest neighbours are not smooth in single images: leaving out small groups gives intervals
    twice as wide as need be, and holding the spheres fixed gives ones that are too narrow (held 0
    for equal sources in 100 % and 82 % of simulations, subsets of 40 % in 92 to 98 %).

    Raises:
        EvaluationError: too few images, or so many that their distances do not fit into memory.
    """
    from scipy.stats import norm

    real = _checked(reference)
    sides = (
        _PrdcSide(_checked(first), real, neighbours),
        _PrdcSide(_checked(second), real, neighbours),
    )
    prompts = np.union1d(owner_first, owner_second)
    none = np.zeros(0, np.int64)
    kept = [int(SUBSET * len(prompts)), int(SUBSET * len(real))]
    if min(kept) <= 2 * neighbours:
        raise EvaluationError(f"{min(len(prompts), len(real))} prompts or pictures are too few")
    generator = numpy_generator(seed, "paired-subsets")
    spread = np.empty((draws, 4))
    for draw in range(draws):
        away = generator.permutation(prompts)[kept[0] :]
        gone = generator.permutation(len(real))[kept[1] :]
        spread[draw] = sides[1].without(np.flatnonzero(np.isin(owner_second, away)), gone) - sides[
            0
        ].without(np.flatnonzero(np.isin(owner_first, away)), gone)
        if on_progress:
            on_progress(draw + 1, draws)
    whole = np.array([side.without(none, none) for side in sides])
    results = {}
    for k, name in enumerate(("precision", "recall", "density", "coverage")):
        value = float(whole[1, k] - whole[0, k])
        variance = float(spread[:, k].var(ddof=1)) * SUBSET / (1 - SUBSET)
        error = float(np.sqrt(variance))
        half = float(norm.ppf(0.5 + confidence / 2)) * error
        p = 2.0 * float(norm.sf(abs(value) / error)) if error > 0 else float(value == 0)
        results[name] = PairedDifference(
            float(whole[0, k]), float(whole[1, k]), value, value - half, value + half, p,
            f"paired over prompts: subsets of {SUBSET:.0%} of prompts and reference pictures, "
            f"{draws} draws", len(prompts), variance, grows_together=True,
        )  # fmt: skip
    return results


def paired_kernel(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    reference: npt.NDArray[np.floating],
    *,
    owner_first: Ints,
    owner_second: Ints,
    confidence: float = 0.95,
) -> PairedDifference:
    """Difference of the kernel distances (cubic, unbiased): leaves out one prompt, or one picture.

    All leave-one-out values follow from row sums of the kernel matrices.
    """
    a, b, r = (_checked(features, 3) for features in (first, second, reference))
    prompts = np.union1d(owner_first, owner_second)
    places = [np.searchsorted(prompts, owner) for owner in (owner_first, owner_second)]
    made = [
        _kernel_side(x, r, place, len(prompts)) for x, place in zip((a, b), places, strict=True)
    ]
    return _jackknife(
        made[0][0], made[1][0],
        (made[1][1] - made[0][1], np.ones(len(prompts), np.int64)),
        (made[1][2] - made[0][2], np.ones(len(r), np.int64)),
        n=len(prompts), confidence=confidence,
        method="paired over prompts: delete-one jackknife over prompts and reference pictures",
    )  # fmt: skip


def _jackknife(
    first: float,
    second: float,
    prompts: tuple[Floats, Ints],
    reference: tuple[Floats, Ints],
    *,
    n: int,
    confidence: float,
    method: str,
) -> PairedDifference:
    """From the differences without each group of prompts, and of pictures, and the groups' sizes.

    Degrees of freedom are Welch's (Satterthwaite, 1946).
    """
    value = second - first
    own, freedom = _jackknife_variance(value, *prompts)
    fixed, fixed_freedom = _jackknife_variance(value, *reference)
    shares = own**2 / freedom + fixed**2 / fixed_freedom
    p, half = _t_test(
        value, own + fixed, (own + fixed) ** 2 / shares if shares > 0 else 1.0, confidence
    )
    return PairedDifference(
        first, second, value, value - half, value + half, p, method, n, own, fixed
    )


def _jackknife_variance(value: float, left_out: Floats, sizes: Ints) -> tuple[float, int]:
    """(variance, degrees of freedom) from leaving out groups of any sizes (Busing et al., 1999)."""
    count, total = len(sizes), int(sizes.sum())
    ratio = total / sizes
    pseudo = ratio * value - (ratio - 1) * left_out
    centre = float(count * value - ((1 - sizes / total) * left_out).sum())
    return float(((pseudo - centre) ** 2 / (ratio - 1)).mean()), count - 1


def _t_test(
    value: float, variance: float, freedom: float, confidence: float = 0.95
) -> tuple[float, float]:
    """(two-sided p-value, half-width of the interval)"""
    from scipy.stats import t

    error = float(np.sqrt(variance))
    if error <= 1e-12 * abs(value):  # one and the same difference everywhere
        return (1.0 if value == 0 else 0.0), 0.0
    p = 2.0 * float(t.sf(abs(value) / error, freedom))
    return p, float(t.ppf(0.5 + confidence / 2.0, freedom)) * error


class _FrechetSide:
    """Fréchet distance of one source to the reference, with rows left out."""

    def __init__(self, generated: Floats, real: Floats) -> None:
        self._sets = generated, real
        self._full = min(len(generated), len(real)) > 1.1 * generated.shape[1]
        if self._full:
            self._moments = [_Moments(generated), _Moments(real)]

    def without(self, rows: Ints, gone: Ints) -> float:
        if self._full:
            first, second = (
                moments.without(left)
                for moments, left in zip(self._moments, (rows, gone), strict=True)
            )
            return frechet_distance(first, second)
        x, y = (
            np.delete(s, left, axis=0) for s, left in zip(self._sets, (rows, gone), strict=True)
        )
        return features_to_frechet_distance(x, y)


class _Moments:
    """Mean and covariance of features [N, D], from which rows can be taken away."""

    def __init__(self, features: Floats) -> None:
        self._whole = features_to_statistics(features)
        self._centred = features - self._whole.mean

    def without(self, rows: Ints) -> Statistics:
        whole = self._whole
        if len(rows) == 0:
            return whole
        left, n = self._centred[rows], whole.n - len(rows)
        shift = -left.sum(axis=0) / n
        scatter = whole.covariance * (whole.n - DDOF) - left.T @ left - n * np.outer(shift, shift)
        return Statistics(whole.mean + shift, scatter / (n - DDOF), n)


class _PrdcSide:
    """Precision, recall, density, coverage of one source, with rows left out."""

    def __init__(self, generated: Floats, real: Floats, neighbours: int) -> None:
        if len(generated) * len(real) > MAX_DISTANCES:
            raise EvaluationError("too many images to hold their distances in memory")
        self._distances = _squared_distances(real, generated)
        self._radii = _Radii(real, neighbours), _Radii(generated, neighbours)
        self._neighbours = neighbours

    def without(self, rows: Ints, gone: Ints) -> Floats:
        distances = np.delete(np.delete(self._distances, gone, axis=0), rows, axis=1)
        inside = distances < self._radii[0].without(gone)[:, None]
        counts = inside.sum(axis=0)
        recalled = (distances < self._radii[1].without(rows)[None]).any(axis=1)
        return np.array([
            (counts > 0).mean(), recalled.mean(), counts.mean() / self._neighbours,
            inside.any(axis=1).mean(),
        ])  # fmt: skip


class _Radii:
    """Squared distance of each point to its k-th nearest other point, with points left out.

    Keeps the nearest few of each point: enough unless most of them are left out at once.
    """

    def __init__(self, points: Floats, neighbours: int, block: int = 1024) -> None:
        if len(points) <= neighbours:
            raise EvaluationError(
                f"{len(points)} images are too few for {neighbours} nearest neighbours"
            )
        self._points, self._k = points, neighbours
        keep = min(len(points) - 1, 4 * neighbours + 12)
        indices, distances = [], []
        for start in range(0, len(points), block):
            found = _squared_distances(points[start : start + block], points)
            own = np.arange(len(found))
            found[own, own + start] = np.inf
            nearest = np.argpartition(found, keep - 1, axis=1)[:, :keep]
            chosen = np.take_along_axis(found, nearest, axis=1)
            order = np.argsort(chosen, axis=1, kind="stable")
            indices.append(np.take_along_axis(nearest, order, axis=1))
            distances.append(np.take_along_axis(chosen, order, axis=1))
        self._indices, self._nearest = np.concatenate(indices), np.concatenate(distances)

    def without(self, rows: Ints) -> Floats:
        kept = np.ones(len(self._points), bool)
        kept[rows] = False
        if kept.sum() <= self._k:
            raise EvaluationError("too few images are left for the nearest neighbours")
        there = kept[self._indices[kept]]
        place = (np.cumsum(there, axis=1) < self._k).sum(axis=1)  # of the k-th that is left
        nearest = self._nearest[kept]
        radii = nearest[np.arange(len(nearest)), np.minimum(place, nearest.shape[1] - 1)]
        for row in np.flatnonzero(place == nearest.shape[1]):
            point = self._points[kept][row : row + 1]
            found = np.delete(_squared_distances(point, self._points[kept])[0], row)
            radii[row] = np.partition(found, self._k - 1)[self._k - 1]
        return np.asarray(radii)


def _kernel_side(x: Floats, y: Floats, place: Ints, prompts: int) -> tuple[float, Floats, Floats]:
    """(kernel distance, without each prompt [P], without each reference picture [M])"""
    dimension, n, m = x.shape[1], len(x), len(y)

    def kernel(a: Floats, b: Floats) -> Floats:
        return np.asarray((a @ b.T / dimension + 1.0) ** 3)

    def sums(a: Floats, b: Floats, block: int = 1024) -> tuple[Floats, Floats]:
        """Row and column sums of k(a, b)."""
        rows, columns = np.zeros(len(a)), np.zeros(len(b))
        for start in range(0, len(a), block):
            found = kernel(a[start : start + block], b)
            rows[start : start + block] = found.sum(axis=1)
            columns += found.sum(axis=0)
        return rows, columns

    def diagonal(a: Floats) -> Floats:
        return np.asarray(((a * a).sum(axis=1) / dimension + 1.0) ** 3)

    within_x, within_y = sums(x, x)[0] - diagonal(x), sums(y, y)[0] - diagonal(y)
    to_y, to_x = sums(x, y)
    total_x, total_y, total_xy = within_x.sum(), within_y.sum(), to_y.sum()
    counts = np.bincount(place, minlength=prompts)
    # Pairs inside a prompt are in two of its rows: take them away once only.
    inside = np.zeros(prompts)
    if (counts > 1).any():
        for prompt in np.flatnonzero(counts > 1):
            own = x[place == prompt]
            inside[prompt] = kernel(own, own).sum() - diagonal(own).sum()
    left = n - counts
    if left.min() < 2:
        raise EvaluationError("one prompt has nearly all images")
    pairs_x = total_x - 2 * np.bincount(place, within_x, prompts) + inside
    pairs_xy = total_xy - np.bincount(place, to_y, prompts)
    mean_y = total_y / (m * (m - 1))
    without_prompt = pairs_x / (left * (left - 1)) + mean_y - 2 * pairs_xy / (left * m)
    without_real = (
        total_x / (n * (n - 1))
        + (total_y - 2 * within_y) / ((m - 1) * (m - 2))
        - 2 * (total_xy - to_x) / (n * (m - 1))
    )
    value = float(total_x / (n * (n - 1)) + mean_y - 2 * total_xy / (n * m))
    return value, without_prompt, without_real


def _squared_distances(a: Floats, b: Floats) -> Floats:
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None]
    return np.asarray(np.clip(squares - 2.0 * (a @ b.T), 0.0, None))


def _checked(features: npt.NDArray[np.floating], least: int = 4) -> Floats:
    data = np.asarray(features, np.float64)
    if data.ndim != 2 or len(data) < least:
        raise EvaluationError(
            f"features of shape {data.shape}; at least {least} vectors are needed"
        )
    if not np.isfinite(data).all():
        raise EvaluationError("features are not finite")
    return data


def _same_length(
    first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]
) -> tuple[Floats, Floats]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(a) != len(b):
        raise EvaluationError(f"{len(a)} and {len(b)} values cannot be paired")
    if len(a) < 2:
        raise EvaluationError("fewer than two prompts in common")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise EvaluationError("values are not finite")
    return a, b
