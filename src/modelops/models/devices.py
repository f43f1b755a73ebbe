"""Devices of torch by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from modelops.base.errors import UsageError


def open_device(name: str) -> torch.device:
    """Open a device by torch's name: "cpu", "cuda", "cuda:1".

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: no such name", hint="cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= visible:
            raise UsageError(
                f"device {name!r}: {visible} CUDA devices are visible", hint="see `modelops doctor`"
            )
    return device


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of a GPU in float32 as it is, not in TF32, whose ten bits would
    show in features. Changes nothing on a CPU; never run on a GPU yet."""
    products = torch.backends.cuda.matmul.allow_tf32
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions
