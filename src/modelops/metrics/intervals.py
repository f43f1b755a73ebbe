"""Intervals: bootstrap over images or prompts, jackknife, and binomial intervals of rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.seeding import numpy_generator

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], float]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with a two-sided interval and the method that made it."""

    value: float
    low: float
    high: float
    method: str


def clopper_pearson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Exact binomial interval for a rate (Clopper and Pearson, 1934). 0 of 200 gives [0, 0.0183].

    Raises:
        EvaluationError: n < 1, or successes outside [0, n].
    """
    _check_counts(successes, n)
    low, high = exact_bounds(successes, n, confidence=confidence)
    return Interval(successes / n, low, high, "Clopper-Pearson")


def exact_bounds(hits: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Clopper and Pearson's bounds of hits / n, for counts that need not be whole."""
    from scipy.stats import beta

    tail = (1.0 - confidence) / 2.0
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1.0 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def bootstrap_mean(
    values: npt.NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    purpose: str = "bootstrap",
) -> Interval:
    """BCa bootstrap interval of the mean of independent values [N] (Efron, 1987).

    Pass one value per independent unit (a prompt, say), not one per repeated measurement.

    Raises:
        EvaluationError: no values, or one that is not finite.
    """
    data = _check_values(values)
    value = float(data.mean())
    if len(data) == 1 or np.ptp(data) == 0:
        return Interval(value, value, value, "constant")
    draws = _resampled(data, lambda block: block.mean(axis=1), seed, resamples, purpose)
    leave_one_out = (data.sum() - data) / (len(data) - 1)
    low, high = _bca_bounds(value, draws, leave_one_out, confidence)
    return Interval(value, low, high, f"BCa bootstrap, {resamples} resamples")


def bootstrap_median(
    values: npt.NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    purpose: str = "bootstrap",
) -> Interval:
    """Percentile bootstrap interval of the median of independent values [N].

    (BCa's jackknife acceleration is not defined for a median.)
    """
    data = _check_values(values)
    draws = _resampled(data, lambda block: np.median(block, axis=1), seed, resamples, purpose)
    low, high = _percentiles(draws, confidence)
    return Interval(
        float(np.median(data)), low, high, f"percentile bootstrap, {resamples} resamples"
    )


def bootstrap_median_difference(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    purpose: str = "bootstrap",
) -> Interval:
    """Percentile bootstrap interval of median(first) - median(second), independent samples."""
    a, b = _check_values(first), _check_values(second)

    def medians(block: Floats) -> Floats:
        return np.asarray(np.median(block, axis=1))

    draws_a = _resampled(a, medians, seed, resamples, f"{purpose}/first")
    draws_b = _resampled(b, medians, seed, resamples, f"{purpose}/second")
    low, high = _percentiles(draws_a - draws_b, confidence)
    method = f"percentile bootstrap of both samples, {resamples} resamples"
    return Interval(float(np.median(a) - np.median(b)), low, high, method)


def normal_interval(
    value: float, variance: float, *, freedom: int, method: str, confidence: float = 0.95
) -> Interval:
    """value +- t sqrt(variance), with the t quantile of so many degrees of freedom."""
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2.0, max(1, freedom)) * np.sqrt(variance))
    return Interval(value, value - half, value + half, method)


def jackknife_interval(
    value: float,
    leave_out: list[npt.NDArray[np.float64]],
    *,
    confidence: float = 0.95,
    method: str = "delete-a-group jackknife",
) -> Interval:
    """Interval from leave-one-group-out values of one or more independent samples.

    Args:
        value: the statistic on everything.
        leave_out: for each sample, the statistic without each of its groups (equal sizes).
    """
    variances = [
        (len(v) - 1) / len(v) * float(((v - v.mean()) ** 2).sum()) for v in leave_out if len(v) > 1
    ]
    freedom = min(len(v) for v in leave_out) - 1
    return normal_interval(
        value, sum(variances), freedom=freedom, confidence=confidence, method=method
    )


def _check_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise EvaluationError(f"{successes} of {n} is not a rate")


def _check_values(values: npt.NDArray[np.floating]) -> Floats:
    data = np.asarray(values, np.float64).ravel()
    if len(data) == 0:
        raise EvaluationError("no values to make an interval from")
    if not np.isfinite(data).all():
        raise EvaluationError(f"{int((~np.isfinite(data)).sum())} of {len(data)} values not finite")
    return data


def _resampled(
    data: Floats, statistic: Callable[[Floats], Floats], seed: int, resamples: int, purpose: str
) -> Floats:
    """The statistic of `resamples` bootstrap samples, in blocks that bound memory."""
    generator = numpy_generator(seed, purpose)
    block = max(1, min(resamples, 4_000_000 // len(data)))
    draws = [
        statistic(data[generator.integers(0, len(data), (min(block, resamples - done), len(data)))])
        for done in range(0, resamples, block)
    ]
    return np.concatenate(draws)


def _percentiles(draws: Floats, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


def _bca_bounds(
    value: float, draws: Floats, leave_one_out: Floats, confidence: float
) -> tuple[float, float]:
    from scipy.stats import norm

    below = float(np.clip((draws < value).mean() + (draws == value).mean() / 2, 1e-6, 1 - 1e-6))
    shift = norm.ppf(below)
    deviations = leave_one_out.mean() - leave_one_out
    spread = float((deviations**2).sum()) ** 1.5
    acceleration = float((deviations**3).sum()) / (6 * spread) if spread > 0 else 0.0
    ends = norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    levels = norm.cdf(shift + (shift + ends) / (1 - acceleration * (shift + ends)))
    low, high = np.quantile(draws, levels)
    return float(low), float(high)
