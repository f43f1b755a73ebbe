"""Rectified flow: x_s = (1 - s) x0 + s eps, and a network that predicts the velocity eps - x0.

Liu et al. 2022, "Flow Straight and Fast" (arXiv:2209.03003); logit-normal times from Esser et al.
2024 (arXiv:2403.03206). Noise level s (sigma) is 0 at the image and 1 at pure noise.

Shapes: N batch, C = 3 p^2 channels, h = w = resolution / p, D text width, L text tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from modelops.base.seeding import numpy_generator

SMALLEST_LEVEL = 0.05  # an image prediction becomes a velocity by 1 / max(s, this)
# Velocity errors of an image prediction grow as 1 / s; in the loss no further than to this level,
# or training would spend itself on nearly clean images.
WEIGHTED_LEVEL = 0.25


def stratified_sigmas(
    seed: int, purpose: str, step: int, batch: int, *, sampling: str
) -> npt.NDArray[np.float32]:
    """Noise levels [batch] in (0, 1) of one step: one draw from each of `batch` equal strata.

    The strata cover the whole effective batch, so they do not depend on how it is split into
    microbatches and ranks.

    Args:
        sampling: "uniform" or "logit_normal" (sigmoid of a standard normal).
    """
    random = numpy_generator(seed, purpose, step)
    quantiles = (random.permutation(batch) + random.random(batch)) / batch
    quantiles = quantiles.clip(1e-4, 1 - 1e-4)
    if sampling == "logit_normal":
        normal = torch.special.ndtri(torch.from_numpy(quantiles))
        quantiles = torch.sigmoid(normal).numpy()
    return quantiles.astype(np.float32)


def images_to_latents(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images [N, H, W, 3] uint8 to latents [N, C, h, w] float32 in [-1, 1]."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return F.pixel_unshuffle(pixels, patch_size)


def predict_velocity(
    network: Any,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    pooled: torch.Tensor,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    prediction: str,
) -> torch.Tensor:
    """`PixelFlowPipeline.predict_velocity` for a network that may be wrapped for training."""
    output = network(
        latents,
        sigmas * 1000.0,
        encoder_hidden_states=tokens,
        encoder_attention_mask=mask,
        class_labels=pooled,
        return_dict=False,
    )[0]
    if prediction == "sample":
        level = sigmas.clamp(min=SMALLEST_LEVEL).view(-1, 1, 1, 1)
        velocity: torch.Tensor = (latents - output.float()) / level
        return velocity
    return output.float()


def flow_losses(
    network: Any,
    images: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    pooled: torch.Tensor,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    patch_size: int,
    prediction: str,
    channels_last: bool = False,
) -> torch.Tensor:
    """Mean squared velocity error of each sample, [N] float32; with an image prediction its
    weight falls below s = 0.25.

    Args:
        images: [N, H, W, 3] uint8.
        noise: [N, C, h, w], standard normal.
        sigmas: [N] in (0, 1).
        pooled, tokens, mask: [N, D], [N, L, D], [N, L]; the last two None without cross-attention.
    """
    clean = images_to_latents(images, patch_size)
    level = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - level) * clean + level * noise
    if channels_last:
        noisy = noisy.contiguous(memory_format=torch.channels_last)
    velocity = predict_velocity(network, noisy, sigmas, pooled, tokens, mask, prediction=prediction)
    losses = (velocity - (noise - clean)).square().mean(dim=(1, 2, 3))
    if prediction == "sample":
        losses = losses * (sigmas.clamp(min=SMALLEST_LEVEL) / sigmas.clamp(min=WEIGHTED_LEVEL)) ** 2
    return losses
