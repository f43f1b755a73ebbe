"""Out of memory: recognise it in all its spellings, and take half the microbatch."""

from __future__ import annotations

_SPELLINGS = (
    "out of memory",  # CUDA out of memory, CUDA error: out of memory, HIP, XPU, MPS
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cannot allocate memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return False
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _SPELLINGS)


def smaller_microbatch(microbatch: int, per_rank: int) -> int | None:
    """The largest divisor of `per_rank` that is at most half of `microbatch`; None below one."""
    for size in range(microbatch // 2, 0, -1):
        if per_rank % size == 0:
            return size
    return None
