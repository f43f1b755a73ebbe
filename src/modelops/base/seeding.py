"""Random streams. Each is a function of (seed, purpose, index) and of nothing else.

Image k of prompt p depends on `derive_seed(seed, "image", p, k)` alone: not on batch size, order,
number of processes, resume, or the device (noise is drawn on the CPU).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact


def derive_seed(seed: int, purpose: str, *index: int | str) -> int:
    """Derive a seed in [0, 2**53) for one stream.

    Args:
        seed: the user's seed.
        purpose: purpose of the stream, such as "image" or "timestep".
        index: position within the purpose; strings, such as a prompt, count by their text.
    """
    parts = [str(int(seed)), purpose, *(f"{type(part).__name__}:{part}" for part in index)]
    digest = hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def image_seed(seed: int, prompt: str, replicate: int = 0) -> int:
    """The seed of replicate k of a prompt in an evaluation; in [0, 2**53)."""
    return derive_seed(seed, "image", prompt, replicate)


def numpy_generator(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, counter-based) for one stream."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, purpose, *index)))


def torch_generator(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """A torch generator on the CPU for one stream."""
    import torch

    return torch.Generator("cpu").manual_seed(derive_seed(seed, purpose, *index))
