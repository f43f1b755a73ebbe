"""Have the images changed? Tests of the mean and of the covariance of their features.

Two samples of features are pooled and described by their first `DIRECTIONS` principal directions,
in units of the pooled standard deviation; the mean is tested along these. The covariance test also
uses the length of the residual, which counts as much as the variances along the directions. The
directions are those of both samples together and treat both alike. So if both are drawn from one
distribution, every way to deal the rows to the two samples is equally likely, and the permutation
tests hold their level at any n, even far below the features' dimension. (With directions of the
reference alone its own rows are special, and every later window looks different: that test would
always alarm. A Fréchet distance of 400 images in 1,280 dimensions has the same problem: its bias is
larger than the effect to find.)

The effect is in standard deviations, without the part that noise adds, so that a margin means the
same at any n. Its interval is a basic bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.seeding import numpy_generator

Floats = npt.NDArray[np.float64]
DIRECTIONS = 16
MAX_ROWS = 2000  # of a sample; more are thinned out at random
BOOTSTRAP = 999
_CELLS = 4_000_000  # float64 values of one block of weights
Distance = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True, slots=True)
class Shift:
    """One test of two samples.

    Attributes:
        statistic: squared distance of the two estimates.
        p: permutation p-value.
        effect: root of the distance without the part of the noise; of means in standard
            deviations, of covariances relative to the whole (Frobenius).
        low, high: 95 % interval of the effect.
    """

    statistic: float
    p: float
    effect: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PictureShifts:
    """The two tests, and the rows and directions they were made on."""

    mean: Shift
    covariance: Shift
    n_first: int
    n_second: int
    directions: int


def picture_shifts(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    seed: int,
    permutations: int = 4999,
    bootstrap: int = BOOTSTRAP,
    directions: int = DIRECTIONS,
) -> PictureShifts:
    """Tests of "both features [N, D], [M, D] have the same mean", and "the same covariance".

    Rows must be independent: one image a prompt. The null hypothesis of either permutation test
    is that the whole distributions are equal; the statistic is what makes it a test of one or the
    other.

    Raises:
        EvaluationError: fewer than 20 rows a side, or features that are not finite.
    """
    a, b = _thinned(first, seed, "first"), _thinned(second, seed, "second")
    if min(len(a), len(b)) < 20:
        raise EvaluationError(f"{min(len(a), len(b))} images are too few to compare")
    rows, left_over = _coordinates(np.concatenate([a, b]), directions)
    k = rows.shape[1]
    upper = np.triu_indices(k)
    seconds = np.column_stack([rows[:, upper[0]] * rows[:, upper[1]], left_over])
    # Entries off the diagonal count twice; what is left over, as often as there are directions.
    twice = np.append(np.where(upper[0] == upper[1], 1.0, 2.0), float(k))
    n = len(a)

    def moments(weights: Floats) -> tuple[Floats, Floats]:
        """Means [B, k], and covariances and what is left over [B, k (k + 1) / 2 + 1], under
        weights [B, n] that sum to 1."""
        means = weights @ rows
        covariances = weights @ seconds
        covariances[:, :-1] -= means[:, upper[0]] * means[:, upper[1]]
        return means, covariances

    def distances(left: Floats, right: Floats) -> tuple[Floats, Floats]:
        (mean_a, cov_a), (mean_b, cov_b) = moments(left), moments(right)
        return ((mean_a - mean_b) ** 2).sum(axis=1), (twice * (cov_a - cov_b) ** 2).sum(axis=1)

    observed = distances(*_labels(np.arange(len(rows))[None], n))
    generator = numpy_generator(seed, "drift", "permutations")
    dealt = _blocks(
        permutations, len(rows), lambda count: distances(
            *_labels(generator.permuted(np.tile(np.arange(len(rows)), (count, 1)), axis=1), n)
        ),
    )  # fmt: skip
    generator = numpy_generator(seed, "drift", "bootstrap")
    drawn = _blocks(
        bootstrap, len(rows), lambda count: distances(*_resampled(n, len(b), count, generator))
    )
    mean, covariance = (
        _shift(float(observed[i][0]), dealt[i], drawn[i], unit) for i, unit in ((0, 1), (1, k))
    )
    return PictureShifts(mean, covariance, len(a), len(b), k)


def _shift(observed: float, dealt: Floats, drawn: Floats, unit: float) -> Shift:
    p = (1 + int((dealt >= observed * (1 - 1e-9)).sum())) / (len(dealt) + 1)
    noise = float(dealt.mean())
    squared = observed - noise
    # In the bootstrap's world the truth is `observed`, and an estimate is a draw less the noise.
    errors = drawn - noise - observed
    low, high = squared - np.quantile(errors, [0.975, 0.025])

    def root(value: float) -> float:
        return float(np.sqrt(max(0.0, value) / unit))

    effect = root(squared)
    return Shift(observed, p, effect, min(root(low), effect), max(root(high), effect))


def _coordinates(rows: Floats, directions: int) -> tuple[Floats, Floats]:
    """Rows along the pooled principal directions [n, k], and the length of what is left over [n],
    around 0 and in units of the pooled standard deviation."""
    centred = rows - rows.mean(axis=0)
    if len(rows) <= rows.shape[1]:
        values, vectors = np.linalg.eigh(centred @ centred.T)
        keep = min(directions, int((values > 1e-9 * max(values[-1], 1e-300)).sum()))
        scores = vectors[:, ::-1][:, :keep] * np.sqrt(np.maximum(values[::-1][:keep], 0.0))
    else:
        values, vectors = np.linalg.eigh(centred.T @ centred)
        keep = min(directions, int((values > 1e-9 * max(values[-1], 1e-300)).sum()))
        scores = centred @ vectors[:, ::-1][:, :keep]
    if not keep:
        return np.zeros((len(rows), 1)), np.zeros(len(rows))  # all images are the same
    left = np.maximum((centred**2).sum(axis=1) - (scores**2).sum(axis=1), 0.0)
    if left.sum() > 1e-9 * float((centred**2).sum()):
        left = np.sqrt(left)
        left = (left - left.mean()) / max(float(left.std()), 1e-300)
    else:
        left = np.zeros(len(rows))
    return np.asarray(scores / scores.std(axis=0)), left


def _labels(order: npt.NDArray[np.integer], n: int) -> tuple[Floats, Floats]:
    """Weights [B, rows] of the first n and of the other rows of each order [B, rows]."""
    count, rows = order.shape
    left = np.zeros((count, rows))
    np.put_along_axis(left, order[:, :n], 1.0 / n, axis=1)
    return left, np.where(left > 0, 0.0, 1.0 / (rows - n))


def _resampled(n: int, m: int, count: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    left, right = np.zeros((count, n + m)), np.zeros((count, n + m))
    left[:, :n] = generator.multinomial(n, np.full(n, 1 / n), count) / n
    right[:, n:] = generator.multinomial(m, np.full(m, 1 / m), count) / m
    return left, right


def _blocks(
    total: int, rows: int, draw: Callable[[int], tuple[Floats, Floats]]
) -> tuple[Floats, Floats]:
    block = max(1, _CELLS // rows)
    made = [draw(min(block, total - done)) for done in range(0, total, block)]
    return np.concatenate([one for one, _ in made]), np.concatenate([two for _, two in made])


def _thinned(features: npt.NDArray[np.floating], seed: int, side: str) -> Floats:
    if len(features) > MAX_ROWS:
        generator = numpy_generator(seed, "drift", "rows", side)
        features = features[np.sort(generator.choice(len(features), MAX_ROWS, replace=False))]
    data = np.asarray(features, np.float64)
    if data.ndim != 2 or not np.isfinite(data).all():
        raise EvaluationError(f"features of shape {data.shape} that are not all finite")
    return data
