"""Devices and processes of a run, as its launcher set them up."""

from __future__ import annotations

from typing import Any

import torch

from modelops.base.errors import TrainingError


def make_accelerator() -> Any:
    """Devices and processes, as the launcher set them up. Precision is the stepper's business: it
    is chosen only after some steps were measured.

    Raises:
        TrainingError: the launcher shards the model.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise TrainingError(
            f"{accelerator.distributed_type.value}: sharded training is not supported",
            hint="launch it data-parallel: modelops train --processes N",
        )
    return accelerator


def device_name(device: torch.device) -> str:
    """Name of the device that the run trains on, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
