"""Devices, precision and processes of a run, as its launcher set them up."""

from __future__ import annotations

from typing import Any

import torch

from modelops.config import TrainConfig
from modelops.errors import TrainingError


def make_accelerator(config: TrainConfig) -> Any:
    """Devices, precision and processes, as the launcher set them up.

    Raises:
        TrainingError: this machine cannot train in the config's precision.
    """
    from accelerate import Accelerator

    precision = config.training.precision
    has_cuda = torch.cuda.is_available()
    if precision == "fp16" and not has_cuda:
        raise TrainingError("precision fp16 needs a GPU", hint="set training.precision: bf16 or no")
    accelerator = Accelerator(mixed_precision=precision, cpu=not has_cuda)
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise TrainingError(
            f"{accelerator.distributed_type.value}: sharded training is not supported",
            hint="launch it data-parallel: modelops train --processes N",
        )
    return accelerator


def device_name(device: torch.device) -> str:
    """What the run trains on, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
