"""State that a pipeline's call changes outside itself: its samplers' and the global generators'."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Samplers:
    """Samplers of a pipeline. They keep their place and what they saw last, so every call is made
    with a state of its own.

    A state replaces the attributes of the samplers and not the samplers themselves, which a
    combined pipeline's parts share.

    Args:
        pipeline: no call of it is under way.
    """

    def __init__(self, pipeline: Any) -> None:
        parts = pipeline.components.values()
        self._samplers = [part for part in parts if hasattr(part, "set_timesteps")]
        self._first = [copy.deepcopy(vars(sampler)) for sampler in self._samplers]

    def fresh(self) -> list[dict[str, Any]]:
        """Return the state of samplers that have not been used."""
        return copy.deepcopy(self._first)

    @contextmanager
    def using(self, state: list[dict[str, Any]]) -> Iterator[None]:
        """Give the samplers a state within the block, which changes it."""
        before = [sampler.__dict__ for sampler in self._samplers]
        for sampler, own in zip(self._samplers, state, strict=True):
            sampler.__dict__ = own
        try:
            yield
        finally:
            for sampler, own in zip(self._samplers, before, strict=True):
                sampler.__dict__ = own


class GlobalNoise:
    """State of the global generators of torch, numpy and Python, of one image alone.

    Within a `with` block they draw from it; the next block goes on where the last one ended.

    Args:
        seed: of all of them, in [0, 2**53).
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._state: Any = None
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = _states()
        if self._seed is None:
            _set_states(self._state)
        else:
            torch.manual_seed(self._seed)
            np.random.seed(self._seed % 2**32)
            random.seed(self._seed)
            self._seed = None

    def __exit__(self, *exception: object) -> None:
        self._state = _states()
        _set_states(self._before)


def _states() -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), devices, np.random.get_state(), random.getstate()


def _set_states(states: tuple[Any, ...]) -> None:
    cpu, devices, numpy_state, python_state = states
    torch.set_rng_state(cpu)
    if devices:
        torch.cuda.set_rng_state_all(devices)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


@contextmanager
def watching_global_noise() -> Iterator[list[bool]]:
    """Give a list that holds, after the block, whether any global generator was drawn from."""
    found: list[bool] = []
    before = _digest(_states())
    yield found
    found.append(_digest(_states()) != before)


def _digest(states: tuple[Any, ...]) -> tuple[Any, ...]:
    cpu, devices, numpy_state, python_state = states
    return (
        cpu.numpy().tobytes(), [device.cpu().numpy().tobytes() for device in devices],
        numpy_state[1].tobytes(), numpy_state[2:], python_state,
    )  # fmt: skip
