"""Image block-list: perceptual hashes of images that must not be made again.

A list is a directory of images, or a text file of their hashes, one a line:

    phash256:HEX  label          # 64 hex digits, then what it is

so that lists can be shared without the images. The hash is the 256-bit DCT hash of imagehash
(`phash(hash_size=16)`), and an image matches within 31 bits of 256. It recognises the listed image
after resizing, JPEG or brighter light, but fewer of the flat and symmetric ones, whose hash has
many undecided bits: of 400 OpenMoji drawings 84 % after noise, 89 % after JPEG and 93 to 98 % after
resizing or dimming were found, and 0.004 % of unlike pairs (measured). It does not recognise an
image after a crop or a rotation, and never the same symbol as part of another scene: that needs a
classifier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import UsageError
from modelops.base.extras import require_module
from modelops.base.files import read_text, sha256_json, write_text
from modelops.safety.image import Image, ImageVerdict, SafetyFilterError, checked_image
from modelops.safety.probe import probe_images

BITS = 256
MAX_DISTANCE = 31  # bits
_LINE = re.compile(r"phash256:([0-9a-fA-F]{64})(?:\s+(.*))?")
_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True, slots=True)
class ListedImage:
    """A listed image: its hash as 64 hex digits, and what it is."""

    digest: str
    label: str


class BlockListFilter:
    """Filter that blocks images that look like a listed one.

    The score is 1 − d / 62 for the distance d to the nearest listed image, at least 0: 1 is the
    image itself, and d = 31 gives 0.5.

    Args:
        listed: the images.
        threshold: a score at or above it is blocked.

    Raises:
        UsageError: the list is empty.
        MissingExtraError: imagehash is not installed.
    """

    def __init__(self, listed: Sequence[ListedImage], *, threshold: float = 0.5) -> None:
        if not listed:
            raise UsageError("the block-list is empty")
        if not 0.0 < threshold <= 1.0:
            raise SafetyFilterError(f"threshold {threshold} is not in (0, 1]")
        require_module("imagehash", needed_for="an image block-list")
        self.listed = tuple(listed)
        self.threshold = threshold
        self._bits = np.stack([_hex_to_bits(image.digest) for image in listed])

    @property
    def info(self) -> dict[str, Any]:
        digests = sorted({image.digest for image in self.listed})
        return {
            "filter": "blocklist", "list_sha256": sha256_json(digests), "entries": len(digests),
            "hash": "phash256", "score": f"1 - d / {2 * MAX_DISTANCE}",
            "threshold": self.threshold, "preprocessing": "imagehash: grey, 64 px Lanczos, DCT",
        }  # fmt: skip

    def check(self, images: Sequence[Image]) -> list[ImageVerdict]:
        verdicts = []
        for image in images:
            distance = int((self._bits != image_to_bits(image)).sum(axis=1).min())
            score = max(0.0, 1.0 - distance / (2 * MAX_DISTANCE))
            verdicts.append(ImageVerdict(score, score >= self.threshold))
        return verdicts

    def probe(self) -> None:
        """Try the filter on an image that its list, with that image added, must block.

        Raises:
            SafetyFilterError: the image is not blocked.
        """
        bad = probe_images()[0]
        listed = ListedImage(_bits_to_hex(image_to_bits(bad)), "probe")
        tried = BlockListFilter([*self.listed, listed], threshold=self.threshold)
        if not tried.check([bad])[0].blocked:
            raise SafetyFilterError("lets a listed image through")

    def nearest(self, image: Image) -> tuple[ListedImage, int]:
        """Return the listed image most like an image, and the number of different bits."""
        distances = (self._bits != image_to_bits(image)).sum(axis=1)
        place = int(distances.argmin())
        return self.listed[place], int(distances[place])


def image_to_bits(image: Image) -> npt.NDArray[np.bool_]:
    """The hash [256] of an image [H, W, 3] uint8."""
    from PIL import Image as PilImage

    imagehash = require_module("imagehash", needed_for="an image block-list")
    picture = PilImage.fromarray(checked_image(image))
    return np.asarray(imagehash.phash(picture, hash_size=16, highfreq_factor=4).hash.ravel())


def read_blocklist(path: Path) -> list[ListedImage]:
    """Read a list from a directory of images, or a file of hashes.

    Raises:
        UsageError: it is missing or empty, an image cannot be read, or a line is not a hash.
    """
    if path.is_dir():
        return _hash_directory(path)
    listed = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{path}: line {number}: not a hash", hint="write phash256:HEX and then a label"
            )
        listed.append(ListedImage(match[1].lower(), match[2] or ""))
    if not listed:
        raise UsageError(f"{path}: no hashes")
    return listed


def write_blocklist(listed: Sequence[ListedImage], path: Path) -> None:
    """Write hashes and labels, without the images."""
    lines = (f"phash256:{image.digest}  {' '.join(image.label.split())}" for image in listed)
    write_text(path, "".join(line.rstrip() + "\n" for line in lines))


def _hash_directory(directory: Path) -> list[ListedImage]:
    from PIL import Image as PilImage

    files = sorted(file for file in directory.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise UsageError(f"{directory}: no images ({', '.join(sorted(_SUFFIXES))})")
    listed = []
    for file in files:
        try:
            with PilImage.open(file) as opened:
                rgba = opened.convert("RGBA")
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UsageError(
                f"{file}: cannot be read as an image", hint="take it out of the block-list"
            ) from error
        white = PilImage.new("RGBA", rgba.size, "white")
        pixels = np.asarray(PilImage.alpha_composite(white, rgba).convert("RGB"))
        listed.append(
            ListedImage(_bits_to_hex(image_to_bits(pixels)), file.relative_to(directory).as_posix())
        )
    return listed


def _bits_to_hex(bits: npt.NDArray[np.bool_]) -> str:
    return np.packbits(bits).tobytes().hex()


def _hex_to_bits(digest: str) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(digest), np.uint8)).astype(bool)
