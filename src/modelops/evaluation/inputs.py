"""Folders of input images, for pipelines that change images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from modelops.base.errors import UsageError
from modelops.base.files import sha256_json
from modelops.data.folders import IMAGE_SUFFIXES, images_of, is_image
from modelops.models.pipelines.inputs import list_input
from modelops.models.request import InputImage
from modelops.models.sources import ModelSource

_UNREAD = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".pbm", ".pgm", ".ppm", ".svg", ".tga")
_MASK = re.compile(r"(.+)[._-]mask", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class InputImages:
    """Input images of a folder in the natural order of their names.

    Attributes:
        folder: it.
        images: at least one.
    """

    folder: Path
    images: tuple[InputImage, ...]

    @property
    def sha256(self) -> str:
        """Digest of the images and masks in their order."""
        return sha256_json([image.sha256 for image in self.images])


def read_input_images(folder: Path) -> InputImages:
    """List a folder's images; NAME_mask.png is the mask of NAME.png.

    Raises:
        UsageError: there is no such folder, no image in it, or a mask without its image.
        ImageError: a file cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of input images")
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(there):
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *_UNREAD) and not is_image(path):
            raise UsageError(
                f"{path}: not an image that is read, and without it others would belong to other "
                "prompts",
                hint="move it away or save it as PNG",
            )
    files = filter(is_image, there)
    masks = {found[1]: path for path in files if (found := _MASK.fullmatch(path.stem))}
    images = [path for path in images_of(folder)[0] if not _MASK.fullmatch(path.stem)]
    if lost := set(masks) - {path.stem for path in images}:
        raise UsageError(f"{masks[min(lost)]}: a mask without its image")
    if not images:
        raise UsageError(f"{folder}: no image in it")
    return InputImages(folder, tuple(list_input(path, masks.get(path.stem)) for path in images))


def require_takes_images(source: ModelSource) -> None:
    """Refuse input images for a source that takes none.

    Raises:
        UsageError: it takes none.
    """
    if not source.takes_images:
        raise UsageError(
            f"{source.info.uri} takes no input images", hint="leave --input-images out"
        )
