"""Embeddings of a manifest's images, cached on disk in chunks so that a killed run can continue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError, UsageError
from modelops.base.files import atomic_path, read_json, sha256_json, write_json
from modelops.base.pixels import pixels_sha256
from modelops.data.images import read_image
from modelops.data.manifest import Manifest, Sample

CHUNK = 256  # samples
CACHE = Path(".cache/embeddings")  # below the manifest's folder
OnProgress = Callable[[int, int], None]  # (done, total)
Image = npt.NDArray[np.uint8]


class Encoder(Protocol):
    """Encoder of images as vectors. `name`, `weights_sha256` and `dim` identify its output."""

    @property
    def name(self) -> str: ...

    @property
    def weights_sha256(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def encode(self, images: Iterable[Image]) -> npt.NDArray[np.float32]:
        """Images uint8 [H, W, 3] of any sizes to features float32 [N, dim]."""
        ...


class Lite0Encoder:
    """EfficientNet-Lite0 with ImageNet weights: the encoder that needs no download."""

    def __init__(self) -> None:
        from modelops.models import encoders

        self.name = encoders.LITE0_NAME
        self.weights_sha256 = encoders.LITE0_SHA256
        self.dim = encoders.LITE0_DIM

    @functools.cached_property
    def _network(self) -> Any:
        from modelops.models.encoders import Lite0

        return Lite0()

    def encode(self, images: Iterable[Image]) -> npt.NDArray[np.float32]:
        """Images uint8 [H, W, 3] of any sizes to features float32 [N, 1280]."""
        from modelops.models.encoders import images_to_lite0_features

        return images_to_lite0_features(images, network=self._network)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Embeddings of the readable samples of a manifest.

    Attributes:
        samples: the readable samples, in manifest order.
        features: float32 [N, D], as the encoder gave them (not normalised).
        pixels: sha256 of each decoded image (shape and bytes).
        faults: {id: reason} of the samples that cannot be decoded.
    """

    samples: list[Sample]
    features: npt.NDArray[np.float32]
    pixels: list[str]
    faults: dict[str, str]


def embed_manifest(
    manifest: Manifest,
    encoder: Encoder | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> Embeddings:
    """Embed every image; chunks already cached for the same bytes and weights are not redone.

    Args:
        manifest: read with its files checked, because sha256 is the cache's key.
        encoder: Lite0 if none is given.
        on_progress: called with (done, total).
    """
    chosen = encoder or Lite0Encoder()
    cache = manifest.root / CACHE / f"{chosen.name}-{chosen.weights_sha256[:12]}"
    samples: list[Sample] = []
    features: list[npt.NDArray[np.float32]] = []
    pixels: list[str] = []
    faults: dict[str, str] = {}
    total = len(manifest.rows)
    for start in range(0, total, CHUNK):
        chunk = manifest.rows[start : start + CHUNK]
        matrix, digests, reasons = _embed_chunk(manifest, chunk, chosen, cache)
        usable = [index for index in range(len(chunk)) if index not in reasons]
        samples += [chunk[index] for index in usable]
        pixels += [digests[index] for index in usable]
        features.append(matrix[usable])
        faults |= {chunk[index].id: reason for index, reason in reasons.items()}
        if on_progress:
            on_progress(start + len(chunk), total)
    joined = np.concatenate(features) if features else np.zeros((0, chosen.dim), np.float32)
    return Embeddings(samples, joined, pixels, faults)


def _embed_chunk(
    manifest: Manifest, chunk: list[Sample], encoder: Encoder, cache: Path
) -> tuple[npt.NDArray[np.float32], list[str], dict[int, str]]:
    """(features [N, D] with zero rows for faults, pixel digests, {index: fault}) of one chunk."""
    key = sha256_json([[s.sha256, Path(s.filepath).suffix.lower()] for s in chunk])[:32]
    matrix_path, notes_path = cache / f"{key}.npy", cache / f"{key}.json"
    cached = _read_cached(matrix_path, notes_path, len(chunk), encoder.dim)
    if cached is not None:
        return cached
    digests = [""] * len(chunk)
    faults: dict[int, str] = {}

    def readable() -> Iterator[Image]:
        for index, sample in enumerate(chunk):
            try:
                image = read_image(manifest.image_path(sample))
            except ImageError as error:
                faults[index] = error.message
                continue
            digests[index] = pixels_sha256(image)
            yield image

    found = encoder.encode(readable())
    matrix = np.zeros((len(chunk), encoder.dim), np.float32)
    matrix[[index for index in range(len(chunk)) if index not in faults]] = found
    with atomic_path(matrix_path) as temporary, temporary.open("wb") as handle:
        np.save(handle, matrix, allow_pickle=False)
    write_json(
        notes_path, {"pixels": digests, "faults": {str(k): v for k, v in faults.items()}}
    )  # last: a chunk counts as cached when its notes are there
    return matrix, digests, faults


def _read_cached(
    matrix_path: Path, notes_path: Path, count: int, dim: int
) -> tuple[npt.NDArray[np.float32], list[str], dict[int, str]] | None:
    """A cached chunk, or None if it is not there or not whole."""
    if not (matrix_path.is_file() and notes_path.is_file()):
        return None
    try:
        matrix = np.load(matrix_path, allow_pickle=False)
        notes = read_json(notes_path)
        digests, faults = list(notes["pixels"]), {int(k): v for k, v in notes["faults"].items()}
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None
    if matrix.shape != (count, dim) or matrix.dtype != np.float32 or len(digests) != count:
        return None
    return matrix, digests, faults
