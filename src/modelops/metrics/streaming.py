"""Mean and covariance of features that are never held at once: fed in batches, merged, cached."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, ModelopsError
from modelops.base.files import sha256_json
from modelops.base.seeding import numpy_generator
from modelops.metrics.feature_files import release, row_chunks
from modelops.metrics.features import Extractor, write_arrays
from modelops.metrics.frechet import (
    DDOF,
    PAIRINGS,
    Statistics,
    features_to_frechet_distance,
    features_to_statistics,
    frechet_distance,
    frechet_interval,
    merge_statistics,
    parts_variance,
)
from modelops.metrics.intervals import Interval, jackknife_interval, normal_interval
from modelops.metrics.protocol import protocol_id


class RunningStatistics:
    """Accumulates mean [D] and covariance [D, D] in float64; memory does not grow with n.

    How the vectors were split into batches and processes changes the result by rounding only
    (1e-12 relative; tests/metrics).
    """

    def __init__(self, start: Statistics | None = None) -> None:
        self._total = start

    @property
    def n(self) -> int:
        """Vectors seen."""
        return self._total.n if self._total else 0

    def update(self, features: npt.NDArray[np.floating]) -> None:
        """Take in features [N, D] of any float type; N may be 0 or 1.

        Raises:
            EvaluationError: not a matrix, another D than before, or values that are not finite.
        """
        data = np.asarray(features, np.float64)
        if data.ndim != 2:
            raise EvaluationError(f"features of shape {data.shape}; a matrix is needed")
        if not np.isfinite(data).all():
            bad = int((~np.isfinite(data).all(axis=1)).sum())
            raise EvaluationError(f"{bad} of {len(data)} feature vectors are not finite")
        if len(data) == 0:
            return
        mean = data.mean(axis=0)
        centred = data - mean
        self.merge(Statistics(mean, centred.T @ centred / max(len(data) - DDOF, 1), len(data)))

    def merge(self, other: Statistics | RunningStatistics) -> None:
        """Take in what another process has seen.

        Raises:
            EvaluationError: its vectors are of another length.
        """
        part = other._total if isinstance(other, RunningStatistics) else other
        if part is None:
            return
        if self._total is None:
            self._total = part
            return
        if len(part.mean) != len(self._total.mean):
            raise EvaluationError(
                f"features of {len(self._total.mean)} and {len(part.mean)} dimensions"
            )
        self._total = merge_statistics(self._total, part)

    def statistics(self) -> Statistics:
        """Mean and covariance of all that was seen.

        Raises:
            EvaluationError: fewer than two vectors.
        """
        if self._total is None or self._total.n < 2:
            raise EvaluationError(f"statistics of {self.n} feature vectors; two are needed")
        return self._total


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Atomically write statistics as `.npz` without objects, for another process to merge."""
    write_arrays(
        path, mean=statistics.mean, covariance=statistics.covariance,
        n=np.array(statistics.n, np.int64),
    )  # fmt: skip


def read_statistics(path: Path) -> Statistics | None:
    """Read the result of `write_statistics`; None if the file is missing or damaged."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            mean = np.asarray(stored["mean"], np.float64)
            covariance = np.asarray(stored["covariance"], np.float64)
            n = int(stored["n"])
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean)) and n >= 1
    if not fits or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        return None
    return Statistics(mean, covariance, n)


def statistics_key(extractor: Extractor, digests: Sequence[str]) -> str:
    """Name of cached statistics: the extractor's protocol and the images, in whatever order."""
    return sha256_json(
        {"protocol": protocol_id(extractor.protocol), "ddof": DDOF, "images": sorted(digests)}
    )


def cached_statistics(
    extractor: Extractor,
    digests: Sequence[str],
    features: Callable[[], npt.NDArray[np.floating]],
    cache_dir: Path | None,
) -> Statistics:
    """Statistics of images named by content, from the cache or from their features.

    Args:
        digests: sha256 of each image's content; with the protocol they are the cache's key.
        features: gives [N, D], which may be a memory map; called when the cache does not know them.
        cache_dir: folder of the `KEY.npz` files; None turns the cache off. A damaged entry is
            computed again, and a folder that cannot be written is not an error.

    Raises:
        EvaluationError: fewer than two images, or features that are not finite.
    """
    path = cache_dir / f"{statistics_key(extractor, digests)}.npz" if cache_dir else None
    if path is not None:
        known = read_statistics(path)
        if known is not None and known.n == len(digests) and len(known.mean) == extractor.dim:
            return known
    found = stream_statistics(features())
    if path is not None:
        with contextlib.suppress(ModelopsError, OSError):
            write_statistics(path, found)
    return found


def stream_statistics(
    features: npt.NDArray[np.floating], rows: npt.NDArray[np.integer] | None = None
) -> Statistics:
    """Mean and covariance of features [N, D], or of some of their rows, read in chunks.

    Raises:
        EvaluationError: fewer than two vectors, or values that are not finite.
    """
    running = RunningStatistics()
    for part in row_chunks(len(features) if rows is None else len(rows)):
        running.update(features[part] if rows is None else features[rows[part]])
        release(features)
    return running.statistics()


def remove_statistics(whole: Statistics, part: Statistics) -> Statistics:
    """The statistics of a set without some of its vectors: `merge_statistics` turned round.

    Raises:
        EvaluationError: fewer than two vectors would be left.
    """
    n = whole.n - part.n
    if n < 2:
        raise EvaluationError(f"{whole.n} vectors without {part.n} leave too few")
    mean = (whole.mean * whole.n - part.mean * part.n) / n
    delta = part.mean - mean
    scatter = (
        whole.covariance * (whole.n - DDOF)
        - part.covariance * (part.n - DDOF)
        - np.outer(delta, delta) * (n * part.n / whole.n)
    )
    return Statistics(mean, scatter / (n - DDOF), n)


def streamed_interval(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    distance: Callable[[Statistics, Statistics], float],
    *,
    seed: int,
    groups: int = 40,
    confidence: float = 0.95,
    known: Statistics | None = None,
) -> Interval:
    """A distance of means and covariances with its interval, from features [N, D] and [M, D] that
    are never in memory as a whole.

    A delete-a-group jackknife over images of both sets: the statistics without a group follow from
    those of the group and of all images.

    Args:
        distance: of the two sets' statistics, such as `statistics_to_cmmd`'s value.
        known: statistics of the second set, if they are cached.

    Raises:
        EvaluationError: too few images for two groups a side, or features that are not finite.
    """
    for data in (first, second):
        if len(data) < 4:
            raise EvaluationError(f"{len(data)} images are too few for an interval")
    whole = [stream_statistics(first), known or stream_statistics(second)]
    value = distance(*whole)
    leave_out = []
    for side, data in enumerate((first, second)):
        count = min(groups, len(data) // 2)
        order = numpy_generator(seed, "streamed-groups", side).permutation(len(data))
        usable = order[: len(data) - len(data) % count]
        values = []
        for group in np.split(usable, count):
            left = remove_statistics(whole[side], stream_statistics(data, np.sort(group)))
            values.append(distance(left, whole[1]) if side == 0 else distance(whole[0], left))
        leave_out.append(np.asarray(values))
    counts = " and ".join(str(len(values)) for values in leave_out)
    method = f"delete-a-group jackknife over images, {counts} groups, t quantile"
    return jackknife_interval(value, leave_out, confidence=confidence, method=method)


def streamed_frechet_interval(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    seed: int,
    groups: int = 40,
    confidence: float = 0.95,
    known: Statistics | None = None,
) -> Interval:
    """`frechet_interval` for features in files: equal but for rounding, and memory does not grow
    with their number. See there for the interval: random halvings, and quarters that make them up.

    A set with at most as many vectors as dimensions is read into memory: there the form without
    covariances is cheaper, and exact where they are singular.

    Args:
        known: statistics of the second set, if they are cached.

    Raises:
        EvaluationError: fewer than four images of a set, or features that are not finite.
    """
    x, y = first, second
    if max(len(x), len(y)) <= 2 * x.shape[1]:
        return frechet_interval(
            np.array(x), np.array(y), seed=seed, groups=groups, confidence=confidence
        )
    if min(len(x), len(y)) < 4:
        raise EvaluationError(f"{min(len(x), len(y))} images are too few for an interval")
    generators = [numpy_generator(seed, "frechet-parts", side) for side in (0, 1)]
    rounds = max(1, round(groups / 3))
    halved, quartered = [], []
    for _ in range(rounds):
        cut = [
            [_part(data, np.sort(rows)) for rows in np.array_split(g.permutation(len(data)), 4)]
            for g, data in zip(generators, (x, y), strict=True)
        ]
        for pairing in PAIRINGS:
            made = [_part_distance(*(_joined(side[a], side[b]) for side in cut))
                    for a, b in pairing]  # fmt: skip
            halved.append((made[0] - made[1]) ** 2 / 2)
        if min(len(x), len(y)) >= 8:
            quarters = [_part_distance(*pair) for pair in zip(*cut, strict=True)]
            quartered.append(float(np.var(quarters, ddof=1)))
    value = _part_distance(stream_statistics(x), known or stream_statistics(y))
    return normal_interval(
        value, parts_variance(halved, quartered or [np.nan]),
        freedom=3 * rounds, confidence=confidence,
        method=f"{3 * rounds} random halvings of both sets, with a second-order term from quarters",
    )  # fmt: skip


_Part = Statistics | npt.NDArray[np.float64]  # of few vectors, the vectors themselves


def _part(data: npt.NDArray[np.floating], rows: npt.NDArray[np.integer]) -> _Part:
    if len(rows) > data.shape[1]:
        return stream_statistics(data, rows)
    return np.asarray(data[rows], np.float64)


def _as_statistics(part: _Part) -> Statistics:
    return part if isinstance(part, Statistics) else features_to_statistics(part)


def _joined(first: _Part, second: _Part) -> _Part:
    if isinstance(first, Statistics) or isinstance(second, Statistics):
        return merge_statistics(_as_statistics(first), _as_statistics(second))
    return np.concatenate([first, second])


def _part_distance(first: _Part, second: _Part) -> float:
    if not isinstance(first, Statistics) and not isinstance(second, Statistics):
        return features_to_frechet_distance(first, second)
    pair = sorted(map(_as_statistics, (first, second)), key=lambda part: -part.n)
    return frechet_distance(*pair)  # the first with a covariance of full rank
