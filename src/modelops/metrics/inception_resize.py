"""Ways in which images come to the size of Inception's input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from modelops.metrics.features import Image

Floats = npt.NDArray[np.floating]
SIZE = 299  # pixels


def clean(image: Image) -> Floats:
    """clean-fid's `clean`: each channel float32, PIL bicubic (antialiased), clipped, not rounded.

    uint8 [H, W, 3] to float32 [3, 299, 299] in [0, 255] (Parmar et al., 2022).
    """
    from PIL import Image as Pillow

    out = np.empty((3, SIZE, SIZE), np.float32)
    for channel, picture in enumerate(Pillow.fromarray(image).split()):
        resized = picture.convert("F").resize((SIZE, SIZE), Pillow.Resampling.BICUBIC)
        out[channel] = np.asarray(resized)
    return np.clip(out, 0.0, 255.0, out=out)


def legacy_pytorch(image: Image) -> Floats:
    """pytorch-fid's: bilinear between half-pixel centres, without antialiasing.

    uint8 [H, W, 3] to float32 [3, 299, 299] in [0, 255]; `interpolate(..., align_corners=False)`.
    """
    return _bilinear(image, half_pixel=True)


def legacy_tensorflow(image: Image) -> Floats:
    """TensorFlow 1's: bilinear between corners, without antialiasing; torch-fidelity's only mode.

    uint8 [H, W, 3] to float32 [3, 299, 299] in [0, 255].
    """
    return _bilinear(image, half_pixel=False)


MODES: dict[str, Callable[[Image], Floats]] = {
    "clean": clean,
    "legacy_pytorch": legacy_pytorch,
    "legacy_tensorflow": legacy_tensorflow,
}


RESIZE = {
    "clean": "299 px, PIL bicubic on float32 channels, antialiased",
    "legacy_pytorch": "299 px, bilinear, half-pixel centres, not antialiased",
    "legacy_tensorflow": "299 px, bilinear, TensorFlow 1 corners, not antialiased",
}


def _bilinear(image: Image, *, half_pixel: bool) -> Floats:
    """Bilinear resampling as both legacy codes do it, their coordinates in float32.

    In numpy, because torch would start a second pool of threads beside the network's.
    """
    low_y, high_y, part_y = _positions(image.shape[0], half_pixel)
    low_x, high_x, part_x = _positions(image.shape[1], half_pixel)
    pixels = image.transpose(2, 0, 1).astype(np.float32)
    left = pixels[:, :, low_x]
    rows = left + (pixels[:, :, high_x] - left) * part_x
    top = rows[:, low_y]
    return np.asarray(top + (rows[:, high_y] - top) * part_y[:, None])


def _positions(
    length: int, half_pixel: bool
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Return two input pixels for each of 299 output pixels, and the distance to the second."""
    scale = np.float32(length / SIZE)
    places = np.arange(SIZE, dtype=np.float32)
    if half_pixel:
        half = np.float32(0.5)
        places = np.maximum((places + half) * scale - half, np.float32(0.0))
    else:
        places = places * scale
    low = np.minimum(places.astype(np.intp), length - 1)
    high = np.minimum(low + 1, length - 1)
    return low, high, places - low.astype(np.float32)
