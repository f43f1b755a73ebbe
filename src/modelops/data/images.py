"""Image file to uint8 RGB array, and resizing. Hostile files end in ImageError, never worse."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000  # an 8000 x 8000 image; 192 MB as RGB
MAX_FILE_BYTES = 256 << 20
FORMAT_OF_SUFFIX = {
    ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError,
    MemoryError, NotImplementedError, struct.error, zlib.error,
)  # fmt: skip


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Read an image as uint8 [H, W, 3], sRGB, values 0 to 255.

    The EXIF orientation is applied, an embedded colour profile is converted to sRGB, transparency
    is laid on white, 16 bits are scaled to 8, and of an animation the first frame is taken.

    Raises:
        ImageError: the file is missing, empty, truncated, of another format than its name says, of
            a format that is not read, or has more than `max_pixels` (checked before decoding).
    """
    source = Path(path)
    try:
        if source.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(f"{source}: larger than {MAX_FILE_BYTES >> 20} MiB")
        data = source.read_bytes()
    except OSError as error:
        raise ImageError(f"{source}: {error.strerror or error}") from error
    return decode_image(data, source.name, max_pixels=max_pixels)


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """The bytes of an image file to uint8 [H, W, 3]; see `read_image`.

    Args:
        data: the file's bytes.
        name: its name; the extension must agree with the content.
        max_pixels: width times height at most.

    Raises:
        ImageError: as in `read_image`.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError(f"{name}: the file is empty")
    suffix = Path(name).suffix.lower()
    expected = FORMAT_OF_SUFFIX.get(suffix)
    if expected is None:
        known = " ".join(sorted(FORMAT_OF_SUFFIX))
        raise ImageError(f"{name}: extension {suffix!r} is not one of {known}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, as an error
            picture = Image.open(io.BytesIO(data), formats=sorted(set(FORMAT_OF_SUFFIX.values())))
            found = {"MPO": "JPEG"}.get(str(picture.format), picture.format)  # as phones write it
            width, height = picture.size
            if found != expected:
                raise ImageError(
                    f"{name}: mislabelled: the content is {found}, the name says {expected}",
                    hint="rename the file and correct the manifest",
                )
            if width * height > max_pixels:
                raise ImageError(
                    f"{name}: {width}x{height} is more than {max_pixels} pixels",
                    hint="scale the image down",
                )
            picture.load()
            return _picture_to_rgb(_upright(picture))
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: more than {max_pixels} pixels") from error
    except _DECODER_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"{name}: truncated or damaged: {reason}") from error


def resize_image(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Scale uint8 [H, W, 3] so that the shorter side is `size`, and cut the centre square.

    Lanczos with antialiasing; returns uint8 [size, size, 3].
    """
    from PIL import Image, ImageOps

    if image.shape[:2] == (size, size):
        return image
    picture = ImageOps.fit(Image.fromarray(image), (size, size), Image.Resampling.LANCZOS)
    return np.array(picture)


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """Lossless PNG bytes of uint8 [H, W, 3], with no metadata; same array, same bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _upright(picture: Image.Image) -> Image.Image:
    """Turn the pixels as the EXIF orientation says; EXIF that cannot be read says nothing.

    Pillow's own `exif_transpose` also writes the EXIF anew, which fails on much that phones and
    editors leave in intact images.
    """
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(picture.getexif().get(0x0112, 1))
    except Exception:  # whatever Pillow's reader makes of bytes that are no EXIF
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _picture_to_rgb(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """A loaded image of any mode to uint8 [H, W, 3] in sRGB, transparency on white."""
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep_to_rgb(picture)
    if picture.mode in ("LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = _keep_profile(picture, picture.convert("RGBA"))
    elif picture.mode in ("P", "1", "HSV", "LAB", "YCbCr"):
        picture = _keep_profile(picture, picture.convert("RGB"))
    picture = _to_srgb(picture)
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))  # writable, as torch wants it


def _deep_to_rgb(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """16-bit grey [0, 65535] to 8 bits by rounding x / 257."""
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(f"pixels of mode {picture.mode} have no known range")
    grey = np.rint(values / 257.0).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Convert from the embedded colour profile to sRGB; without one the values are sRGB already."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return picture
    from PIL import ImageCms

    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode=mode
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture  # a broken profile is common in the wild and says nothing about the pixels
    return picture if converted is None else converted


def _keep_profile(old: Image.Image, new: Image.Image) -> Image.Image:
    if "icc_profile" in old.info:
        new.info["icc_profile"] = old.info["icc_profile"]
    return new
