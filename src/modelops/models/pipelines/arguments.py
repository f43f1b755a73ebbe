"""Arguments of a diffusers pipeline's call, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.errors import UsageError
from modelops.models.pipelines.form import CallForm, denoiser_of, read_form
from modelops.models.request import ImageRequest


def pipeline_arguments(
    form: CallForm, requests: Sequence[ImageRequest], guidance: str = "guidance_scale"
) -> dict[str, Any]:
    """Return a diffusers pipeline's arguments for these images, its `.images` [N, H, W, 3].

    A field that a request leaves open, and what the pipeline does not take, is left out, so that
    the call is the pipeline's own.

    Args:
        form: of the pipeline's call.
        requests: N that agree in steps, guidance, height and width.
        guidance: name of the argument that is the guidance scale; see `traits`.

    Raises:
        ValueError: several requests for a pipeline that takes no lists.
        UsageError: a prompt is no class of a pipeline that makes images of classes.
    """
    first = requests[0]
    wanted: dict[str, Any] = {
        "num_inference_steps": first.steps,
        guidance: first.guidance,
        "height": first.height,
        "width": first.width,
        "generator": [torch.Generator("cpu").manual_seed(r.seed) for r in requests],
        "output_type": "np",
    }
    if form.subject == "prompt":
        wanted["prompt"] = [request.prompt for request in requests]
        if any(request.negative_prompt for request in requests):
            # None and "" differ: SDXL and others take zeros for none, not the encoding of "".
            wanted["negative_prompt"] = [request.negative_prompt for request in requests]
    else:
        wanted["batch_size"] = len(requests)
        if form.subject == "class":
            wanted["class_labels"] = [form.class_number(request.prompt) for request in requests]
    if form.bare_prompt:
        for name in ("prompt", "negative_prompt", "generator"):
            if name in wanted:
                (wanted[name],) = wanted[name]
    if first.height or first.width:
        wanted["use_resolution_binning"] = False  # it would draw another size, and resize it
    return {n: value for n, value in wanted.items() if form.takes(n) and value is not None}


def native_size(pipeline: Any) -> tuple[int | None, int | None]:
    """Return height and width in pixels of a call that states none; None where none can be stated.

    They are the call's own defaults, else those that the parts' configurations give.
    """
    if not read_form(pipeline).takes("height"):
        return None, None
    return configured_size(pipeline)


def configured_size(pipeline: Any) -> tuple[int, int]:
    """Return height and width in pixels that the call's defaults or the parts' configurations give;
    256 where they give none."""
    form = read_form(pipeline)
    stated = form.default("height"), form.default("width")
    if all(isinstance(side, int) for side in stated):
        return stated
    if hasattr(pipeline, "resolution"):
        return int(pipeline.resolution), int(pipeline.resolution)
    if hasattr(pipeline, "get_default_resolution"):  # PRX, whose sample_size may be pixels
        side = int(pipeline.get_default_resolution())
        return side, side
    scale = int(
        getattr(pipeline, "vae_scale_factor", None)
        or getattr(pipeline, "movq_scale_factor", None)
        or 1
    )
    sample = getattr(pipeline, "default_sample_size", None)
    if sample is None:
        sample = getattr(getattr(denoiser_of(pipeline), "config", None), "sample_size", None)
    if sample is None:
        return 256, 256
    height, width = (sample, sample) if isinstance(sample, int) else tuple(sample)[-2:]
    return int(height) * scale, int(width) * scale


def images_of(output: Any) -> npt.NDArray[Any]:
    """Return the images [N, H, W, 3] in [0, 1] of a pipeline's answer.

    Raises:
        UsageError: it holds none.
    """
    images = getattr(output, "images", getattr(output, "image", None))
    if images is None:
        fields = ", ".join(output) if isinstance(output, dict) else type(output).__name__
        raise UsageError(f"the pipeline makes no images: its answer has {fields}")
    found = np.asarray(images)
    if found.ndim != 4 or found.shape[-1] not in (1, 3, 4):
        raise UsageError(
            f"the pipeline's images have the shape {list(found.shape)}, not [N, H, W, 3]"
        )
    if found.shape[-1] == 1:
        return np.repeat(found, 3, axis=-1)
    return found[..., :3]  # a fourth channel is opacity


def floats_to_uint8(images: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Images in [0, 1] to bytes, rounded to nearest (truncation would darken by half a level).

    Raises:
        UsageError: a value is not finite.
    """
    if not np.isfinite(images).all():
        raise UsageError("the model produced NaN or infinite pixels")
    return np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
