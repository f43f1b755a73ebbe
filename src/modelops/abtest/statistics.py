"""Statistics of votes, on plain arrays, without knowledge of a study."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.seeding import numpy_generator
from modelops.metrics.intervals import Interval, exact_bounds

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Level = Literal["nominal", "ordinal", "interval"]


def clustered_share(
    scores: Floats, owners: Ints, *, confidence: float = 0.95
) -> tuple[Interval, float]:
    """Mean of scores in [0, 1] with an exact-type interval that respects clusters.

    Clopper and Pearson's interval at the effective sample size 1 + p (1 - p) / V, where V is the
    variance of the mean between clusters, lowered by the t quantiles of both sample sizes and never
    more than the number of scores (Korn and Graubard, 1998). With one score a cluster it is Clopper
    and Pearson's own. When every cluster has the same mean, as when all votes are alike, V says
    nothing and each cluster counts as one.

    Args:
        scores: 0, 1 or in between (a tie is 0.5), [N].
        owners: cluster (the prompt) of each score, [N].

    Returns:
        (interval, effective sample size)

    Raises:
        EvaluationError: fewer than two clusters.
    """
    from scipy.stats import t

    sums, counts = _cluster_sums(scores, owners)
    clusters, n = len(counts), len(scores)
    if clusters < 2:
        raise EvaluationError(f"votes on {clusters} prompts; an interval needs two")
    share = float(scores.mean())
    residuals = sums - share * counts
    variance = clusters / (clusters - 1) * float((residuals**2).sum()) / n**2
    if variance > 1e-12:
        level = 0.5 + confidence / 2
        shrink = float(t.ppf(level, n - 1) / t.ppf(level, clusters - 1)) ** 2
        effective = min(float(n), (1 + share * (1 - share) / variance) * shrink)
    else:
        effective = float(clusters)
    low, high = exact_bounds(share * effective, effective, confidence=confidence)
    method = "Korn-Graubard, clustered by prompt"
    return Interval(share, min(low, share), max(high, share), method), effective


def bootstrap_share(
    scores: Floats,
    owners: Ints,
    raters: Ints | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of scores with a percentile bootstrap interval over clusters.

    With `raters`, those are resampled too, independently of the clusters: the interval then also
    speaks of other raters than these (the pigeonhole bootstrap; Owen, 2007).

    Args:
        scores, owners: as in `clustered_share`.
        raters: rater of each score, [N].
    """
    _, row = np.unique(owners, return_inverse=True)
    column = np.zeros(len(row), np.int64)
    if raters is not None:
        _, column = np.unique(raters, return_inverse=True)
    shape = (row.max() + 1, column.max() + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (row, column), scores)
    np.add.at(counts, (row, column), 1.0)
    generator = numpy_generator(seed, "abtest-bootstrap", shape[1])
    by_row = _weights(generator, shape[0], resamples)
    by_column = _weights(generator, shape[1], resamples) if raters is not None else np.ones((1, 1))
    total = ((by_row @ counts) * by_column).sum(axis=1)
    draws = ((by_row @ sums) * by_column).sum(axis=1)[total > 0] / total[total > 0]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(np.mean(scores))
    what = "prompts and raters" if raters is not None else "prompts"
    method = f"percentile bootstrap over {what}, {resamples} resamples"
    return Interval(value, min(float(low), value), max(float(high), value), method)


def balanced_mean(first: Interval, second: Interval) -> Interval:
    """Mean of two shares of disjoint votes; half-widths add in squares (Newcombe's method 10)."""
    value = (first.value + second.value) / 2
    low = value - float(np.hypot(first.value - first.low, second.value - second.low)) / 2
    high = value + float(np.hypot(first.high - first.value, second.high - second.value)) / 2
    return Interval(value, max(0.0, low), min(1.0, high), f"mean of two, each {first.method}")


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value that wins are as likely as losses; ties were left out."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def krippendorff_alpha(values: Floats, *, level: Level = "ordinal") -> float | None:
    """Agreement of raters beyond chance: 1 is perfect, 0 is chance (Krippendorff, 2011).

    Args:
        values: one row a rater and one column a unit, NaN where there is no value, [R, U].
        level: measure of distance: nominal (equal or not), ordinal (number of values between them),
            interval (squared difference).

    Returns:
        None when no unit has two values, or all values are the same.
    """
    known = values[:, (~np.isnan(values)).sum(axis=0) >= 2]
    levels = np.unique(known[~np.isnan(known)])
    if len(levels) < 2:
        return None
    whole = _coincidences(known, levels).sum(axis=0)
    return float(_alpha(whole[None], levels, level)[0])


