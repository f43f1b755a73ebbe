"""modelops' own pipeline over exported networks, without torch between two of their calls.

What lies between two network evaluations is a handful of operations on a few thousand numbers. In
torch these took a tenth of an image's time (bench/bench_overhead.py); in NumPy, on arrays made
once, a third of that, with the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from modelops.export.runtimes.modules import ExportedModule
from modelops.export.signatures import TIMESTEP_NAMES
from modelops.models.pipeline import PixelFlowPipeline


def is_plain_euler(scheduler: Any) -> bool:
    """Whether a step of this scheduler is x + (next sigma - sigma) * velocity and nothing else."""
    return (
        type(scheduler) is FlowMatchEulerDiscreteScheduler
        and not scheduler.config.stochastic_sampling
    )


class ExportedFlowPipeline(PixelFlowPipeline):
    """A PixelFlowPipeline that follows plain Euler steps in NumPy where its UNet is a graph on the
    CPU. Anything else goes the way of its parent."""

    def denoise(
        self,
        latents: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
        on_step: Any = None,
    ) -> torch.Tensor:
        unet = self.unet
        listened_to = on_step is not None or "forward" in vars(unet)
        if (
            listened_to
            or not isinstance(unet, ExportedModule)
            or unet.device.type != "cpu"
            or not is_plain_euler(self.scheduler)
        ):
            return super().denoise(latents, text, scale, on_step)
        guided = scale != 1.0
        inputs = torch.cat([latents, latents]) if guided else latents.clone()
        sigmas = self.scheduler.sigmas.numpy()
        levels = (self.scheduler.timesteps / 1000.0).numpy()
        graph, signature = unet.parts["forward"]
        timesteps = torch.empty(len(inputs))
        arguments = self.unet_arguments(inputs, timesteps, *text)
        feed = {name: value.numpy() for name, value in signature.flatten(arguments).items()}
        rows = feed["sample"]
        times = next(feed[name] for name in TIMESTEP_NAMES if name in feed)
        place, count = latents.numpy().copy(), len(latents)
        for step in self.progress_bar(range(len(levels))):
            rows[:count] = place
            if guided:
                rows[count:] = place
            times[:] = levels[step] * np.float32(1000.0)
            velocity = graph.run_all(feed)[0]
            if self.config["prediction"] == "sample":
                velocity = (rows - velocity) / max(levels[step], np.float32(0.05))
            if guided:
                away = velocity[count:]
                velocity = away + np.float32(scale) * (velocity[:count] - away)
            place += (sigmas[step + 1] - sigmas[step]) * velocity
        return torch.from_numpy(place)
