"""Encoding of pixels as PNG, WebP or JPEG with metadata about their origin."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modelops.base.errors import UsageError

MARK = "AI generated"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def encode_image(
    pixels: npt.NDArray[np.uint8], output_format: str, metadata: Mapping[str, str]
) -> bytes:
    """Encode an image [H, W, 3] uint8 RGB with metadata.

    PNG and WebP are lossless. All three carry an XMP packet with IPTC's source type "trained
    algorithmic media"; a PNG has `metadata` in text chunks too.

    Args:
        output_format: "png", "webp" or "jpeg".
        metadata: latin-1 keys of at most 79 characters, and their texts.
    """
    image = Image.fromarray(pixels)
    packet = _xmp(metadata)
    buffer = io.BytesIO()
    if output_format == "png":
        chunks = PngInfo()
        chunks.add_text("Comment", MARK)
        for key, value in metadata.items():
            chunks.add_text(key, value)
        chunks.add_itxt("XML:com.adobe.xmp", packet.decode())
        image.save(buffer, "PNG", pnginfo=chunks)
    elif output_format == "webp":
        image.save(buffer, "WEBP", lossless=True, xmp=packet)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0, xmp=packet)
    return buffer.getvalue()


def _xmp(metadata: Mapping[str, str]) -> bytes:
    fields = " ".join(f"modelops:{key}={quoteattr(value)}" for key, value in metadata.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        ' xmlns:modelops="urn:modelops:image"'
        f' Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}" {fields}/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def read_pixels(path: str | Path) -> npt.NDArray[np.uint8]:
    """Read an image file as [H, W, 3] uint8 RGB; transparency is dropped.

    Raises:
        UsageError: not a readable image.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: not a readable image") from error
