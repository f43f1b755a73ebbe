"""Differences between two sources on the same prompts and the same real images.

Both sources answer the same prompts and are measured against the same images. So a prompt that is
hard for one is hard for the other, and most of the noise is common to both. Leaving out or
resampling the same prompts on both sides cancels it; adding the two intervals does not.

Every difference is second minus first. `p` is two-sided, for "there is no difference". Differences
of distances to a reference are in `modelops.metrics.paired_sets`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.seeding import numpy_generator
from modelops.metrics.intervals import bootstrap_mean

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Second minus first with its interval.

    Attributes:
        first, second: the two values, computed anew.
        p: two-sided p-value of no difference.
        n: prompts that were paired.
        variance: of the difference, the part that more prompts make smaller.
        fixed_variance: the part that comes from the reference images.
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


def jackknife_difference(
    first: float,
    second: float,
    prompts: tuple[Floats, Ints],
    reference: tuple[Floats, Ints],
    *,
    n: int,
    confidence: float,
    method: str,
) -> PairedDifference:
    """Make a difference from those without each group of prompts and images, and group sizes.

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
    """Return (two-sided p-value, half-width of the interval)"""
    from scipy.stats import t

    error = float(np.sqrt(variance))
    if error <= 1e-12 * abs(value):  # one and the same difference everywhere
        return (1.0 if value == 0 else 0.0), 0.0
    p = 2.0 * float(t.sf(abs(value) / error, freedom))
    return p, float(t.ppf(0.5 + confidence / 2.0, freedom)) * error


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
