"""Many trajectories in one step have the bits of each alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from modelops.serving.engine.jobs import preview_steps
from modelops.serving.engine.stepping import Stepper, guide

CPU = torch.device("cpu")


def trajectories(scheduler: Any, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents after two steps: of each trajectory by its own scheduler, and of all together."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn((len(counts), 3, 4, 4), generator=generator)
    velocities = [torch.randn(start.shape, generator=generator) for _ in range(2)]
    alone = []
    for row, steps in enumerate(counts):
        own = copy.deepcopy(scheduler)
        own.set_timesteps(steps)
        latents = start[row : row + 1]
        for place in range(2):
            velocity = velocities[place][row : row + 1]
            latents = own.step(velocity, own.timesteps[place], latents, return_dict=False)[0]
        alone.append(latents)
    stepper = Stepper(scheduler, CPU, torch.float32)
    schedules = [stepper.schedule(steps) for steps in counts]
    together = start
    for place in range(2):
        together = stepper.step(schedules, [place] * len(counts), velocities[place], together)
    return torch.cat(alone), together


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=["euler", "shifted", "heun", "unipc"],
)
def test_bits_of_each_alone(scheduler: Any) -> None:
    alone, together = trajectories(scheduler, [4, 9, 4, 30])
    assert torch.equal(alone, together)


def test_only_plain_euler_in_float32_goes_together() -> None:
    plain = FlowMatchEulerDiscreteScheduler()
    assert Stepper(plain, CPU, torch.float32).together
    assert not Stepper(plain, CPU, torch.bfloat16).together
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert not Stepper(noisy, CPU, torch.float32).together
    assert not Stepper(FlowMatchHeunDiscreteScheduler(), CPU, torch.float32).together


def test_schedulers_with_state_are_not_shared() -> None:
    stepper = Stepper(FlowMatchHeunDiscreteScheduler(), CPU, torch.float32)
    assert stepper.schedule(4).scheduler is not stepper.schedule(4).scheduler
    euler = Stepper(FlowMatchEulerDiscreteScheduler(), CPU, torch.float32)
    assert euler.schedule(4) is euler.schedule(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guidance_has_the_pipelines_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    toward, away = torch.randn((2, 3, 5, 4, 4), generator=generator).to(dtype)
    scales = [1.1, 3.0, 7.3]
    together = guide(toward, away, scales)
    for row, scale in enumerate(scales):
        alone = away[row : row + 1] + scale * (toward[row : row + 1] - away[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


def test_previews_are_evenly_spaced_and_never_last() -> None:
    assert preview_steps(16, 3) == {4: 0, 8: 1, 12: 2}
    assert preview_steps(30, 1) == {15: 0}
    assert preview_steps(3, 3) == {1: 0, 2: 1}
    assert preview_steps(1, 3) == {}
    assert preview_steps(16, 0) == {}
