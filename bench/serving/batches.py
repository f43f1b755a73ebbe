"""Lists of requests to images without a step scheduler: what one can write with stock tools.

Three ways to run a batch of mixed step counts on the artifact's own pipeline:

- longest: one loop over the longest request's steps. All rows stay in the forward pass to its end;
  a row whose own steps are done keeps its image. What a batched service does by nature.
- groups: the pipeline's own call, for each (steps, guidance) of the batch. No loop to write.
- dropped: as longest, but a finished row leaves the forward pass. Half way to a step scheduler.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

WAYS = ("longest", "groups", "dropped")
Pixels = Any  # [H, W, 3] uint8


class Request(Protocol):
    """What is read of a request."""

    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...


class BatchMaker:
    """Runs batches on a PixelFlowPipeline; embeddings of prompts are kept."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        self._texts: dict[str, tuple[torch.Tensor, ...]] = {}
        self._levels: dict[int, torch.Tensor] = {}

    def warm(self, max_rows: int) -> None:
        """Let the runtime compile what it compiles at first sight, as a service does at its start.

        Shapes that it fills up to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... rows.
        """
        pipeline = self.pipeline
        shape = pipeline.latent_shape(pipeline.resolution, pipeline.resolution)
        for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            if rows > max_rows:
                break
            text = pipeline.encode_prompt(["warm"] * rows)
            with torch.no_grad():
                pipeline.predict_velocity(torch.zeros(rows, *shape), torch.ones(rows), *text)

    def make(self, requests: Sequence[Request], way: str) -> list[Pixels]:
        """Images of the requests, each with its own seed, step count and guidance."""
        if way == "groups":
            return self._groups(requests)
        order = sorted(range(len(requests)), key=lambda index: -requests[index].steps)
        with torch.no_grad():
            made = self._together([requests[index] for index in order], drop=way == "dropped")
        pictures: list[Pixels] = [None] * len(requests)
        for index, picture in zip(order, made, strict=True):
            pictures[index] = picture
        return pictures

    def _together(self, requests: list[Request], *, drop: bool) -> list[Pixels]:
        """Requests by falling step count, in one loop."""
        pipeline, count = self.pipeline, len(requests)
        shape = (1, *pipeline.latent_shape(pipeline.resolution, pipeline.resolution))
        latents = torch.cat(
            [torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in requests]
        )
        steps = [request.steps for request in requests]
        sigmas = torch.zeros(count, steps[0] + 1)
        for row, request in enumerate(requests):
            levels = self._sigmas(request.steps)
            sigmas[row, : len(levels)] = levels
        deltas = sigmas[:, 1:] - sigmas[:, :-1]  # 0 after a row's own last step
        guided = [row for row in range(count) if requests[row].guidance != 1.0]
        scales = torch.tensor([requests[row].guidance for row in guided]).view(-1, 1, 1, 1)
        own_text, empty = self._text([r.prompt for r in requests]), self._text([""] * len(guided))
        for step in range(steps[0]):
            rows = sum(n > step for n in steps) if drop else count
            pairs = sum(row < rows for row in guided)
            second = guided[:pairs]
            levels = sigmas[:rows, step].clamp(min=1e-3)
            velocity = pipeline.predict_velocity(
                torch.cat([latents[:rows], latents[second]]),
                torch.cat([levels, levels[second]]),
                *(
                    torch.cat([a[:rows], b[:pairs]])
                    for a, b in zip(own_text, empty, strict=True)
                ),
            )  # fmt: skip
            own, away = velocity[:rows].clone(), velocity[rows:]
            own[second] = away + scales[:pairs] * (own[second] - away)
            latents[:rows] += deltas[:rows, step].view(-1, 1, 1, 1) * own
        return self._pixels(pipeline.decode(latents))

    def _groups(self, requests: Sequence[Request]) -> list[Pixels]:
        groups: dict[tuple[int, float], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault((request.steps, request.guidance), []).append(index)
        pictures: list[Pixels] = [None] * len(requests)
        for (steps, guidance), indices in groups.items():
            made = self.pipeline(
                [requests[index].prompt for index in indices],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(requests[i].seed) for i in indices],
                output_type="pt",
            ).images
            for index, picture in zip(indices, self._pixels(made), strict=True):
                pictures[index] = picture
        return pictures

    def _sigmas(self, steps: int) -> torch.Tensor:
        if steps not in self._levels:
            self.pipeline.scheduler.set_timesteps(steps)
            self._levels[steps] = self.pipeline.scheduler.sigmas.clone()
        return self._levels[steps]

    def _text(self, prompts: list[str]) -> list[torch.Tensor]:
        missing = [text for text in dict.fromkeys(["", *prompts]) if text not in self._texts]
        if missing:
            encoded = self.pipeline.encode_prompt(missing)
            for index, text in enumerate(missing):
                self._texts[text] = tuple(part[index : index + 1] for part in encoded)
        chosen = [self._texts[text] for text in prompts] or [
            tuple(part[:0] for part in self._texts[""])
        ]
        return [torch.cat(parts) for parts in zip(*chosen, strict=True)]

    @staticmethod
    def _pixels(decoded: torch.Tensor) -> list[Pixels]:
        return list((decoded * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy())


class Checker:
    """The node's own image filter on all cores: a thread for each, with a share of the images."""

    def __init__(self, threads: int) -> None:
        from modelops.safety.image import OpenNsfwFilter

        self._filter = OpenNsfwFilter(threads=1)
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads

    def check(self, pictures: Sequence[Pixels]) -> list[bool]:
        """Which images are blocked."""
        shares = [s.tolist() for s in np.array_split(np.arange(len(pictures)), self._threads)]
        parts = self._pool.map(
            lambda share: self._filter.check([pictures[index] for index in share]) if share else [],
            shares,
        )
        return [verdict.blocked for part in parts for verdict in part]


def to_png(pixels: Pixels) -> bytes:
    """Pixels to a PNG file."""
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(out, "PNG")
    return out.getvalue()
