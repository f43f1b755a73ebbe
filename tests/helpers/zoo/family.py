"""One family of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["text", "class", "unconditional", "image"]


@dataclass(frozen=True)
class Family:
    """A family of diffusers pipelines and its tiny one.

    Attributes:
        name: as people say it, with the variant: "Flux 1 (schnell)".
        build: makes the pipeline; random weights come from torch's seeded generator.
        size: height and width in pixels of its quick calls; None where it has one size only.
        other: another size that it takes; None where it has one size only.
        kind: what a call must be given: a prompt, a class, nothing, or a prompt and an image.
        needs: a package that it needs beyond the project's.
        guided: whether other guidance makes another image.
        steps: two numbers of steps that it takes.
        refused: what modelops says of it, where it makes no image of a prompt alone.
    """

    name: str
    build: Callable[[], Any]
    size: tuple[int, int] | None = (32, 32)
    other: tuple[int, int] | None = (48, 32)
    kind: Kind = "text"
    needs: str = ""
    guided: bool = True
    steps: tuple[int, int] = (3, 5)
    refused: str = ""

    def make(self) -> Any:
        """Make the pipeline, the same one every time, without a progress bar."""
        torch.manual_seed(0)
        pipeline = self.build()
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # transformers makes networks with dropout at work
        return pipeline
