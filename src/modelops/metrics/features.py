"""Feature extractors with a protocol identity, and a content-addressed cache of features."""

from __future__ import annotations

import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, ModelopsError
from modelops.base.files import atomic_path, sha256_json
from modelops.metrics.protocol import protocol_id

Image = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
OnProgress = Callable[[int, int], None]
T = TypeVar("T")
R = TypeVar("R")


class Extractor(Protocol):
    """Turns images into feature vectors in exactly one way."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Protocol: all that a feature's value depends on, beside the image."""

    @property
    def dim(self) -> int:
        """Length of a feature vector."""

    def images_to_features(
        self, images: Iterable[Image], *, on_progress: Callable[[int], None] | None = None
    ) -> Features:
        """Images [H, W, 3] uint8 RGB of any sizes to features [N, D] float32."""


class Lite0Extractor:
    """Pooled features of EfficientNet-Lite0, whose ImageNet weights come inside a package."""

    def __init__(self, *, batch_size: int = 64, device: str = "cpu") -> None:
        from modelops.models.encoders import LITE0_DIM, LITE0_NAME, LITE0_SHA256, LITE0_SIZE

        self.dim = LITE0_DIM
        self.batch_size = batch_size
        self.device = device
        self._network: Any = None
        self.protocol: dict[str, Any] = {
            "extractor": LITE0_NAME,
            "weights_sha256": LITE0_SHA256,
            "layer": "pooled, before the classifier",
            "dim": LITE0_DIM,
            "resize": f"{LITE0_SIZE} px, bicubic, antialiased, float32",
            "clamp": "[0, 255]",
            "quantised": False,
            "normalisation": "(x - 127) / 128",
            "dtype": "float32",
        }

    def images_to_features(
        self, images: Iterable[Image], *, on_progress: Callable[[int], None] | None = None
    ) -> Features:
        from modelops.models.devices import full_float32, open_device
        from modelops.models.encoders import Lite0, images_to_lite0_features

        if self._network is None:
            self._network = Lite0().to(open_device(self.device))
        with full_float32():
            return images_to_lite0_features(
                images, network=self._network, batch_size=self.batch_size, on_progress=on_progress
            )


def in_threads(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int
) -> Iterator[R]:
    """Yield function(item) for each item, in order; at most `ahead` are begun in advance.

    For work that leaves the interpreter's lock (decoding, resizing), beside a network that runs.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def features_key(extractor: Extractor, digests: Sequence[str]) -> str:
    """Name of cached features: the extractor's protocol and the images, in order."""
    return sha256_json({"protocol": protocol_id(extractor.protocol), "images": list(digests)})


def cached_features(
    extractor: Extractor,
    digests: Sequence[str],
    load: Callable[[int], Image],
    cache_dir: Path | None,
    *,
    on_progress: OnProgress | None = None,
    compute: Callable[[], Features | None] | None = None,
) -> Features:
    """Features [N, D] of images named by content, from the cache if they were computed before.

    Args:
        digests: sha256 of each image's content; with the protocol they are the cache's key.
        load: reads image i as uint8 [H, W, 3]; called from several threads.
        cache_dir: folder of the `KEY.npz` files; None turns the cache off. A folder that cannot be
            written is not an error.
        compute: another source of the features, asked before the images are read here; if it
            returns None they are read here.
    """
    path = cache_dir / f"{features_key(extractor, digests)}.npz" if cache_dir else None
    if path and path.is_file():
        stored = _read_features(path, len(digests), extractor.dim)
        if stored is not None:
            return stored
    features = compute() if compute else None
    if features is None:
        workers = min(4, os.cpu_count() or 1)
        features = extractor.images_to_features(
            in_threads(load, range(len(digests)), workers=workers, ahead=4 * workers),
            on_progress=(lambda done: on_progress(done, len(digests))) if on_progress else None,
        )
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise EvaluationError(f"{bad} of {len(features)} images have features that are not finite")
    if path:
        try:
            write_arrays(path, features=features)
        except ModelopsError:
            return features
    return features


def write_arrays(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Atomically write plain arrays as `.npz`; objects are refused."""
    if any(array.dtype.hasobject for array in arrays.values()):
        raise EvaluationError(f"{path}: arrays of objects are not written")
    plain: dict[str, Any] = dict(arrays)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **plain)


def _read_features(path: Path, n: int, dim: int) -> Features | None:
    """Read the cache; None if it is damaged."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            features = np.asarray(stored["features"], np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return features if features.shape == (n, dim) and np.isfinite(features).all() else None
