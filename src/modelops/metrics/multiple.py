"""Comparisons of slices of the prompts with the rest, one or many at once.

Prompts that are variants of one another (such as the skin tones of one emoji) are not independent.
In simulations on groups like OpenMoji's, tests that ignore this find a false difference in 8 of 10
evaluations. So the unit is the group: values are averaged within a group first, and if enough
groups have prompts on both sides the comparison is paired within groups.

All comparisons of an evaluation are corrected together by Holm's method. Each "differs" is read as
a separate claim, so the chance of even one false claim must be bounded (Benjamini and Hochberg
bound the share of false claims). Overlapping slices make the tests dependent, which Holm's bound
allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.seeding import numpy_generator
from modelops.metrics.intervals import Interval, bootstrap_mean, exact_bounds

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
MANY = 100  # values a side from which Welch's t needs no permutations
MAX_CELLS = 4_000_000  # float64 values of one block of permutations


@dataclass(frozen=True, slots=True)
class SliceDifference:
    """A slice against the rest; every value is a mean over groups.

    Attributes:
        inside, rest: means of the slice and of all others; None where a side is empty.
        difference: inside minus rest; within the groups that are on both sides if `paired`.
        p: two-sided, not corrected; None if a side has fewer groups than asked.
        n_inside, n_rest: groups with a prompt on that side.
        n_both: groups on both sides.
    """

    inside: Interval | None
    rest: Interval | None
    difference: Interval | None
    p: float | None
    paired: bool
    n_inside: int
    n_rest: int
    n_both: int


def slice_difference(
    values: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    member: Bools,
    *,
    rate: bool,
    minimum: int = 10,
    seed: int,
    resamples: int = 2000,
    permutations: int = 9999,
    purpose: str = "slice",
) -> SliceDifference:
    """Compare the prompts of a slice with all others.

    Paired within groups if `minimum` groups or more are on both sides: a t test of their
    differences, or for rates a sign-flip test. Otherwise independent, see `independent_p`.

    Args:
        values: one per prompt [P]; finite; in [0, 1] if they are rates.
        groups: the group of each prompt [P]; distinct numbers if prompts are independent.
        member: which prompts are in the slice [P].
        minimum: groups that each side needs for a test.

    Raises:
        EvaluationError: the lengths differ, or a value is not finite or not a rate.
    """
    data = np.asarray(values, np.float64)
    if not len(data) == len(groups) == len(member):
        raise EvaluationError("values, groups and members of a slice differ in length")
    if not np.isfinite(data).all() or (rate and len(data) and (data.min() < 0 or data.max() > 1)):
        raise EvaluationError("a slice's values are not finite, or not rates")
    inside, rest = _group_means(data, groups, member), _group_means(data, groups, ~member)
    both = sorted(inside.keys() & rest.keys())
    ours, theirs = np.array(list(inside.values())), np.array(list(rest.values()))
    options = {"seed": seed, "resamples": resamples}

    def interval(cells: Floats, side: str) -> Interval | None:
        if not len(cells):
            return None
        if rate:
            return bounded_rate(cells)
        return bootstrap_mean(cells, purpose=f"{purpose}/{side}", **options)

    a, b = interval(ours, "inside"), interval(theirs, "rest")
    counts = (len(ours), len(theirs), len(both))
    if min(counts[:2]) < minimum or a is None or b is None:
        return SliceDifference(a, b, None, None, False, *counts)
    generator = numpy_generator(seed, f"{purpose}/test")
    if len(both) < minimum:
        p = independent_p(ours, theirs, rate=rate, permutations=permutations, generator=generator)
        return SliceDifference(a, b, independent_difference(a, b), p, False, *counts)
    first, second = np.array([inside[g] for g in both]), np.array([rest[g] for g in both])
    if rate:
        difference = independent_difference(bounded_rate(first), bounded_rate(second))
        p = sign_flip_p(first - second, permutations=permutations, generator=generator)
    else:
        difference = bootstrap_mean(first - second, purpose=f"{purpose}/paired", **options)
        p = paired_t_p(first - second)
    return SliceDifference(a, b, difference, p, True, *counts)


def holm(p: Sequence[float] | npt.NDArray[np.floating]) -> Floats:
    """Holm's corrected p-values [M] (Holm, 1979): at or below alpha, at most alpha of the
    evaluations make even one false claim, however the tests depend on each other."""
    data = np.asarray(p, np.float64)
    order = np.argsort(data, kind="stable")
    scaled = (len(data) - np.arange(len(data))) * data[order]
    corrected = np.empty(len(data))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected


def independent_p(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    rate: bool,
    permutations: int,
    generator: np.random.Generator,
) -> float:
    """Two-sided p-value of "both [N], [M] have the same mean".

    A permutation test of Welch's t (Janssen, 1997), or of the difference of rates. Where those have
    a closed form it is used: Fisher's exact test for values of 0 and 1, and Welch's t test itself
    from `MANY` values a side on.
    """
    from scipy.stats import fisher_exact, ttest_ind

    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if np.ptp(np.concatenate([a, b])) == 0:
        return 1.0
    if rate and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        counts = [[int(a.sum()), int(len(a) - a.sum())], [int(b.sum()), int(len(b) - b.sum())]]
        return float(fisher_exact(counts).pvalue)
    if not rate and min(len(a), len(b)) >= MANY:
        return float(ttest_ind(a, b, equal_var=False).pvalue)
    return permutation_p(a, b, studentised=not rate, permutations=permutations, generator=generator)


def permutation_p(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    studentised: bool,
    permutations: int,
    generator: np.random.Generator,
) -> float:
    """Two-sided p-value of "both [N], [M] have the same mean", labels being permuted.

    Studentised (Welch's t) it also holds approximately where the spreads differ; without, it is
    exact for equal distributions, and for values of 0 and 1 it is Fisher's exact test.
    """
    n = len(first)
    pooled = np.concatenate([np.asarray(first, np.float64), np.asarray(second, np.float64)])
    if np.ptp(pooled) == 0:
        return 1.0
    pooled = pooled - pooled.mean()  # so that the sums of squares below do not cancel
    observed = _statistic(pooled[None], n, studentised)[0]
    block = max(1, MAX_CELLS // len(pooled))
    reached = 0
    for done in range(0, permutations, block):
        rows = np.tile(pooled, (min(block, permutations - done), 1))
        drawn = _statistic(generator.permuted(rows, axis=1), n, studentised)
        reached += int((drawn >= observed * (1 - 1e-9)).sum())
    return (1 + reached) / (permutations + 1)


def sign_flip_p(
    differences: npt.NDArray[np.floating], *, permutations: int, generator: np.random.Generator
) -> float:
    """Two-sided p-value of "the paired differences [N] are symmetric about 0" (Fisher, 1935)."""
    data = np.asarray(differences, np.float64)
    observed = abs(float(data.sum()))
    block = max(1, MAX_CELLS // max(1, len(data)))
    reached = 0
    for done in range(0, permutations, block):
        signs = 2 * generator.integers(0, 2, (min(block, permutations - done), len(data))) - 1
        reached += int((np.abs(signs @ data) >= observed * (1 - 1e-9)).sum())
    return (1 + reached) / (permutations + 1)


def paired_t_p(differences: npt.NDArray[np.floating]) -> float:
    """Two-sided p-value of "the paired differences [N] have mean 0", by Student's t."""
    from scipy.stats import t

    data = np.asarray(differences, np.float64)
    error = data.std(ddof=1) / np.sqrt(len(data))
    if error <= 1e-12 * max(1.0, float(np.abs(data).max())):
        return 1.0 if abs(data.mean()) <= 1e-12 else 0.0
    return float(2 * t.sf(abs(data.mean()) / error, len(data) - 1))


def bounded_rate(values: npt.NDArray[np.floating], *, confidence: float = 0.95) -> Interval:
    """Mean of independent values [N] in [0, 1] with an interval that needs no spread.

    Clopper and Pearson's, with the sum in place of the count: theirs for values of 0 and 1, wider
    than need be for values between, whose spread is smaller than a coin's.
    """
    n, hits = len(values), float(np.sum(values))
    low, high = exact_bounds(hits, n, confidence=confidence)
    value = min(1.0, hits / n)
    return Interval(value, min(low, value), max(high, value), "Clopper-Pearson over groups")


def independent_difference(first: Interval, second: Interval) -> Interval:
    """First minus second of independent samples; half-widths add in squares (Newcombe, 1998)."""
    value = first.value - second.value
    low = value - float(np.hypot(first.value - first.low, second.high - second.value))
    high = value + float(np.hypot(first.high - first.value, second.value - second.low))
    return Interval(value, low, high, "difference of independent values (Newcombe)")


def _group_means(values: Floats, groups: npt.NDArray[np.integer], rows: Bools) -> dict[int, float]:
    """{group: mean of its values among the rows}, in the groups' order."""
    names, place = np.unique(groups[rows], return_inverse=True)
    means = np.bincount(place, values[rows], len(names)) / np.bincount(place, minlength=len(names))
    return {int(name): float(mean) for name, mean in zip(names, means, strict=True)}


def _statistic(rows: Floats, n: int, studentised: bool) -> Floats:
    """|difference of means| of the first n columns and the others [B], or Welch's |t|."""
    first, second = rows[:, :n], rows[:, n:]
    difference = np.abs(first.mean(axis=1) - second.mean(axis=1))
    if not studentised:
        return np.asarray(difference)
    variance = first.var(axis=1, ddof=1) / n + second.var(axis=1, ddof=1) / second.shape[1]
    with np.errstate(divide="ignore"):
        return np.asarray(difference / np.sqrt(variance))
