"""Tests of everything but images: rates, ranks, mixes and latencies of two samples.

Each is exact, a permutation test, or (ranks) the normal limit of one, so that it holds its level
without a shape being assumed; all are two-sided. Rows must be independent, but for latencies: those
of one minute share its load, so blocks of time are dealt out there instead of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.seeding import numpy_generator
from modelops.metrics.intervals import clopper_pearson
from modelops.metrics.multiple import independent_difference, permutation_p

Floats = npt.NDArray[np.float64]
BLOCKS = 24  # of time, in the shorter of two spans
MIN_BLOCKS = 8
MIN_BLOCK_S = 30.0
BOOTSTRAP = 499


@dataclass(frozen=True, slots=True)
class Found:
    """Result of a test; `effect` is in the unit of its margin, later minus earlier."""

    statistic: float
    p: float
    effect: float
    low: float
    high: float
    method: str


def rate_shift(earlier: tuple[int, int], later: tuple[int, int]) -> Found:
    """Two rates, each as (stopped, n): Fisher's exact test, which counts in how few the earlier one
    was measured on; the effect is the difference of the rates, with Newcombe's interval."""
    from scipy.stats import fisher_exact

    (a, n), (b, m) = earlier, later
    p = float(fisher_exact([[b, m - b], [a, n - a]]).pvalue)
    both = independent_difference(clopper_pearson(b, m), clopper_pearson(a, n))
    return Found(b / m, min(1.0, p), both.value, both.low, both.high, "Fisher's exact test")


def rank_shift(
    earlier: npt.NDArray[np.floating] | npt.NDArray[np.integer],
    later: npt.NDArray[np.floating] | npt.NDArray[np.integer],
) -> Found:
    """Values [N], [M]: the rank test of Mann and Whitney. The effect is P(later > earlier), ties
    half, less one half; its interval is DeLong's (1988)."""
    from scipy.stats import mannwhitneyu, norm, rankdata

    a, b = np.asarray(earlier, np.float64), np.asarray(later, np.float64)
    n, m = len(a), len(b)
    if np.ptp(np.concatenate([a, b])) == 0:
        return Found(n * m / 2, 1.0, 0.0, 0.0, 0.0, "all values are equal")
    test = mannwhitneyu(b, a, alternative="two-sided")
    ranks = rankdata(np.concatenate([a, b]))
    above = (ranks[n:] - rankdata(b)) / n  # of each later value: share of earlier ones below it
    below = 1.0 - (ranks[:n] - rankdata(a)) / m
    effect = float(above.mean()) - 0.5
    error = float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    half = float(norm.ppf(0.975)) * error
    return Found(
        float(test.statistic), float(test.pvalue), effect,
        max(-0.5, effect - half), min(0.5, effect + half), "Mann-Whitney rank test",
    )  # fmt: skip


def mix_shift(
    earlier: npt.NDArray[np.floating],
    later: npt.NDArray[np.floating],
    *,
    seed: int,
    permutations: int,
) -> Found:
    """Shares [N, S], [M, S] whose rows sum to 1: a permutation test of the total variation distance
    of their means, which is the effect as well; percentile bootstrap. A distance is never below 0:
    effect and interval hold some noise, more of it the smaller N and M are."""
    a, b = np.asarray(earlier, np.float64), np.asarray(later, np.float64)
    rows, n = np.concatenate([a, b]), len(a)

    def distance(left: Floats, right: Floats) -> Floats:
        return np.asarray(np.abs(left - right).sum(axis=-1) / 2)

    observed = float(distance(a.mean(axis=0), b.mean(axis=0)))
    method = "permutation test of the total variation distance"
    if np.ptp(rows, axis=0).max() == 0:
        return Found(0.0, 1.0, 0.0, 0.0, 0.0, method)
    generator = numpy_generator(seed, "drift", "mix")
    total, reached = rows.sum(axis=0), 0
    for _ in range(permutations):
        left = rows[generator.permutation(len(rows))[:n]].sum(axis=0)
        dealt = float(distance(left / n, (total - left) / len(b)))
        reached += dealt >= observed * (1 - 1e-9)
    drawn = [
        float(
            distance(
                a[generator.integers(0, n, n)].mean(axis=0),
                b[generator.integers(0, len(b), len(b))].mean(axis=0),
            )
        )
        for _ in range(BOOTSTRAP)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Found(
        observed, (1 + reached) / (permutations + 1), observed,
        min(float(low), observed), max(float(high), observed), method,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Latencies:
    """Times of the answers [N], in Unix seconds, and how long each took [N], in seconds."""

    times: Floats
    seconds: Floats

    @property
    def span(self) -> float:
        """Seconds from the first to the last."""
        return float(np.ptp(self.times)) if len(self.times) else 0.0


def latency_shift(
    earlier: Latencies, later: Latencies, quantile: float, *, seed: int, permutations: int
) -> Found | None:
    """Test whether more of the later requests take longer than the `quantile` of both together.

    The share of slow requests is taken in blocks of time, and whole blocks are dealt out (Welch's
    t, permuted), because requests of one moment are slow together. The effect is the ratio of the
    two quantiles less 1, its interval a bootstrap over blocks. None if a side has fewer than
    `MIN_BLOCKS` blocks with requests. (Load that swings over a day needs windows of whole days.)
    """
    length = max(MIN_BLOCK_S, min(earlier.span, later.span) / BLOCKS)
    both = np.concatenate([earlier.seconds, later.seconds])
    limit = float(np.quantile(both, quantile))
    sides = [_blocks(side, length) for side in (earlier, later)]
    if min(map(len, sides)) < MIN_BLOCKS:
        return None
    shares = [np.array([(block > limit).mean() for block in side]) for side in sides]
    generator = numpy_generator(seed, "drift", "latency", str(quantile))
    p = permutation_p(
        *shares, studentised=True, permutations=permutations, generator=generator
    )  # fmt: skip

    def ratio(old: list[Floats], new: list[Floats]) -> float:
        return float(
            np.quantile(np.concatenate(new), quantile)
            / max(float(np.quantile(np.concatenate(old), quantile)), 1e-9)
        )

    def again(side: list[Floats]) -> list[Floats]:
        return [side[i] for i in generator.integers(0, len(side), len(side))]

    drawn = [ratio(*map(again, sides)) for _ in range(BOOTSTRAP)]
    effect = ratio(*sides) - 1
    low, high = np.quantile(drawn, [0.025, 0.975]) - 1
    return Found(
        float(shares[1].mean()), p, effect, min(float(low), effect), max(float(high), effect),
        f"permutation of {len(sides[0])} and {len(sides[1])} blocks of {length:.0f} s",
    )  # fmt: skip


def _blocks(side: Latencies, length: float) -> list[Floats]:
    """Seconds of the requests of each block of time that has any."""
    if not len(side.times):
        return []
    number = ((side.times - side.times.min()) // length).astype(np.int64)
    return [side.seconds[number == one] for one in np.unique(number)]
