"""Sample grids from fixed prompts and seeds, and validation losses at fixed times and noise."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.files import write_bytes
from modelops.base.seeding import image_seed, numpy_generator
from modelops.models.pipelines.arguments import floats_to_uint8
from modelops.training.config import TrainConfig

from .batches import Batch
from .objective import flow_losses
from .pictures import Pictures

GRID_SIZE = 16
DEFAULT_PROMPTS = (
    "red heart", "sun", "star", "grinning face", "thumbs up", "house", "tree", "flag",
)  # fmt: skip
CHUNK = 32  # images per forward pass while sampling and validating


def grid_prompts(config: TrainConfig, pictures: Pictures) -> list[str]:
    """The config's prompts, or some held-out captions, or a few common words."""
    if config.training.sample_prompts:
        return list(config.training.sample_prompts)
    if pictures.validation is None:
        return list(DEFAULT_PROMPTS)
    captions = sorted(set(pictures.validation.captions))
    order = numpy_generator(config.training.seed, "grid_prompts").permutation(len(captions))
    return [captions[index] for index in order[:GRID_SIZE]]


def prompts_to_grid(pipeline: Any, prompts: Sequence[str], seed: int) -> npt.NDArray[np.uint8]:
    """One image per prompt, laid out in rows: [rows * H, columns * W, 3] uint8."""
    return tile(prompts_to_images(pipeline, prompts, seed))


@torch.no_grad()
def prompts_to_images(
    pipeline: Any, prompts: Sequence[str], seed: int, *, steps: int | None = None
) -> list[npt.NDArray[np.uint8]]:
    """One image [H, W, 3] uint8 per prompt, in `steps` or the pipeline's own number of steps.

    Image of a prompt depends on (seed, prompt), the steps and the weights alone.
    """
    pipeline.set_progress_bar_config(disable=True)
    images: list[npt.NDArray[np.uint8]] = []
    for start in range(0, len(prompts), CHUNK):
        chunk = list(prompts[start : start + CHUNK])
        generators = [torch.Generator("cpu").manual_seed(image_seed(seed, text)) for text in chunk]
        made = pipeline(
            prompt=chunk, generator=generators, num_inference_steps=steps, output_type="np"
        ).images
        images.extend(floats_to_uint8(made))
    return images


def tile(images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Images [H, W, 3] of one size side by side on white, in as square a grid as there is."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return grid


def save_png(image: npt.NDArray[np.uint8], path: Path) -> None:
    """Write an image [H, W, 3] uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


@torch.no_grad()
def validation_loss(network: Any, batch: Batch, config: TrainConfig, device: torch.device) -> float:
    """Mean velocity error of a network over a fixed batch."""
    total = 0.0
    for start in range(0, len(batch), CHUNK):
        losses = flow_losses(
            network,
            **batch.tensors(start, start + CHUNK, device),
            patch_size=config.model.patch,
            prediction=config.model.prediction,
            channels_last=config.training.channels_last,
        )
        total += float(losses.double().sum())
    return total / len(batch)
