"""Feature extractors with a protocol identity, and a content-addressed cache of features."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelops.errors import EvaluationError, IntegrityError, MissingWeightsError, ModelopsError
from modelops.files import atomic_path, sha256_file, sha256_json
from modelops.metrics.protocol import protocol_id

Image = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
OnProgress = Callable[[int, int], None]


class Extractor(Protocol):
    """Turns images into feature vectors in exactly one way."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that a feature's value depends on, beside the image."""

    @property
    def dim(self) -> int:
        """Length of a feature vector."""

    def images_to_features(
        self, images: Iterable[Image], *, on_progress: Callable[[int], None] | None = None
    ) -> Features:
        """Images [H, W, 3] uint8 RGB of any sizes to features [N, D] float32."""


class Lite0Extractor:
    """Pooled features of EfficientNet-Lite0, whose ImageNet weights come inside a package."""

    def __init__(self, *, batch_size: int = 64) -> None:
        from modelops.models.encoders import LITE0_DIM, LITE0_NAME, LITE0_SHA256, LITE0_SIZE

        self.dim = LITE0_DIM
        self.batch_size = batch_size
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
        from modelops.models.encoders import Lite0, images_to_lite0_features

        if self._network is None:
            self._network = Lite0()
        return images_to_lite0_features(
            images, network=self._network, batch_size=self.batch_size, on_progress=on_progress
        )


class InceptionExtractor:
    """The 2015-12-05 Inception graph in its TorchScript form, with clean-fid's `clean` resize.

    Args:
        weights: path of `inception-2015-12-05.pt` (clean-fid downloads it to its cache). It is a
            TorchScript archive, that is, code: use only a file you trust. Its sha256 is part of
            the protocol.
        sha256: if given, the digest that the file must have.
    """

    dim = 2048

    def __init__(self, weights: Path, *, sha256: str | None = None, batch_size: int = 32) -> None:
        if not Path(weights).is_file():
            raise MissingWeightsError(
                f"{weights}: no such file",
                hint="give the path of clean-fid's inception-2015-12-05.pt",
            )
        self.weights = Path(weights)
        self.batch_size = batch_size
        self._layers: Any = None
        digest = sha256_file(weights)
        if sha256 is not None and digest != sha256:
            raise IntegrityError(f"{weights}: sha256 {digest[:12]}, expected {sha256[:12]}")
        self.protocol: dict[str, Any] = {
            "extractor": "inception-2015-12-05 (TorchScript)",
            "weights_sha256": digest,
            "layer": "pool3",
            "dim": self.dim,
            "resize": "clean-fid clean: 299 px, PIL bicubic on float32 channels",
            "clamp": "[0, 255]",
            "quantised": False,
            "normalisation": "(x - 128) / 128",
            "dtype": "float32",
        }

    def images_to_features(
        self, images: Iterable[Image], *, on_progress: Callable[[int], None] | None = None
    ) -> Features:
        import torch
        from cleanfid.resize import build_resizer

        if self._layers is None:
            try:
                self._layers = torch.jit.load(str(self.weights), map_location="cpu").eval().layers
            except (RuntimeError, AttributeError) as error:
                raise MissingWeightsError(
                    f"{self.weights}: not the Inception TorchScript archive",
                    hint="give the path of clean-fid's inception-2015-12-05.pt",
                ) from error
        resize = build_resizer("clean")
        features: list[Features] = []
        pending: list[npt.NDArray[np.float32]] = []

        def flush() -> None:
            if pending:
                batch = torch.from_numpy(np.stack(pending)).permute(0, 3, 1, 2)
                with torch.no_grad():
                    output = self._layers((batch - 128.0) / 128.0)
                features.append(output.view(len(pending), self.dim).numpy())
                pending.clear()
                if on_progress:
                    on_progress(sum(map(len, features)))

        for image in images:
            pending.append(resize(image))
            if len(pending) == self.batch_size:
                flush()
        flush()
        return np.concatenate(features) if features else np.zeros((0, self.dim), np.float32)


def cached_features(
    extractor: Extractor,
    digests: Sequence[str],
    load: Callable[[int], Image],
    cache_dir: Path | None,
    *,
    on_progress: OnProgress | None = None,
) -> Features:
    """Features [N, D] of images named by content, from the cache if they were computed before.

    Args:
        digests: sha256 of each image's content; with the protocol they are the cache's key.
        load: reads image i as uint8 [H, W, 3].
        cache_dir: where `KEY.npz` files lie; None turns the cache off. One that cannot be written
            is no error.
    """
    key = sha256_json({"protocol": protocol_id(extractor.protocol), "images": list(digests)})
    path = cache_dir / f"{key}.npz" if cache_dir else None
    if path and path.is_file():
        stored = _read_features(path, len(digests), extractor.dim)
        if stored is not None:
            return stored
    features = extractor.images_to_features(
        (load(index) for index in range(len(digests))),
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
    """What the cache holds, or None if it is damaged."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            features = np.asarray(stored["features"], np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return features if features.shape == (n, dim) and np.isfinite(features).all() else None
