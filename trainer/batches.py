"""Training data of a step, as a pure function of (seed, position in the run).

Sample k of a run (k = step * effective batch + place in the batch) is the same image with the
same noise, flip and caption drop whether the run was killed and resumed, split over more processes,
or cut into other microbatches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.seeding import numpy_generator
from modelops.training.config import TrainConfig

from .objective import stratified_sigmas
from .pictures import PictureSet
from .texts import TextTable


@dataclass(frozen=True, slots=True)
class Batch:
    """Part of one step: N samples.

    images [N, H, W, 3] uint8; noise [N, C, h, w], sigmas [N] and pooled [N, D] float32;
    tokens [N, L, D] float32 and mask [N, L] int64, or None without cross-attention.
    """

    images: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    pooled: torch.Tensor
    tokens: torch.Tensor | None
    mask: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self, start: int, stop: int, device: torch.device) -> dict[str, Any]:
        """Samples start..stop on `device`, as keyword arguments of `flow_losses`."""
        return {
            name: None
            if (tensor := getattr(self, name)) is None
            else tensor[start:stop].to(device, non_blocking=True)
            for name in self.__slots__
        }


class TrainingBatches:
    """The batches of a run.

    Args:
        images: the training split.
        texts: embeddings of its captions and of the empty caption.
        config: seed, dropout, flips, noise-level distribution.
        effective_batch: samples per step over all processes.
    """

    def __init__(
        self, pictures: PictureSet, texts: TextTable, config: TrainConfig, effective_batch: int
    ) -> None:
        self.pictures = pictures
        self.texts = texts
        self.config = config
        self.effective_batch = effective_batch
        self._weights = None
        if config.data.balance == "group":
            self._weights = group_weights(pictures.groups, config.data.balance_power)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def step_to_indices(self, step: int) -> npt.NDArray[np.int64]:
        """Return the images that step `step` (from 0) is trained on, [effective batch]."""
        positions = np.arange(step * self.effective_batch, (step + 1) * self.effective_batch)
        epochs, places = np.divmod(positions, len(self.pictures))
        return np.array(
            [self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
        )

    def step_to_batch(self, step: int, start: int, stop: int) -> Batch:
        """Places start..stop of the effective batch of step `step` (from 0)."""
        training, data = self.config.training, self.config.data
        size = self.effective_batch
        sigmas = stratified_sigmas(
            training.seed, "timestep", step, size, sampling=training.timestep_sampling
        )
        dropped = numpy_generator(training.seed, "caption_dropout", step).random(size)
        flipped = numpy_generator(training.seed, "flip", step).random(size)
        indices = self.step_to_indices(step)[start:stop]
        images = self.pictures.images(indices)
        for row in np.flatnonzero(flipped[start:stop] < data.horizontal_flip):
            images[row] = images[row, :, ::-1]
        captions = [
            "" if dropped[place] < training.caption_dropout else self.pictures.captions[index]
            for place, index in zip(range(start, stop), indices, strict=True)
        ]
        pooled, tokens, mask = self.texts.lookup(captions)
        shape = latent_shape(self.config)
        noise = [
            noise_of_sample(training.seed, step * size + place, shape)
            for place in range(start, stop)
        ]
        return Batch(
            images=torch.from_numpy(images),
            noise=torch.from_numpy(np.stack(noise)),
            sigmas=torch.from_numpy(sigmas[start:stop]),
            pooled=pooled,
            tokens=tokens,
            mask=mask,
        )

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the images of one epoch in order; with weights, a weighted draw of equal size."""
        count = len(self.pictures)
        random = numpy_generator(self.config.training.seed, "order", epoch)
        if self._weights is None:
            return random.permutation(count).astype(np.int64)
        # Systematic draw: an image of weight w comes floor(w) or ceil(w) times in an epoch.
        ladder = np.cumsum(self._weights) * count / self._weights.sum()
        chosen = np.searchsorted(ladder, np.arange(count) + random.random(), side="right")
        return random.permutation(chosen.clip(max=count - 1)).astype(np.int64)


def fixed_batch(pictures: PictureSet, texts: TextTable, config: TrainConfig, purpose: str) -> Batch:
    """Return every image of a small set once, with fixed noise levels and noise."""
    seed, shape, count = config.training.seed, latent_shape(config), len(pictures)
    pooled, tokens, mask = texts.lookup(pictures.captions)
    return Batch(
        images=torch.from_numpy(pictures.images(np.arange(count))),
        noise=torch.from_numpy(
            np.stack(
                [
                    numpy_generator(seed, f"{purpose}_noise", index).standard_normal(
                        shape, dtype=np.float32
                    )
                    for index in range(count)
                ]
            )
        ),
        sigmas=torch.from_numpy(
            stratified_sigmas(seed, f"{purpose}_timestep", 0, count, sampling="uniform")
        ),
        pooled=pooled,
        tokens=tokens,
        mask=mask,
    )


def noise_of_sample(
    seed: int, position: int, shape: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    """Standard normal noise [C, h, w] of sample `position` of the run."""
    return numpy_generator(seed, "noise", position).standard_normal(shape, dtype=np.float32)


def latent_shape(config: TrainConfig) -> tuple[int, int, int]:
    """Return (C, h, w) of one sample's latents."""
    side = config.model.resolution // config.model.patch
    return 3 * config.model.patch**2, side, side


def group_weights(groups: list[str], power: float = 0.5) -> npt.NDArray[np.float64]:
    """1 / (size of its group)^power for each sample."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    weights: npt.NDArray[np.float64] = (1.0 / counts[inverse] ** power).astype(np.float64)
    return weights
