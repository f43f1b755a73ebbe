"""Image file to uint8 RGB array, and resizing. Hostile files end in ImageError, never worse."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError
from modelops.base.files import sha256_bytes
from modelops.base.pixels import pixels_sha256

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000  # an 8000 x 8000 image; 192 MB as RGB
MAX_FILE_BYTES = 256 << 20
FORMAT_OF_SUFFIX = {
    ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
_FORMATS = sorted(set(FORMAT_OF_SUFFIX.values()))
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError,
    MemoryError, NotImplementedError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layers:
    """Pixels of an image file, as seen on white and otherwise.

    Attributes:
        image: uint8 [H, W, 3], sRGB, transparency laid on white.
        on_black: the same laid on black, or None if every pixel is opaque.
        identity: digest of all that can be seen: colours and opacity at 8 bits, or grey at 16 bits
            where 8 do not hold it. Colours below full transparency do not count.
    """

    image: npt.NDArray[np.uint8]
    on_black: npt.NDArray[np.uint8] | None
    identity: str


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Read an image as uint8 [H, W, 3], sRGB, values 0 to 255.

    The EXIF orientation is applied, an embedded colour profile is converted to sRGB, transparency
    is laid on white, 16 bits are scaled to 8, and of an animation the first frame is taken.

    Raises:
        ImageError: the file is missing, empty, truncated, of another format than its name says, of
            a format that is not read, or has more than `max_pixels` (checked before decoding).
    """
    return decode_image(read_image_bytes(path), Path(path).name, max_pixels=max_pixels)


def read_image_bytes(path: str | Path) -> bytes:
    """Read an image file's bytes.

    Raises:
        ImageError: the file is missing, unreadable or larger than 256 MiB.
    """
    source = Path(path)
    try:
        if source.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(f"{source}: larger than {MAX_FILE_BYTES >> 20} MiB")
        return source.read_bytes()
    except OSError as error:
        raise ImageError(f"{source}: {error.strerror or error}") from error


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """The bytes of an image file to uint8 [H, W, 3]; see `read_image`.

    Args:
        data: the file's bytes.
        name: its name; the extension must agree with the content.
        max_pixels: width times height at most.

    Raises:
        ImageError: as in `read_image`.
    """
    pixels, _ = _decode(data, name, max_pixels)
    return _lay_on(pixels, 255)


def decode_with_opacity(
    data: bytes, name: str, *, max_pixels: int = MAX_PIXELS
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
    """Decode to uint8 [H, W, 3] on white, as `decode_image` does, and the opacity [H, W], 0 to 255;
    None for an image that is opaque everywhere.

    Raises:
        ImageError: as in `read_image`.
    """
    pixels, _ = _decode(data, name, max_pixels)
    return _lay_on(pixels, 255), pixels[..., 3] if pixels.shape[2] == 4 else None


def decode_layers(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Layers:
    """Decode the bytes of an image file with its transparency; arguments as in `decode_image`.

    Raises:
        ImageError: as in `read_image`.
    """
    pixels, deep = _decode(data, name, max_pixels)
    opaque = pixels.shape[2] == 3
    identity = pixels_sha256(pixels)
    if deep is not None:
        identity = sha256_bytes(f"16 bits {deep.shape} {identity}".encode() + deep.tobytes())
    return Layers(_lay_on(pixels, 255), None if opaque else _lay_on(pixels, 0), identity)


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of an image file's bytes, or None."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=_FORMATS).size
    except (*_DECODER_ERRORS, Image.DecompressionBombError):
        return None


def _decode(
    data: bytes, name: str, max_pixels: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None]:
    """Decode to (uint8 [H, W, 3], or [H, W, 4] where any pixel is not opaque, and uint16 [H, W] of
    a grey image that needs 16 bits)."""
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
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
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
            if found == "TIFF":  # it would parse all metadata anew, and fail on what is odd there
                picture.load_end = lambda: None  # type: ignore[method-assign]
            picture.load()
            return _picture_to_pixels(_upright(picture))
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
        tags: Any = getattr(picture, "tag_v2", None) or picture.getexif()  # the first is a TIFF's
        turn = turns.get(tags.get(0x0112, 1))
    except Exception:  # whatever Pillow's reader makes of bytes that are no EXIF
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _picture_to_pixels(
    picture: Image.Image,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None]:
    """A loaded image of any mode in sRGB; see `_decode`."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep_to_pixels(picture)
    if picture.mode in ("LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = _keep_profile(picture, picture.convert("RGBA"))
    elif picture.mode in ("P", "1", "HSV", "LAB", "YCbCr"):
        picture = _keep_profile(picture, picture.convert("RGB"))
    picture = _to_srgb(picture)
    if picture.mode != "RGBA":
        return np.array(picture.convert("RGB")), None  # writable, as torch wants it
    return _without_hidden(np.array(picture)), None


def _without_hidden(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [H, W, 4] without an opacity that is full everywhere, and with colour 0 where
    nothing of it can be seen."""
    if (pixels[..., 3] == 255).all():
        return np.ascontiguousarray(pixels[..., :3])
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def _lay_on(pixels: npt.NDArray[np.uint8], level: int) -> npt.NDArray[np.uint8]:
    """Lay pixels uint8 [H, W, 3 or 4] on a background of grey `level`; returns [H, W, 3]."""
    from PIL import Image

    if pixels.shape[2] == 3:
        return pixels
    picture = Image.fromarray(pixels)
    ground = Image.new("RGBA", picture.size, (level, level, level, 255))
    return np.array(Image.alpha_composite(ground, picture).convert("RGB"))


def _deep_to_pixels(
    picture: Image.Image,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None]:
    """16-bit grey [0, 65535] to 8 bits by rounding x / 257; a PNG may name one grey transparent."""
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(f"pixels of mode {picture.mode} have no known range")
    grey = np.rint(values / 257.0).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=2)
    deep = values.astype(np.uint16)
    keyed = picture.info.get("transparency")
    if isinstance(keyed, int):
        clear = deep == keyed
        deep[clear] = 0
        opacity = np.where(clear, 0, 255).astype(np.uint8)
        pixels = _without_hidden(np.dstack([pixels, opacity]))
    fits = np.array_equal(pixels[..., 0].astype(np.uint16) * 257, deep)
    return pixels, None if fits else deep


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
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture  # a broken profile is common in the wild and says nothing about the pixels
    return picture if converted is None else converted


def _keep_profile(old: Image.Image, new: Image.Image) -> Image.Image:
    if "icc_profile" in old.info:
        new.info["icc_profile"] = old.info["icc_profile"]
    return new
