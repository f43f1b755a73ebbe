"""Check for obviously broken images of an export: black, of one colour, not numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelops.export.graphs.graph import Array

_FLAT_LEVELS = 1.0  # of 255


def check_pictures(images: Sequence[Array], reference: Sequence[Array]) -> list[str]:
    """Compare an export's images with its source's, to find faults that no average shows.

    A half-precision VAE that overflows gives NaN, which is saved as black. An image that is black
    or of one colour in the source too is not a fault of the export.

    Args:
        images: the export's, [H, W, C] each; uint8, or float in [0, 1].
        reference: the source's for the same seeds, in the same order.

    Returns:
        One line for each image at fault; empty if there is none.

    Raises:
        ValueError: number or shapes of images and references differ.
    """
    if len(images) != len(reference):
        raise ValueError(f"{len(images)} images, {len(reference)} references")
    faults = []
    for index, (image, source) in enumerate(zip(images, reference, strict=True)):
        if image.shape != source.shape:
            raise ValueError(f"image {index}: {image.shape}, its reference {source.shape}")
        fault = picture_fault(image)
        if fault and fault != picture_fault(source):
            faults.append(f"image {index} {fault}, its source's is not")
    return faults


def picture_fault(image: Array) -> str | None:
    """Return the plain fault of one image, as a verb phrase; None if it has none."""
    if not np.isfinite(image.astype(np.float64)).all():
        return "has values that are not numbers"
    levels = image.astype(np.float64) * (1.0 if image.dtype == np.uint8 else 255.0)
    if levels.max(initial=0.0) <= _FLAT_LEVELS:
        return "is all black"
    channels = levels.reshape(-1, levels.shape[-1]) if levels.ndim == 3 else levels.reshape(-1, 1)
    if (np.ptp(channels, axis=0) <= _FLAT_LEVELS).all():
        return "is all of one colour"
    return None
