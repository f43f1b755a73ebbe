"""Images of every mode, and files made to hurt."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from modelops.base.errors import ImageError
from modelops.base.images import (
    decode_image,
    decode_layers,
    encode_png,
    read_image,
    resize_image,
)

GREY = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=2)


def png_bytes(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return start + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def test_a_png_round_trip_is_exact_and_deterministic() -> None:
    data = encode_png(COLOUR)
    assert data == encode_png(COLOUR)
    image = decode_image(data, "a.png")
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, COLOUR)


def test_grey_palette_and_16_bit_become_rgb() -> None:
    expected = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(png_bytes(Image.fromarray(GREY)), "a.png"), expected)
    palette = Image.fromarray(expected).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    np.testing.assert_array_equal(decode_image(png_bytes(palette), "a.png"), expected)
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_image(png_bytes(deep), "a.png"), expected)


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (decode_image(png_bytes(clear), "a.png") == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (decode_image(png_bytes(half), "a.png") == 127).all()
    keyed = Image.new("P", (4, 4), 0)
    keyed.putpalette([10, 20, 30])
    assert (decode_image(png_bytes(keyed, transparency=0), "a.png") == 255).all()


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    image = read_image(path)
    assert image.shape == (8, 8, 3)
    assert image[0, 0, 0] > 200 and image[0, 0, 1] < 60


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to show
    Image.new("RGB", (16, 8), "red").save(path, exif=exif)
    assert read_image(path).shape == (16, 8, 3)


def test_an_embedded_profile_is_converted() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    plain = decode_image(png_bytes(Image.fromarray(COLOUR), icc_profile=profile.tobytes()), "a.png")
    assert np.abs(plain.astype(int) - COLOUR).max() <= 1
    broken = png_bytes(Image.fromarray(COLOUR), icc_profile=b"not a profile")
    np.testing.assert_array_equal(decode_image(broken, "a.png"), COLOUR)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.png", b"", "empty"),
        ("a.png", b"hello", "not an image"),
        ("a.gif", png_bytes(Image.fromarray(COLOUR)), "mislabelled"),
        ("a.jpg", png_bytes(Image.fromarray(COLOUR)), "mislabelled: the content is PNG"),
        ("a.svg", b"<svg/>", "extension"),
        ("a", png_bytes(Image.fromarray(COLOUR)), "extension"),
        ("a.png", png_bytes(Image.fromarray(COLOUR))[:90], "truncated or damaged"),
        ("a.png", bomb(20_000, 20_000), "20000x20000|pixels"),
        ("a.png", bomb(9_000, 9_000), "9000x9000"),
        ("a.png", bomb(2**31 - 1, 2**31 - 1), "pixels|damaged"),
        ("a.png", bomb(0, 4), "damaged|not an image"),
        ("a.png", bomb(64, 64), "truncated or damaged"),
    ],
)
def test_hostile_files_are_refused_in_one_line(name: str, data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said) as caught:
        decode_image(data, name)
    assert "\n" not in str(caught.value) and caught.value.message.startswith(name)


def test_every_truncation_of_a_jpeg_is_refused_or_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    data = buffer.getvalue()
    for length in range(0, len(data) - 2, 37):
        with pytest.raises(ImageError):
            decode_image(data[:length], "a.jpg")


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


def test_resizing_keeps_the_aspect_and_the_centre() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (resize_image(wide, 10) == 255).all()
    assert resize_image(wide, 5).shape == (5, 5, 3)
    assert resize_image(COLOUR, 8) is COLOUR
    stripes = np.tile(np.array([[0], [255]], np.uint8), (32, 64))[..., None].repeat(3, 2)
    small = resize_image(stripes, 8)
    assert small.min() >= 120 and small.max() <= 135, "aliased"


def exif_block(**values: Any) -> bytes:
    exif = Image.Exif()
    for tag, value in values.items():
        exif[int(tag.removeprefix("t"), 16)] = value
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_pixels_are_turned_as_pillow_turns_them(orientation: int, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=exif_block(t0112=orientation))
    found = decode_image(buffer.getvalue(), f"a.{kind.lower()}")
    expected = Image.open(io.BytesIO(buffer.getvalue()))
    if kind != "TIFF":  # Pillow turns those while it loads them
        expected = ImageOps.exif_transpose(expected)
    assert np.array_equal(found, np.asarray(expected.convert("RGB")))


def test_a_phones_photograph_of_several_frames_is_its_first() -> None:
    first, second = (Image.new("RGB", (16, 12), color) for color in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(buffer.getvalue())).format == "MPO"
    found = decode_image(buffer.getvalue(), "phone.jpg")
    assert found.shape == (12, 16, 3)
    assert found[6, 8, 0] > 200 and found[6, 8, 2] < 60


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_exif_makes_an_intact_image_damaged(kind: str) -> None:
    """Bytes that are no EXIF, and thousands of mutations of bytes that are."""
    pixels = np.full((8, 8, 3), 90, np.uint8)
    good = exif_block(t0112=6, t010f="maker", t011a=72.0, t8769={0x9003: "2026:01:01 00:00:00"})
    generator = np.random.default_rng(1)
    blocks = [b"\x00\x08garbage", b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"]
    for _ in range(400):
        block = bytearray(good)
        for place in generator.integers(6, len(block), generator.integers(1, 6)):
            block[place] = generator.integers(0, 256)
        blocks.append(bytes(block))
    for block in blocks:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, exif=block)
        found = decode_image(buffer.getvalue(), f"a.{kind.lower()}")
        assert found.shape == (8, 8, 3) and abs(int(found.mean()) - 90) <= 2


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_odd_metadata_of_a_tiff_never_escapes(compression: str) -> None:
    """A TIFF's tags are an EXIF: 1,000 with one more tag of any kind, and 500 with bytes changed.

    The first kind leaves what is needed to decode as it was: the pixels must be read.
    """
    pixels = np.full((8, 8, 3), 90, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF", compression=compression)
    data = buffer.getvalue()
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = data[start + 2 : start + 2 + 12 * count]
    generator = np.random.default_rng(2)
    known = [0x010F, 0x011A, 0x02BC, 0x8769, 0x8773, 0x8825, 0x927C, 0xA005, 0xC4A5]
    for _ in range(1000):
        tag, kind = generator.choice(known), generator.integers(0, 16)
        number, value = generator.choice([0, 1, 2, 100, 2**32 - 1]), generator.integers(0, 300)
        extra = struct.pack("<HHII", tag, kind, number, value)
        table = struct.pack("<H", count + 1) + entries + extra + bytes(4)
        odd = data[:4] + struct.pack("<I", len(data)) + data[8:] + table
        assert np.array_equal(decode_image(odd, "a.tif"), pixels), extra
    for _ in range(500):
        broken = bytearray(data)
        for place in generator.integers(start, start + 2 + 12 * count, generator.integers(1, 5)):
            broken[place] = generator.integers(0, 256)
        with contextlib.suppress(ImageError):
            decode_image(bytes(broken), "a.tif")


def test_opacity_is_part_of_what_an_image_is() -> None:
    """Equal on white is not the same image; a full opacity, hidden colours, and how a file says
    what is transparent, are no differences."""
    colour = Image.fromarray(COLOUR)
    full = colour.copy()
    full.putalpha(255)
    assert identity(full) == identity(colour)
    assert decode_layers(png_bytes(full), "a.png").on_black is None

    drawings = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(2)]
    drawings[0].paste((255, 255, 255, 255), (1, 1, 5, 5))
    drawings[1].paste((255, 255, 255, 255), (2, 2, 7, 7))
    layers = [decode_layers(png_bytes(drawing), "a.png") for drawing in drawings]
    assert all((one.image == 255).all() for one in layers)
    assert layers[0].identity != layers[1].identity
    assert layers[0].on_black is not None and layers[0].on_black[2, 2, 0] == 255
    assert layers[0].on_black[7, 7, 0] == 0

    hidden = drawings[0].copy()
    hidden.paste((90, 10, 200, 0), (6, 6, 8, 8))
    assert identity(hidden) == layers[0].identity
    faint = drawings[0].copy()
    faint.paste((255, 255, 255, 254), (1, 1, 2, 2))
    assert identity(faint) != layers[0].identity

    grey = Image.new("LA", (8, 8), (0, 0))
    grey.paste((255, 255), (1, 1, 5, 5))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 255, 255, 255])
    palette.paste(1, (1, 1, 5, 5))
    assert identity(grey) == identity(palette, transparency=0) == layers[0].identity
    assert identity(palette) != layers[0].identity


def test_16_bits_that_8_cannot_hold_are_part_of_what_an_image_is() -> None:
    """A scan that uses 12 of 16 bits is dark at 8: images of other values are other images."""
    dark = Image.fromarray(GREY.astype(np.uint16))
    darker = Image.fromarray((GREY // 2).astype(np.uint16))
    assert (decode_image(png_bytes(dark), "a.png") <= 1).all()
    assert identity(dark) != identity(darker)
    assert identity(Image.fromarray(GREY.astype(np.uint16) * 257)) == identity(
        Image.fromarray(GREY)
    )
    keyed = decode_layers(png_bytes(dark, transparency=int(GREY[0, 3])), "a.png")
    assert (keyed.image[0, 3] == 255).all() and keyed.on_black is not None


def identity(image: Image.Image, **options: object) -> str:
    return decode_layers(png_bytes(image, **options), "a.png").identity
