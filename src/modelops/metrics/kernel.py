"""Kernel distance (KID's estimator): squared MMD with a cubic polynomial kernel.

k(x, y) = (x.y / D + 1)^3, unbiased U-statistic over whole sets (Binkowski et al., 2018). It may be
negative. Kernels are evaluated blockwise, so memory does not grow with n^2.

The interval is a delete-one jackknife. It is not the U-statistic's unbiased variance, which is here
too (`kernel_variance`; Sutherland et al., 2017, for sets of unequal size): it counts the terms of
second order twice, and so is up to twice as large where both sets come from one distribution. That
is what an interval needs, because small estimates come with small estimates of their variance: in
simulations (bench/bench_coverage.py) nominal 95 % intervals held the truth in 95 to 99 % of cases
by the jackknife, and in 65 to 96 % by the unbiased variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.errors import EvaluationError
from modelops.metrics.intervals import Interval, jackknife_interval

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KernelSums:
    """Row sums of the kernel matrices, and sums of their squares; `within_*` and `squares_first`,
    `squares_second` leave the diagonals out."""

    within_first: Floats  # [N]
    within_second: Floats  # [M]
    first_to_second: Floats  # [N]
    second_to_first: Floats  # [M]
    squares_first: float
    squares_second: float
    squares_between: float


def kernel_distance(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    degree: int = 3,
    coefficient: float = 1.0,
    confidence: float = 0.95,
    block: int = 1024,
) -> Interval:
    """Squared MMD between features [N, D] and [M, D], with an exact delete-one jackknife interval.

    The leave-one-out values follow in closed form from the row sums, so the interval costs nothing
    beside the estimate. (The spread of subset estimates, which KID codes print, is not a standard
    error of it.)

    Raises:
        EvaluationError: fewer than three images, or features that are not finite.
    """
    sums = _kernel_sums(*_checked(first, second, 3), degree, coefficient, block)
    n, m = len(sums.within_first), len(sums.within_second)
    value = float(
        sums.within_first.sum() / (n * (n - 1))
        + sums.within_second.sum() / (m * (m - 1))
        - 2 * sums.first_to_second.sum() / (n * m)
    )
    return jackknife_interval(
        value, _leave_one_out(sums), confidence=confidence,
        method="unbiased U-statistic, delete-one jackknife over images",
    )  # fmt: skip


def kernel_variance(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    degree: int = 3,
    coefficient: float = 1.0,
    block: int = 1024,
) -> float:
    """Unbiased estimate of the variance of `kernel_distance`, see `sums_to_variance`.

    Raises:
        EvaluationError: fewer than four images, or features that are not finite.
    """
    return sums_to_variance(_kernel_sums(*_checked(first, second, 4), degree, coefficient, block))


def sums_to_variance(sums: KernelSums) -> float:
    """Unbiased estimate of the variance of the U-statistic; may be negative by chance.

    With k centred, a(x) = E k(x, X'), b(x) = E k(x, Y), c(y) = E k(X, y), d(y) = E k(y, Y'):
    4/n Var(a - b) + 4/m Var(d - c) + 2/(n(n-1)) V_xx + 2/(m(m-1)) V_yy + 4/(nm) V_xy, where V are
    the variances of what k is beside its first-order terms.
    """
    n, m = len(sums.within_first), len(sums.within_second)
    between = float(sums.first_to_second.sum())
    rows, columns = sums.first_to_second, sums.second_to_first
    mean_square = sums.squares_between / (n * m)
    square_of_mean = (
        between**2 - float(rows @ rows) - float(columns @ columns) + sums.squares_between
    ) / (n * (n - 1) * m * (m - 1))
    total, shared = 0.0, []
    for within, cross, squares, size, other in (
        (sums.within_first, rows, sums.squares_first, n, m),
        (sums.within_second, columns, sums.squares_second, m, n),
    ):
        whole, pairs = float(within.sum()), size * (size - 1)
        own = (float(within @ within) - squares) / (pairs * (size - 2))  # E a^2
        own_mean = (whole**2 - 4 * float(within @ within) + 2 * squares) / (
            pairs * (size - 2) * (size - 3)
        )  # (E k)^2
        mixed = float(within @ cross) / (pairs * other)  # E a b
        mixed_mean = (whole * between - 2 * float(within @ cross)) / (pairs * (size - 2) * other)
        far = (float(cross @ cross) - sums.squares_between) / (size * other * (other - 1))  # E b^2
        shared.append(far)
        slope = (own - own_mean) - 2 * (mixed - mixed_mean) + (far - square_of_mean)
        total += 4 / size * slope + 2 / pairs * (squares / pairs - 2 * own + own_mean)
    return total + 4 / (n * m) * (mean_square - shared[0] - shared[1] + square_of_mean)


def _leave_one_out(sums: KernelSums) -> list[Floats]:
    """The estimate without each image of the first set, and without each of the second."""
    n, m = len(sums.within_first), len(sums.within_second)
    total_x, total_y = sums.within_first.sum(), sums.within_second.sum()
    total_xy = sums.first_to_second.sum()
    without_x = (
        (total_x - 2 * sums.within_first) / ((n - 1) * (n - 2))
        + total_y / (m * (m - 1))
        - 2 * (total_xy - sums.first_to_second) / ((n - 1) * m)
    )
    without_y = (
        total_x / (n * (n - 1))
        + (total_y - 2 * sums.within_second) / ((m - 1) * (m - 2))
        - 2 * (total_xy - sums.second_to_first) / (n * (m - 1))
    )
    return [without_x, without_y]


def _checked(
    first: npt.NDArray[np.floating], second: npt.NDArray[np.floating], least: int
) -> tuple[Floats, Floats]:
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if min(len(x), len(y)) < least:
        raise EvaluationError(f"{min(len(x), len(y))} images are too few for a kernel distance")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise EvaluationError("features are not finite")
    return x, y


def _kernel_sums(x: Floats, y: Floats, degree: int, coefficient: float, block: int) -> KernelSums:
    dimension = x.shape[1]

    def kernel(a: Floats, b: Floats) -> Floats:
        return np.asarray((a @ b.T / dimension + coefficient) ** degree)

    def within(a: Floats) -> tuple[Floats, float]:
        sums, squares = np.zeros(len(a)), 0.0
        for start in range(0, len(a), block):
            rows = slice(start, start + block)
            for other in range(0, len(a), block):
                piece = kernel(a[rows], a[other : other + block])
                if start == other:
                    np.fill_diagonal(piece, 0.0)
                sums[rows] += piece.sum(axis=1)
                squares += float((piece * piece).sum())
        return sums, squares

    cross, back, squares_between = np.zeros(len(x)), np.zeros(len(y)), 0.0
    for start in range(0, len(x), block):
        for other in range(0, len(y), block):
            rows, columns = slice(start, start + block), slice(other, other + block)
            piece = kernel(x[rows], y[columns])
            cross[rows] += piece.sum(axis=1)
            back[columns] += piece.sum(axis=0)
            squares_between += float((piece * piece).sum())
    (first, squares_first), (second, squares_second) = within(x), within(y)
    return KernelSums(first, second, cross, back, squares_first, squares_second, squares_between)
