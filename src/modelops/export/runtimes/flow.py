"""Fast path of modelops' own pipeline over exported networks, without torch between their calls.

Between two network evaluations there are a few operations on a few thousand numbers. In torch they
took a tenth of an image's time (bench/bench_overhead.py). In NumPy, on arrays made once, they take
half of that, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from modelops.export.graphs.graph import Array, Graph
from modelops.export.runtimes.modules import ExportedModule
from modelops.models.pipeline import PixelFlowPipeline
from modelops.models.pipelines.signatures import TIMESTEP_NAMES


def is_plain_euler(scheduler: Any) -> bool:
    """Return whether a scheduler's step is x + (next sigma - sigma) * velocity and nothing else."""
    return (
        type(scheduler) is FlowMatchEulerDiscreteScheduler
        and not scheduler.config.stochastic_sampling
    )


class ExportedFlowPipeline(PixelFlowPipeline):
    """PixelFlowPipeline that makes plain Euler steps in NumPy if its UNet is a graph on the CPU.
    Everything else is done by the parent class."""

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: exported networks have no hooks."""

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
        arguments = self.unet_arguments(inputs, torch.ones(len(inputs)), *text)
        feed = {name: value.numpy() for name, value in signature.flatten(arguments).items()}
        bound, run = bind(graph, feed)
        rows = bound["sample"]
        times = next(bound[name] for name in TIMESTEP_NAMES if name in bound)
        place, count = latents.numpy().copy(), len(latents)
        move, by_sample = np.empty_like(place), self.config["prediction"] == "sample"
        timesteps, deltas = levels * np.float32(1000.0), sigmas[1:] - sigmas[:-1]
        for step in self.progress_bar(range(len(levels))):
            rows[:count] = place
            if guided:
                rows[count:] = place
            times[:] = timesteps[step]
            velocity = run()[0]
            if by_sample:
                velocity = (rows - velocity) / max(levels[step], np.float32(0.05))
            if guided:  # away + scale * (toward - away)
                away = velocity[count:]
                np.subtract(velocity[:count], away, out=move)
                np.multiply(move, np.float32(scale), out=move)
                np.add(move, away, out=move)
                np.multiply(move, deltas[step], out=move)
            else:
                np.multiply(velocity, deltas[step], out=move)
            place += move
        return torch.from_numpy(place)


def bind(
    graph: Graph, feed: dict[str, Array]
) -> tuple[dict[str, Array], Callable[[], list[Array]]]:
    """Return a graph's own `bind`, or its equivalent by calls: arrays to write to, and a function
    that computes the outputs from them."""
    if hasattr(graph, "bind"):
        found: tuple[dict[str, Array], Callable[[], list[Array]]] = graph.bind(feed)
        return found
    arrays = {name: array.copy() for name, array in feed.items()}
    return arrays, lambda: graph.run_all(arrays)
