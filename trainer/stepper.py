"""One optimizer step: passes over microbatches in a precision, clipping, the update."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from modelops.training.config import TrainConfig

from .batches import Batch
from .objective import flow_losses

# The weights, the optimizer and the losses are float32 in all of them.
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Gradients and updates of one network.

    Args:
        network: the weights, float32.
        forward: what is called: the network, or what wraps or compiles it.
        optimizer: over the weights.
        precision: fp32, bf16, or fp16 with loss scaling.

    Attributes:
        scaler: of fp16's losses, or None.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        forward: Any,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        device: torch.device,
        precision: str,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.precision = precision
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        self._forward = forward

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which a network computes in the precision."""
        dtype = DTYPES[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def backward(self, batch: Batch, start: int, stop: int, *, of: int) -> torch.Tensor:
        """Add the gradients of samples start..stop to those of a step over `of` samples; returns
        their share of its mean loss."""
        losses = flow_losses(
            self._call,
            **batch.tensors(start, stop, self.device),
            patch_size=self.config.model.patch,
            prediction=self.config.model.prediction,
            channels_last=self.config.training.channels_last,
        )
        share = losses.sum() / of
        (self.scaler.scale(share) if self.scaler else share).backward()
        return share.detach()

    def clip(self) -> float:
        """Clip the gradients; returns their norm before that. Not finite: the step overflowed."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return float(
            torch.nn.utils.clip_grad_norm_(
                self.network.parameters(), self.config.training.grad_clip
            )
        )

    def update(self, norm: float) -> bool:
        """Update the weights and forget the gradients; False: fp16 overflowed, nothing moved."""
        usable = self.scaler is None or math.isfinite(norm)
        if usable:
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()
        return usable

    def _call(self, *arguments: Any, **options: Any) -> Any:
        with self.autocast():
            return self._forward(*arguments, **options)
