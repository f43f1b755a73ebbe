"""Which processes share an evaluation's work, and the source that carries them along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import UsageError
from modelops.evaluation.crew.ranks import LaunchedRanks, launched_ranks
from modelops.evaluation.crew.threads import device_of
from modelops.evaluation.crew.work import Crew
from modelops.evaluation.crew.workers import Workers
from modelops.models.sources import ImageRequest, ModelSource
from modelops.records.evaluation import SourceInfo


class SharedSource:
    """A source whose images are made, and read, by a crew. Its own calls stay in this process."""

    def __init__(self, inner: ModelSource, crew: Crew) -> None:
        if inner.info.kind == "endpoint":
            raise UsageError(
                "an endpoint is not divided among processes",
                hint="use several processes for a checkpoint, an artifact or a folder",
            )
        self.inner, self.crew = inner, crew

    @property
    def info(self) -> SourceInfo:
        return self.inner.info

    @property
    def scheduler_name(self) -> str:
        return self.inner.scheduler_name

    @property
    def defaults(self) -> ImageRequest:
        return self.inner.defaults

    @property
    def batch_size(self) -> int:
        return int(getattr(self.inner, "batch_size", 4))

    def generate(self, requests: Sequence[ImageRequest]) -> list[npt.NDArray[np.uint8]]:
        return self.inner.generate(requests)


def inner_source(source: ModelSource) -> ModelSource:
    """The source itself, without a crew."""
    return source.inner if isinstance(source, SharedSource) else source


def crew_of(source: ModelSource) -> Crew | None:
    """Who shares the work on a source; None where one process does all of it."""
    return source.crew if isinstance(source, SharedSource) else None


def open_shared(opening: Mapping[str, Any], processes: int) -> SharedSource | None:
    """The source of a `modelops eval` with several processes; None where there is one only.

    Args:
        opening: keyword arguments of `open_source`.
        processes: what --processes says. Under a launcher it must be 1.

    Raises:
        UsageError: --processes under a launcher, or a source that is not divided.
    """
    from modelops.evaluation.sources import open_source

    launched = launched_ranks()
    if launched is None and processes == 1:
        return None
    if launched is None:
        here = {**opening, "device": device_of(opening["device"], 0)}
        return SharedSource(open_source(**here), Workers(processes, opening))
    if processes > 1:
        raise UsageError(
            f"--processes {processes} within a launcher's {launched[1]} processes",
            hint="leave --processes out, or run the command without a launcher",
        )
    rank, world, local = launched
    here = {**opening, "device": device_of(opening["device"], local)}
    return SharedSource(open_source(**here), LaunchedRanks(rank, world, local))
