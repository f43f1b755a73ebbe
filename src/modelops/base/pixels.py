"""Digests of images as arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modelops.base.files import sha256_bytes


def pixels_sha256(pixels: npt.NDArray[np.uint8]) -> str:
    """Digest of an image's shape and bytes, whatever file format it is sent in."""
    return sha256_bytes(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes())
