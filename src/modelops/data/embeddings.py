"""Embeddings of a manifest's images, cached on disk in chunks so that a killed run can continue."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError, UsageError
from modelops.base.files import (
    read_json,
    remove_leftovers,
    sha256_json,
    write_bytes,
    write_json,
)
from modelops.base.images import decode_layers
from modelops.base.pixels import pixels_sha256
from modelops.data.manifest import Manifest, Sample

CHUNK = 256  # samples
CACHE = "embeddings"  # below the manifest's cache
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
        pixels: sha256 of each decoded image on white (shape and bytes), as training reads it.
        identities: digest of all that can be seen of each image, its opacity included.
        on_black: {index: float32 [D]} of the images that are not opaque, laid on black.
        faults: {id: reason} of the samples that cannot be decoded.
    """

    samples: list[Sample]
    features: npt.NDArray[np.float32]
    pixels: list[str]
    identities: list[str]
    on_black: dict[int, npt.NDArray[np.float32]]
    faults: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Embeddings of a chunk by row: rows with a fault have zeros and empty digests.

    `on_black` is float32 [T, D], of the rows `not_opaque`.
    """

    features: npt.NDArray[np.float32]
    on_black: npt.NDArray[np.float32]
    pixels: list[str]
    identities: list[str]
    not_opaque: list[int]
    faults: dict[int, str]


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
    cache = manifest.cache / CACHE / f"{chosen.name}-{chosen.weights_sha256[:12]}"
    remove_leftovers(cache)
    found = Embeddings([], np.zeros((0, chosen.dim), np.float32), [], [], {}, {})
    features: list[npt.NDArray[np.float32]] = []
    total = len(manifest.rows)
    for start in range(0, total, CHUNK):
        rows = manifest.rows[start : start + CHUNK]
        chunk = _embed_chunk(manifest, rows, chosen, cache)
        black = dict(zip(chunk.not_opaque, chunk.on_black, strict=True))
        for index, row in enumerate(rows):
            if index in chunk.faults:
                found.faults[row.id] = chunk.faults[index]
                continue
            if index in black:
                found.on_black[len(found.samples)] = black[index]
            found.samples.append(row)
            found.pixels.append(chunk.pixels[index])
            found.identities.append(chunk.identities[index])
            features.append(chunk.features[index])
        if on_progress:
            on_progress(start + len(rows), total)
    return replace(found, features=np.stack(features)) if features else found


def _embed_chunk(manifest: Manifest, rows: list[Sample], encoder: Encoder, cache: Path) -> _Chunk:
    """Embed one chunk, or read it from the cache."""
    key = sha256_json([2, [[s.sha256, Path(s.filepath).suffix.lower()] for s in rows]])[:32]
    matrix_path, notes_path = cache / f"{key}.npy", cache / f"{key}.json"
    cached = _read_cached(matrix_path, notes_path, len(rows), encoder.dim)
    if cached is not None:
        return cached
    pixels, identities = [""] * len(rows), [""] * len(rows)
    faults: dict[int, str] = {}
    black: dict[int, Image] = {}

    def readable() -> Iterator[Image]:
        for index, sample in enumerate(rows):
            try:
                name = Path(sample.filepath).name
                layers = decode_layers(manifest.read_bytes(sample), name)
            except ImageError as error:
                faults[index] = error.message
                continue
            pixels[index], identities[index] = pixels_sha256(layers.image), layers.identity
            if layers.on_black is not None:
                black[index] = layers.on_black
            yield layers.image

    found = encoder.encode(readable())
    features = np.zeros((len(rows), encoder.dim), np.float32)
    features[[index for index in range(len(rows)) if index not in faults]] = found
    on_black = np.zeros((0, encoder.dim), np.float32)
    if black:
        on_black = encoder.encode(iter(black.values()))
    chunk = _Chunk(features, on_black, pixels, identities, list(black), faults)
    buffer = io.BytesIO()  # numpy does not say why it cannot write to a file
    np.save(buffer, np.concatenate([features, on_black]), allow_pickle=False)
    write_bytes(matrix_path, buffer.getvalue())
    notes = {
        "pixels": pixels, "identities": identities, "not_opaque": chunk.not_opaque,
        "faults": {str(k): v for k, v in faults.items()},
    }  # fmt: skip
    write_json(notes_path, notes)  # last: a chunk counts as cached when its notes are there
    return chunk


def _read_cached(matrix_path: Path, notes_path: Path, count: int, dim: int) -> _Chunk | None:
    """A cached chunk, or None if it is not there or not whole."""
    if not (matrix_path.is_file() and notes_path.is_file()):
        return None
    try:
        matrix = np.load(matrix_path, allow_pickle=False)
        notes = read_json(notes_path)
        chunk = _Chunk(
            matrix[:count], matrix[count:], list(notes["pixels"]), list(notes["identities"]),
            list(notes["not_opaque"]), {int(k): v for k, v in notes["faults"].items()},
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError, UsageError):
        return None
    whole = matrix.shape == (count + len(chunk.not_opaque), dim) and matrix.dtype == np.float32
    return chunk if whole and len(chunk.pixels) == len(chunk.identities) == count else None
