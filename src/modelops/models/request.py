"""Requests for images, the same for every model source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import UsageError
from modelops.base.guidance import GUIDANCE_OFF, guidance_scale

__all__ = ["GUIDANCE_OFF", "Image", "ImageRequest", "InputImage"]
Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class InputImage:
    """Image file that a pipeline is to change.

    Attributes:
        path: of the image.
        sha256: of the file, or of both files' digests where there is a mask.
        mask: path of a grey image of the same size, white where the image is to be painted anew.
    """

    path: str
    sha256: str
    mask: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """Request for one image: everything that it is made from.

    Attributes:
        prompt: text.
        seed: of the starting noise, in [0, 2**53).
        steps: network evaluations along the trajectory; None takes the source's default.
        guidance: classifier-free guidance scale; None takes the source's default. 0 and 1 are both
            "off", whatever a pipeline makes of 0, and 0 is kept as 1; see `guidance_scale`.
        height, width: pixels; None takes the source's training resolution.
        negative_prompt: what to guide away from.
        image: what is to be changed, for a pipeline that changes images.

    Raises:
        UsageError: guidance below 0, between 0 and 1, or no number.
    """

    prompt: str
    seed: int
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    image: InputImage | None = None

    def __post_init__(self) -> None:
        if self.guidance is None:
            return
        try:
            object.__setattr__(self, "guidance", guidance_scale(self.guidance))
        except ValueError as error:
            raise UsageError(f"guidance {self.guidance:g}: {error}") from error
