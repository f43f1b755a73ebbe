"""Steps of many trajectories at once, each at its own place on its own schedule.

The commonest scheduler, plain Euler along a flow in float32, is advanced for all rows at once, with
the same operations as row by row, and so with the same bits. Any other scheduler has state, so each
row gets its own copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from modelops.export.runtimes.flow import is_plain_euler

_KEPT = 256  # schedules by step count


@dataclass(slots=True)
class Schedule:
    """Schedule of a trajectory.

    Attributes:
        timesteps: [S], 1000 sigma, on the device.
        levels: S of them, sigma: the timesteps over 1000, in their precision.
        deltas: S of them in float32, next sigma minus sigma; none where `scheduler` does the steps.
        scheduler: a copy for this trajectory alone, or None.
    """

    timesteps: torch.Tensor
    levels: list[float]
    deltas: list[float]
    scheduler: Any


def guide(toward: torch.Tensor, away: torch.Tensor, scales: list[float]) -> torch.Tensor:
    """Apply classifier-free guidance (Ho and Salimans 2022) to rows [R, C, h, w], each by its own
    scale, with the bits that the pipeline gets for a row alone."""
    if toward.dtype == torch.float32:
        scale = torch.tensor(scales, dtype=torch.float32, device=toward.device).view(-1, 1, 1, 1)
        return away + scale * (toward - away)
    # A half-precision tensor of scales would round what a Python float does not.
    pairs = zip(toward.split(1), away.split(1), scales, strict=True)
    return torch.cat([other + scale * (own - other) for own, other, scale in pairs])


class Stepper:
    """Maker of schedules, and of the steps along them.

    Args:
        scheduler: the pipeline's; it is never changed.
        device: of the latents.
        dtype: of the latents.
    """

    def __init__(self, scheduler: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._scheduler = scheduler
        self._device = device
        self._known: OrderedDict[int, Schedule] = OrderedDict()
        self.together = is_plain_euler(scheduler) and dtype == torch.float32

    def schedule(self, steps: int) -> Schedule:
        """Return a schedule of this many steps, for one trajectory."""
        if steps in self._known:
            self._known.move_to_end(steps)
            return self._known[steps]
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(steps, device=self._device)
        timesteps = scheduler.timesteps
        levels = (timesteps / 1000.0).tolist()
        if not self.together:
            return Schedule(timesteps, levels, [], scheduler)
        sigmas = scheduler.sigmas
        found = Schedule(timesteps, levels, (sigmas[1:] - sigmas[:-1]).tolist(), None)
        self._known[steps] = found
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return found

    def step(
        self,
        schedules: list[Schedule],
        places: list[int],
        velocity: torch.Tensor,
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """Return the latents [R, C, h, w] after one step.

        Args:
            schedules: R of them.
            places: step number of each row.
            velocity: [R, C, h, w], guidance applied.
        """
        if self.together:
            moves = [
                schedule.deltas[place] for schedule, place in zip(schedules, places, strict=True)
            ]
            sizes = torch.tensor(moves, dtype=torch.float32, device=latents.device)
            return latents + sizes.view(-1, 1, 1, 1) * velocity
        rows = [
            schedule.scheduler.step(
                velocity[row : row + 1], schedule.timesteps[place], latents[row : row + 1],
                return_dict=False,
            )[0]
            for row, (schedule, place) in enumerate(zip(schedules, places, strict=True))
        ]  # fmt: skip
        return torch.cat(rows)
