"""Averaged weights, always float32 and always in a separate network.

The average lives in a separate copy of the network, so evaluating it needs no swap, and no tensor
of it ever aliases a live weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

from modelops.training.config import EmaSection


def effective_decay(section: EmaSection, update: int) -> float:
    """The decay of the n-th update, n = 1, 2, ...; grows towards `section.decay`.

    ramp: (1 + n) / (10 + n), as in diffusers. power: (1 - 1/n)^(g + 1) with g from the relative
    width of the averaging window, as in section 3.1 of Karras et al. 2023 (arXiv:2312.02696).
    """
    if section.warmup == "ramp":
        return min(section.decay, (1 + update) / (10 + update))
    if section.warmup == "power":
        return min(section.decay, (1 - 1 / update) ** (power_exponent(section.power_std) + 1))
    return section.decay


def power_exponent(relative_std: float) -> float:
    """The exponent g > 0 of a power-function average whose window has this relative width.

    Solves std^2 = (g + 1) / ((g + 2)^2 (g + 3)) by bisection; `relative_std` in (0, 0.28).
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        width = math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3)))
        low, high = (middle, high) if width > relative_std else (low, middle)
    return (low + high) / 2


class Ema:
    """An exponential moving average of a network's parameters and buffers.

    Attributes:
        network: the averaged copy: float32, eval mode, no gradients.
    """

    def __init__(self, network: torch.nn.Module, section: EmaSection) -> None:
        self.section = section
        self.network: Any = copy.deepcopy(network).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, live: torch.nn.Module, update: int) -> float:
        """Move the average towards `live`; returns the decay that was used (0 copies it)."""
        decay = effective_decay(self.section, update) if self.section.use else 0.0
        averages, weights = [], []
        for average, weight in _pairs(self.network, live):
            if average.is_floating_point():
                averages.append(average)
                weights.append(weight.float())
            else:
                average.copy_(weight)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        return decay


def _pairs(
    average: torch.nn.Module, live: torch.nn.Module
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    current = dict(live.state_dict())
    for name, tensor in average.state_dict().items():
        yield tensor, current[name].detach()
