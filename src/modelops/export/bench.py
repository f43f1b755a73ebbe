"""Latency and throughput of model sources, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from modelops.errors import UsageError
from modelops.export.timing import interleaved_seconds, speed_ratio
from modelops.models.sources import ImageRequest, ModelSource
from modelops.records import Measurement


@dataclass(frozen=True)
class BenchRow:
    """One source at one batch size.

    Attributes:
        name: the source's address; runtime and precision stand beside it.
        batch_size: images made together.
        p50_s, p95_s: time of a batch, from prompts to pictures.
        images_per_second: batch_size / p50_s.
        speedup: how many times as fast as the first source at this batch size; None for the first.
        n: rounds.
    """

    name: str
    runtime: str
    precision: str
    batch_size: int
    p50_s: float
    p95_s: float
    images_per_second: float
    speedup: Measurement | None
    n: int


def bench_sources(
    sources: Sequence[ModelSource],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    steps: int = 8,
    rounds: int = 5,
    guidance: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[BenchRow]:
    """Time whole images, the sources taking turns in every round.

    Args:
        sources: what to compare; speed-ups are over the first.
        batch_sizes: images made together.
        steps: network evaluations of an image.
        rounds: times that each source makes each batch, after one round of warming up.
        guidance: guidance scale; the source's own when not given.
        on_progress: called with (batch sizes done, batch sizes).

    Raises:
        UsageError: no sources, or a batch size, step or round below 1.
    """
    if not sources:
        raise UsageError("no source to measure")
    if min((*batch_sizes, steps, rounds), default=0) < 1 or not batch_sizes:
        raise UsageError("batch sizes, steps and rounds must be at least 1")
    names = [f"{i}:{s.info.uri}:{s.info.runtime}" for i, s in enumerate(sources)]
    table: list[BenchRow] = []
    for done, batch in enumerate(batch_sizes):
        requests = [
            ImageRequest(prompt=f"picture {index}", seed=index, steps=steps, guidance=guidance)
            for index in range(batch)
        ]
        runs: dict[str, Callable[[], object]] = {}
        for name, source in zip(names, sources, strict=True):
            if hasattr(source, "batch_size"):
                source.batch_size = batch  # a larger one would be filled up with copies
            runs[name] = partial(source.generate, requests)
        seconds = interleaved_seconds(runs, rounds=rounds, warmup=1)
        protocol: dict[str, Any] = {"batch": batch, "steps": steps, "what": "whole images"}
        for index, (name, source) in enumerate(zip(names, sources, strict=True)):
            p50, p95 = (float(value) for value in np.quantile(seconds[name], [0.5, 0.95]))
            table.append(
                BenchRow(
                    name=source.info.uri,
                    runtime=source.info.runtime,
                    precision=source.info.precision,
                    batch_size=batch,
                    p50_s=p50,
                    p95_s=p95,
                    images_per_second=batch / p50,
                    speedup=None
                    if index == 0
                    else speed_ratio(seconds, of=name, over=names[0], protocol=protocol),
                    n=rounds,
                )
            )
        if on_progress:
            on_progress(done + 1, len(batch_sizes))
    return table
