"""Requests for images, the same for every model source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """Request for one image: everything that it is made from.

    Attributes:
        prompt: text.
        seed: of the starting noise, in [0, 2**53).
        steps: network evaluations along the trajectory; None takes the source's default.
        guidance: classifier-free guidance scale; None takes the source's default.
        height, width: pixels; None takes the source's training resolution.
        negative_prompt: what to guide away from.
    """

    prompt: str
    seed: int
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
