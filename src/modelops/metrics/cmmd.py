"""CMMD: squared MMD with a Gaussian kernel between embeddings (Jayasumana et al., CVPR 2024).

1000 * MMD^2, k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, embeddings of length 1. The
paper's code averages over whole kernel matrices, diagonals included (the biased V-statistic); so
does `cmmd` unless told otherwise. It is called CMMD only on CLIP ViT-L/14-336 embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.metrics.frechet import DDOF, Statistics
from modelops.metrics.intervals import Interval, jackknife_interval

Floats = npt.NDArray[np.float64]
SIGMA = 10.0
SCALE = 1000.0


def cmmd(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    sigma: float = SIGMA,
    scale: float = SCALE,
    unbiased: bool = False,
    confidence: float = 0.95,
    block: int = 1024,
) -> Interval:
    """scale * MMD^2 between embeddings [N, E] and [M, E], which are normalised here; exact.

    Blockwise, so memory does not grow with N M. The interval is a delete-one jackknife, in closed
    form from the row sums of the kernels.

    Args:
        unbiased: leave the diagonals out (the U-statistic, which may be negative).

    Raises:
        EvaluationError: fewer than three embeddings, or one that is zero or not finite.
    """
    x, y = _unit(first), _unit(second)
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise EvaluationError(f"{min(n, m)} images are too few for CMMD")
    rows_x, _ = _kernel_sums(x, x, sigma, block)
    rows_y, _ = _kernel_sums(y, y, sigma, block)
    cross_x, cross_y = _kernel_sums(x, y, sigma, block)

    def within(total: Floats | float, count: int) -> Floats | float:
        """Mean of a kernel matrix from its sum with the diagonal, whose entries are 1."""
        return (total - count) / (count * (count - 1)) if unbiased else total / count**2

    total_x, total_y, total_xy = rows_x.sum(), rows_y.sum(), cross_x.sum()
    value = float(within(total_x, n) + within(total_y, m) - 2 * total_xy / (n * m))
    without_x = (
        within(total_x - 2 * rows_x + 1, n - 1) + within(total_y, m)
        - 2 * (total_xy - cross_x) / ((n - 1) * m)
    )  # fmt: skip
    without_y = (
        within(total_x, n) + within(total_y - 2 * rows_y + 1, m - 1)
        - 2 * (total_xy - cross_y) / (n * (m - 1))
    )  # fmt: skip
    kind = "unbiased U" if unbiased else "V"
    return jackknife_interval(
        scale * value, [scale * np.asarray(without_x), scale * np.asarray(without_y)],
        confidence=confidence, method=f"{kind}-statistic, delete-one jackknife over images",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamedCmmd:
    """A value from moments, and how far below the exact one it can be at most."""

    value: float
    error_bound: float


def statistics_to_cmmd(
    first: Statistics, second: Statistics, *, sigma: float = SIGMA, scale: float = SCALE
) -> StreamedCmmd:
    """CMMD (the V-statistic) from mean and covariance of normalised embeddings, for any n.

    For vectors of length 1, k = exp(-1 / sigma^2) exp(x.y / sigma^2), whose series in x.y has the
    squared distance of the j-th moments as its j-th term. Two terms are kept; the rest is not
    negative and at most 4 sum_{j>2} 1 / (j! sigma^2j): 7e-4 of the scaled value at sigma = 10 in
    the worst case, and 3e-5 of 2.2 as measured.

    Raises:
        EvaluationError: the statistics are not those of vectors of length 1, or sigma is below 3,
            where two moments do not suffice.
    """
    if sigma < 3:
        raise EvaluationError(f"sigma {sigma}: too small for two moments; use the exact form")
    if len(first.mean) != len(second.mean):
        raise EvaluationError(f"{len(first.mean)} and {len(second.mean)} dimensions")
    moments = []
    for part in (first, second):
        moment = part.covariance * ((part.n - DDOF) / part.n) + np.outer(part.mean, part.mean)
        if abs(np.trace(moment) - 1.0) > 1e-3:
            raise EvaluationError(
                "these statistics are not those of normalised embeddings",
                hint="divide each embedding by its length before it is added",
            )
        moments.append(moment)
    gap = first.mean - second.mean
    u = 1.0 / sigma**2
    series = u * float(gap @ gap) + u**2 / 2 * float(((moments[0] - moments[1]) ** 2).sum())
    rest = np.exp(u) - 1.0 - u - u**2 / 2
    return StreamedCmmd(float(scale * np.exp(-u) * series), float(scale * np.exp(-u) * 4.0 * rest))


def _kernel_sums(x: Floats, y: Floats, sigma: float, block: int) -> tuple[Floats, Floats]:
    """Row sums [N] and column sums [M] of the kernel matrix of unit vectors."""
    rows, columns = [], np.zeros(len(y))
    for start in range(0, len(x), block):
        kernel = np.exp((x[start : start + block] @ y.T - 1.0) / sigma**2)
        rows.append(kernel.sum(axis=1))
        columns += kernel.sum(axis=0)
    return np.concatenate(rows), columns


def _unit(vectors: npt.NDArray[np.floating]) -> Floats:
    data = np.asarray(vectors, np.float64)
    if data.ndim != 2:
        raise EvaluationError(f"embeddings of shape {data.shape}; a matrix is needed")
    lengths = np.linalg.norm(data, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise EvaluationError("an embedding is zero or not finite")
    return np.asarray(data / lengths)