def raw_agreement(values: Floats) -> float | None:
    """Share of pairs of raters who gave a unit the same value; says nothing of chance.

    Where nearly all votes are the same it is high while alpha is near 0.

    Args:
        values: as in `krippendorff_alpha`.
    """
    known = values[:, (~np.isnan(values)).sum(axis=0) >= 2]
    if known.shape[1] == 0:
        return None
    # Each unit weighs as much as it has raters, as in alpha.
    pairs = _coincidences(known, np.unique(known[~np.isnan(known)])).sum(axis=0)
    return float(np.trace(pairs) / pairs.sum())


def alpha_interval(
    values: Floats, owners: Ints, *, level: Level = "ordinal", seed: int, resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval | None:  # fmt: skip
    """`krippendorff_alpha` with a percentile bootstrap interval over clusters of units.

    Args:
        owners: cluster (the prompt) of each unit, [U].
    """
    value = krippendorff_alpha(values, level=level)
    if value is None:
        return None
    enough = (~np.isnan(values)).sum(axis=0) >= 2
    known, owners = values[:, enough], owners[enough]
    levels = np.unique(known[~np.isnan(known)])
    per_unit = _coincidences(known, levels)
    names, place = np.unique(owners, return_inverse=True)
    if len(names) < 2:
        return None
    per_cluster = np.zeros((len(names), *per_unit.shape[1:]))
    np.add.at(per_cluster, place, per_unit)
    weights = _weights(numpy_generator(seed, "abtest-alpha"), len(names), resamples)
    draws = _alpha(np.tensordot(weights, per_cluster, axes=1), levels, level)
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0:
        return None
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    method = f"Krippendorff's alpha, {level}; bootstrap over prompts, {resamples} resamples"
    return Interval(value, min(float(low), value), max(float(high), value), method)


def _coincidences(values: Floats, levels: Floats) -> Floats:
    """Pairs of values (c, k) of two raters on each unit, over its raters less one, [U, C, C]."""
    counts = (values[None] == levels[:, None, None]).sum(axis=1).T.astype(np.float64)  # [U, C]
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs -= np.eye(len(levels)) * counts[:, :, None]
    return np.asarray(pairs / (counts.sum(axis=1) - 1)[:, None, None])


def _alpha(coincidences: Floats, levels: Floats, level: Level) -> Floats:
    """Alpha of each matrix [B, C, C]; NaN where only one value occurs."""
    margins = coincidences.sum(axis=2)  # [B, C]
    total = margins.sum(axis=1)
    size = len(levels)
    if level == "ordinal":
        # Values between and including c and k, less half of those at the ends.
        upto = np.cumsum(margins, axis=1)
        middle = upto - margins / 2
        distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    elif level == "interval":
        distance = ((levels[:, None] - levels[None]) ** 2)[None]
    else:
        distance = (1.0 - np.eye(size))[None]
    observed = (coincidences * distance).sum(axis=(1, 2))
    expected = (margins[:, :, None] * margins[:, None, :] * distance).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1.0 - (total - 1) * observed / expected)


def _weights(generator: np.random.Generator, n: int, resamples: int) -> Floats:
    """Draw how often each of n units is in each resample, [B, n]."""
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def _cluster_sums(scores: Floats, owners: Ints) -> tuple[Floats, Floats]:
    _, place = np.unique(owners, return_inverse=True)
    sums = np.bincount(place, weights=scores)
    return np.asarray(sums, np.float64), np.bincount(place).astype(np.float64)
