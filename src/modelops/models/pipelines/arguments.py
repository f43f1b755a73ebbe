"""Arguments of a diffusers pipeline's call, and what comes back."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.errors import UsageError
from modelops.models.request import ImageRequest


def pipeline_arguments(
    accepts: Collection[str], requests: Sequence[ImageRequest]
) -> dict[str, Any]:
    """Return a diffusers pipeline's arguments for these images, its `.images` [N, H, W, 3].

    Fields that a request leaves open or that the pipeline does not take are left out.

    Args:
        accepts: names of the arguments of the pipeline's call.
        requests: N that agree in steps, guidance, height and width.
    """
    first = requests[0]
    wanted: dict[str, Any] = {
        "prompt": [request.prompt for request in requests],
        # None and "" differ: SDXL and others take zeros for none, not the encoding of "".
        "negative_prompt": [request.negative_prompt for request in requests]
        if any(request.negative_prompt for request in requests)
        else None,
        "num_inference_steps": first.steps,
        "guidance_scale": first.guidance,
        "height": first.height,
        "width": first.width,
        "generator": [torch.Generator("cpu").manual_seed(r.seed) for r in requests],
        "output_type": "np",
        "use_resolution_binning": False,  # PixArt's would make another size, and resize it
    }
    arguments = {
        name: value for name, value in wanted.items() if name in accepts and value is not None
    }
    if "prompt" not in accepts and "batch_size" in accepts:  # unconditional
        arguments["batch_size"] = len(requests)
    return arguments


def native_size(pipeline: Any) -> tuple[int | None, int | None]:
    """Return a pipeline's default height and width in pixels; None if it has none."""
    if "height" not in inspect.signature(pipeline.__call__).parameters:
        return None, None
    if hasattr(pipeline, "resolution"):
        return int(pipeline.resolution), int(pipeline.resolution)
    if hasattr(pipeline, "get_default_resolution"):  # PRX, whose sample_size may be pixels
        side = int(pipeline.get_default_resolution())
        return side, side
    scale = int(getattr(pipeline, "vae_scale_factor", 1))
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    sample = getattr(pipeline, "default_sample_size", None)
    if sample is None:
        sample = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if sample is None:
        return 256, 256
    height, width = (sample, sample) if isinstance(sample, int) else tuple(sample)[-2:]
    return int(height) * scale, int(width) * scale


def floats_to_uint8(images: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Images in [0, 1] to bytes, rounded to nearest (truncation would darken by half a level).

    Raises:
        UsageError: a value is not finite.
    """
    if not np.isfinite(images).all():
        raise UsageError("the model produced NaN or infinite pixels")
    return np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
