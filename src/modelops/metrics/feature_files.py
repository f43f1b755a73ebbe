"""Features in files: written chunk by chunk, read as memory maps, and a bounded cache of them.

A file holds one matrix [N, D] float32 in numpy's own format (`.npy`, never with objects). Its name
is the digest of the extractor's protocol and the images' digests, so a hit is the same numbers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, ModelopsError
from modelops.base.files import atomic_path
from modelops.metrics.features import (
    Extractor,
    Features,
    Image,
    OnProgress,
    cached_features,
    features_key,
    in_threads,
)

CHUNK = 1024  # rows at a time; a multiple of every extractor's batch, so that batches stay the same
CACHE_BYTES = 4 << 30


def row_chunks(n: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover n rows in order."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def write_features(
    extractor: Extractor,
    count: int,
    load: Callable[[int], Image],
    path: Path,
    *,
    on_progress: OnProgress | None = None,
) -> None:
    """Extract features of `count` images into a file, atomically; memory does not grow with them.

    Args:
        load: reads image i as uint8 [H, W, 3]; called from several threads.

    Raises:
        EvaluationError: features that are not finite.
        ModelopsError: the file cannot be written.
    """
    workers = min(4, os.cpu_count() or 1)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, extractor.dim)}
        np.lib.format.write_array_header_1_0(handle, header)
        for rows in row_chunks(count):
            images = in_threads(
                load, range(rows.start, rows.stop), workers=workers, ahead=4 * workers
            )
            features = np.ascontiguousarray(extractor.images_to_features(images), "<f4")
            if bad := int((~np.isfinite(features).all(axis=1)).sum()):
                raise EvaluationError(
                    f"{bad} of {len(features)} images have features that are not finite"
                )
            handle.write(features.data)
            if on_progress:
                on_progress(rows.stop, count)


def map_features(path: Path, count: int | None = None, dim: int | None = None) -> Features | None:
    """The matrix of a file as a memory map, read only; None if it is missing, damaged or of another
    shape."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.ndim != 2:
        return None
    if found.shape != (len(found) if count is None else count, dim or found.shape[1]):
        return None
    for rows in row_chunks(len(found)):
        if not np.isfinite(found[rows]).all():
            return None
        release(found)
    return found


def release(features: npt.NDArray[np.floating]) -> None:
    """Let go of the pages of a memory map that were read; they are read again when needed."""
    mapped = getattr(features, "_mmap", None)
    if mapped is not None:
        import mmap

        with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Cache folder of feature files, for many evaluations against the same images.

    Attributes:
        folder: None turns the cache off. A folder that cannot be written is not an error.
        limit: bytes; above it the least recently used files are removed.
    """

    folder: Path | None
    limit: int = CACHE_BYTES

    def features(
        self,
        extractor: Extractor,
        digests: Sequence[str],
        load: Callable[[int], Image],
        *,
        on_progress: OnProgress | None = None,
    ) -> Features:
        """Features [N, D] of images named by content: from the cache, or extracted and kept."""
        if self.folder is None:
            return cached_features(extractor, digests, load, None, on_progress=on_progress)
        path = self.folder / f"{features_key(extractor, digests)}.npy"
        found = map_features(path, len(digests), extractor.dim)
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(path)
            return found
        try:
            write_features(extractor, len(digests), load, path, on_progress=on_progress)
        except EvaluationError:
            raise
        except (ModelopsError, OSError):  # a folder that cannot be written
            return cached_features(extractor, digests, load, None, on_progress=on_progress)
        found = map_features(path, len(digests), extractor.dim)
        if found is None:
            raise EvaluationError(f"{path}: written, and cannot be read")
        self.tidy(keep=path)
        return found

    def tidy(self, *, keep: Path) -> None:
        """Remove the least recently used files until the folder is within its limit."""
        if self.folder is None:
            return
        known = []
        for path in self.folder.glob("*.np[yz]"):
            with contextlib.suppress(OSError):  # removed by another process
                known.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if total <= self.limit:
                return
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size
