"""Grids of images with their prompts."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modelops.base.files import write_bytes

if TYPE_CHECKING:
    from PIL import Image

LABEL = 13  # pixels below a tile for its prompt


def write_grid(
    path: Path,
    images: Sequence[npt.NDArray[np.uint8] | None],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    tile: int = 96,
) -> Path:
    """Write images [H, W, 3] uint8 as one PNG, row by row; None is drawn as a crossed-out tile.

    Small images are enlarged by a whole factor without smoothing, so that their pixels show.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or max(1, math.isqrt(max(1, len(images) - 1)) + 1)
    rows = max(1, math.ceil(len(images) / columns))
    foot = LABEL if labels else 0
    sheet = Image.new("RGB", (columns * (tile + 4) + 4, rows * (tile + 4 + foot) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for index, image in enumerate(images):
        x = 4 + index % columns * (tile + 4)
        y = 4 + index // columns * (tile + 4 + foot)
        if image is None:
            draw.line([(x, y), (x + tile, y + tile)], fill="red", width=2)
            draw.rectangle([x, y, x + tile - 1, y + tile - 1], outline="red")
        else:
            sheet.paste(_fit(Image.fromarray(image), tile), (x, y))
        if labels:
            draw.text((x, y + tile), _shorten(labels[index], draw, font, tile), "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
    return path


def image_to_inline(path: Path, largest: int) -> tuple[bytes, str, int, int]:
    """Encode an image file for a page: (bytes, media type, width, height).

    Width and height are the file's own. An image of up to `largest` pixels a side becomes a PNG of
    the same pixels; a larger one becomes a smaller WebP, only to be looked at.

    Raises:
        ImageError: the file cannot be read.
    """
    from PIL import Image

    from modelops.base.images import encode_png, read_image

    pixels = read_image(path)
    height, width = pixels.shape[:2]
    if max(width, height) <= largest:
        keep = path.suffix.lower() == ".png" and path.stat().st_size <= pixels.size
        return path.read_bytes() if keep else encode_png(pixels), "image/png", width, height
    picture = Image.fromarray(pixels)
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return buffer.getvalue(), "image/webp", width, height


def _fit(picture: Image.Image, tile: int) -> Image.Image:
    from PIL import Image

    larger = max(picture.size)
    if larger <= tile:
        factor = tile // larger
        picture = picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    else:
        picture.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (tile, tile), "white")
    framed.paste(picture, ((tile - picture.width) // 2, (tile - picture.height) // 2))
    return framed


def _shorten(text: str, draw: Any, font: Any, width: int) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text)[:200]
    while printable and draw.textlength(printable, font) > width:
        printable = printable[:-2] + "…" if len(printable) > 2 else ""
    return printable
