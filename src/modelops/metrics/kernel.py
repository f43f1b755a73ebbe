"""Kernel distance (KID's estimator): squared MMD with a cubic polynomial kernel.

k(x, y) = (x.y / D + 1)^3, unbiased U-statistic over whole sets (Binkowski et al., 2018). It may be
negative. Kernels are evaluated blockwise, so memory does not grow with n^2.
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
    """Row sums of the kernel matrices; diagonals left out of `within_*`."""

    within_first: Floats  # [N]
    within_second: Floats  # [M]
    first_to_second: Floats  # [N]
    second_to_first: Floats  # [M]


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
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise EvaluationError(f"{min(n, m)} images are too few for a kernel distance")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise EvaluationError("features are not finite")
    sums = _kernel_sums(x, y, degree, coefficient, block)
    total_x, total_y = sums.within_first.sum(), sums.within_second.sum()
    total_xy = sums.first_to_second.sum()

    within_x, within_y = total_x / (n * (n - 1)), total_y / (m * (m - 1))
    value = float(within_x + within_y - 2 * total_xy / (n * m))
    without_x = (
        (total_x - 2 * sums.within_first) / ((n - 1) * (n - 2))
        + within_y
        - 2 * (total_xy - sums.first_to_second) / ((n - 1) * m)
    )
    without_y = (
        within_x
        + (total_y - 2 * sums.within_second) / ((m - 1) * (m - 2))
        - 2 * (total_xy - sums.second_to_first) / (n * (m - 1))
    )
    return jackknife_interval(
        value, [without_x, without_y], confidence=confidence,
        method="unbiased U-statistic, delete-one jackknife over images",
    )  # fmt: skip


def _kernel_sums(x: Floats, y: Floats, degree: int, coefficient: float, block: int) -> KernelSums:
    dimension = x.shape[1]

    def rows(a: Floats, b: Floats) -> Floats:
        """Row sums of k(a, b)."""
        total = np.zeros(len(a))
        for start in range(0, len(b), block):
            piece = b[start : start + block]
            total += ((a @ piece.T / dimension + coefficient) ** degree).sum(axis=1)
        return total

    def within(a: Floats) -> Floats:
        sums = [rows(a[start : start + block], a) for start in range(0, len(a), block)]
        diagonal = ((a * a).sum(axis=1) / dimension + coefficient) ** degree
        return np.concatenate(sums) - diagonal

    cross, back = [], np.zeros(len(y))
    for start in range(0, len(x), block):
        kernel = (x[start : start + block] @ y.T / dimension + coefficient) ** degree
        cross.append(kernel.sum(axis=1))
        back += kernel.sum(axis=0)
    return KernelSums(within(x), within(y), np.concatenate(cross), back)
