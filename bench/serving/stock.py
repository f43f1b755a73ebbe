"""Two stock BentoML services beside the node, as its examples and documents would have them.

`OneByOne`: BentoML's diffusion examples: the torch pipeline, one request at a time, a PNG back.
`Batching`: adaptive batching over the very artifact and runtime that the node serves.

Read from the environment: BENCH_CHECKPOINT, BENCH_ARTIFACT, BENCH_FILTER (1 or 0), BENCH_WAY.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import bentoml
from bentoml.exceptions import InvalidArgument
from pydantic import BaseModel

WITH_FILTER = os.environ.get("BENCH_FILTER") == "1"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
QUIET: dict[str, Any] = {
    "traffic": {"timeout": 600},
    "workers": 1,
    "metrics": {"enabled": False},
    "logging": {"access": {"enabled": False}},
}


class Picture(BaseModel):
    """What is asked for."""

    prompt: str
    seed: int
    steps: int
    guidance: float


def open_checker() -> Any:
    """The filter, or None when this run goes without."""
    from serving.batches import Checker

    return Checker(CORES) if WITH_FILTER else None


@bentoml.service(name="bench-one-by-one", **QUIET)
class OneByOne:
    """Torch, fp32, one request at a time."""

    def __init__(self) -> None:
        import torch
        from diffusers import DiffusionPipeline

        self.pipeline = DiffusionPipeline.from_pretrained(
            os.environ["BENCH_CHECKPOINT"], trust_remote_code=True
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.generator = torch.Generator
        self.checker = open_checker()

    @bentoml.api
    def generate(self, prompt: str, seed: int, steps: int, guidance: float) -> str:
        """A PNG in base64."""
        import numpy as np

        from serving.batches import to_png

        image = self.pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=self.generator().manual_seed(seed),
        ).images[0]
        pixels = np.asarray(image)
        if self.checker and any(self.checker.check([pixels])):
            raise InvalidArgument("withheld")
        return base64.b64encode(to_png(pixels)).decode("ascii")


@bentoml.service(name="bench-batching", **QUIET)
class Batching:
    """INT8 in the node's runtime, adaptive batches of up to 16 requests."""

    def __init__(self) -> None:
        from modelops.export.artifact.open import open_artifact
        from serving.batches import BatchMaker

        self.maker = BatchMaker(open_artifact(os.environ["BENCH_ARTIFACT"]).pipeline)
        self.maker.warm(32)
        self.way = os.environ.get("BENCH_WAY", "longest")
        self.checker = open_checker()

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=60_000)
    def generate(self, requests: list[Picture]) -> list[str]:
        """PNGs in base64, in the requests' order; "" for a withheld one, which fails alone."""
        from serving.batches import to_png

        pictures = self.maker.make(requests, self.way)
        blocked = self.checker.check(pictures) if self.checker else [False] * len(pictures)
        return [
            "" if withheld else base64.b64encode(to_png(picture)).decode("ascii")
            for picture, withheld in zip(pictures, blocked, strict=True)
        ]
