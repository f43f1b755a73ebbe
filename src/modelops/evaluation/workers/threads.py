"""Division of one machine's cores and GPUs among processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def device_of(device: str, rank: int) -> str:
    """Return the device of a process: on "cuda", the next GPU for each, in turn."""
    if device != "cuda":
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{rank % count}" if count > 1 else device


def threads_of(processes: int) -> int:
    """Return the CPU threads of each process on this machine, 1 or more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    limit = int(wanted) if wanted.isdigit() and int(wanted) > 0 else (cores or 1)
    return max(1, min(limit, (cores or 1) // processes))


@contextlib.contextmanager
def fewer_threads(processes: int) -> Iterator[None]:
    """Within the block, let torch use only this process's part of the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads_of(processes)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
