"""Mean and covariance of features that are never held at once: fed in batches, merged, cached."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.errors import EvaluationError, ModelopsError
from modelops.files import sha256_json
from modelops.metrics.features import Extractor, Image, OnProgress, write_arrays
from modelops.metrics.frechet import DDOF, Statistics, merge_statistics
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
    """What `write_statistics` wrote, or None if the file is missing or damaged."""
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
    load: Callable[[int], Image],
    cache_dir: Path | None,
    *,
    batch: int = 256,
    on_progress: OnProgress | None = None,
) -> Statistics:
    """Statistics of images named by content, `batch` images at a time, or from the cache.

    Args:
        digests: sha256 of each image's content; with the protocol they are the cache's key.
        load: reads image i as uint8 [H, W, 3].
        cache_dir: where `KEY.npz` files lie; None turns the cache off. A damaged entry is computed
            again, and a folder that cannot be written is no error.

    Raises:
        EvaluationError: fewer than two images, or features that are not finite.
    """
    path = cache_dir / f"{statistics_key(extractor, digests)}.npz" if cache_dir else None
    if path is not None:
        known = read_statistics(path)
        if known is not None and known.n == len(digests) and len(known.mean) == extractor.dim:
            return known
    running = RunningStatistics()
    for start in range(0, len(digests), batch):
        rows = range(start, min(start + batch, len(digests)))
        images: Iterable[Image] = (load(row) for row in rows)
        running.update(extractor.images_to_features(images))
        if on_progress:
            on_progress(running.n, len(digests))
    found = running.statistics()
    if path is not None:
        try:
            write_statistics(path, found)
        except ModelopsError:
            return found
    return found
