"""Non-inferiority tests: rates and paired ratios of something new against a margin.

Finding no difference does not prove that there is none: with few values none is ever found. So "no
worse" is a separate claim, made only when an interval is below a margin that was stated before.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.metrics.intervals import Interval, clopper_pearson


def rate_difference(
    new: int, n_new: int, old: int, n_old: int, *, confidence: float = 0.95
) -> Interval:
    """Rate of the new minus that of the old, independent samples, with a two-sided interval.

    The limits of both rates by Clopper and Pearson, joined as in Newcombe's method 10 (1998), so
    that rates of 0 have a width: 0 of 300 against 0 of 3000 gives [-0.0012, 0.0122].

    Raises:
        EvaluationError: an empty sample, or counts that cannot be.
    """
    first = clopper_pearson(new, n_new, confidence=confidence)
    second = clopper_pearson(old, n_old, confidence=confidence)
    difference = first.value - second.value
    low = difference - math.hypot(first.value - first.low, second.high - second.value)
    high = difference + math.hypot(first.high - first.value, second.value - second.low)
    return Interval(difference, low, high, "Newcombe's method 10 with Clopper-Pearson limits")


def higher_rate_p(new: int, n_new: int, old: int, n_old: int) -> float:
    """One-sided p-value of "the new rate is not higher" by Fisher's exact test."""
    from scipy.stats import fisher_exact

    if not (0 <= new <= n_new and 0 <= old <= n_old and n_new and n_old):
        raise EvaluationError(f"{new} of {n_new} and {old} of {n_old} are no rates")
    return float(fisher_exact([[new, n_new - new], [old, n_old - old]], "greater").pvalue)


def median_by_signs(
    values: npt.NDArray[np.floating], *, confidence: float = 0.95
) -> Interval | None:
    """Compute the median of independent values [N] with an exact, distribution-free interval.

    Its limits are order statistics (the sign test turned around; David and Nagaraja, 2003, 7.1).
    None where N is too small for the confidence: 5 values give 93.75 % at most.

    Raises:
        EvaluationError: a value that is not finite.
    """
    from scipy.stats import binom

    data = np.sort(np.asarray(values, np.float64))
    if not np.isfinite(data).all():
        raise EvaluationError("a value is not finite")
    # At most `rank` - 1 values lie below the median with a chance of `tail` or less.
    tail, n = (1.0 - confidence) / 2.0, len(data)
    rank = int(np.searchsorted(binom.cdf(np.arange(n // 2 + 1), n, 0.5), tail, side="right"))
    if rank == 0:
        return None
    return Interval(
        float(np.median(data)), float(data[rank - 1]), float(data[n - rank]), "sign test"
    )


def median_above_p(values: npt.NDArray[np.floating], bound: float) -> float:
    """One-sided p-value of "the median of these independent values [N] is at most `bound`" by the
    sign test; values equal to the bound speak against it being higher."""
    from scipy.stats import binomtest

    data = np.asarray(values, np.float64)
    if not len(data):
        return 1.0
    return float(binomtest(int((data > bound).sum()), len(data), 0.5, alternative="greater").pvalue)
