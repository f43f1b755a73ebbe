"""Input images of pipelines that change an image, as arguments of their calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import sha256_bytes, sha256_json
from modelops.base.images import decode_image, decode_with_opacity, read_image_bytes
from modelops.models.pipelines.form import CallForm
from modelops.models.request import InputImage

_IMAGE, _CONTROL, _MASK = "image", "control_image", "mask_image"


def list_input(path: Path, mask: Path | None = None) -> InputImage:
    """Describe an image file and its mask by their digests.

    Raises:
        ImageError: a file cannot be read.
    """
    found = [sha256_bytes(read_image_bytes(name)) for name in (path, mask) if name is not None]
    return InputImage(str(path), _digest(found), None if mask is None else str(mask))


def image_arguments(form: CallForm, given: InputImage) -> dict[str, Any]:
    """Return a call's arguments for one input image: it in RGB and, for inpainting, its mask.

    Both are PIL images, as the pipelines' documentation passes them. The mask is white where the
    image is painted anew: it is the mask's file, else where the image is transparent.

    Raises:
        UsageError: the pipeline wants a mask and there is none, or takes none and there is one; the
            mask is not of the image's size.
        IntegrityError: a file is no longer what it was.
        ImageError: a file cannot be read.
    """
    files = [read_image_bytes(name) for name in (given.path, given.mask) if name is not None]
    if _digest([sha256_bytes(data) for data in files]) != given.sha256:
        raise IntegrityError(f"{given.path}: changed since it was listed")
    pixels, opacity = decode_with_opacity(files[0], Path(given.path).name)
    wanted = {_IMAGE if form.takes(_IMAGE) else _CONTROL: Image.fromarray(pixels)}
    if not form.takes(_MASK):
        if given.mask is not None:
            raise UsageError(
                f"{given.mask}: {form.pipeline} takes no mask", hint="move the masks away"
            )
        return wanted
    if given.mask is not None:
        mask = decode_image(files[1], Path(given.mask).name).mean(axis=2)
    elif opacity is not None:
        mask = 255.0 - opacity
    else:
        raise UsageError(
            f"{given.path}: {form.pipeline} wants a mask, and the image has none",
            hint="put NAME_mask.png beside NAME.png, white where it is to be painted anew, or make "
            "the image transparent there",
        )
    if mask.shape != pixels.shape[:2]:
        (height, width), (rows, columns) = pixels.shape[:2], mask.shape
        raise UsageError(
            f"{given.mask}: a mask of {columns}x{rows} pixels for an image of {width}x{height}"
        )
    return wanted | {_MASK: Image.fromarray(np.rint(mask).astype(np.uint8))}


def takes_image(form: CallForm) -> bool:
    """Return whether a pipeline can be given one input image; some want a control image too."""
    return form.takes(_IMAGE) != form.takes(_CONTROL)


def _digest(files: list[str]) -> str:
    return files[0] if len(files) == 1 else sha256_json(files)
