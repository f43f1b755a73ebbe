"""Interface of the engine to a model: unfinished images, one network evaluation at a time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from modelops.models.request import ImageRequest
from modelops.serving.engine.jobs import Job


class Track(Protocol):
    """An image in the making.

    Attributes:
        job: whose it is.
    """

    job: Job

    @property
    def group(self) -> Hashable:
        """Tracks of one group can share a network evaluation."""

    @property
    def rows(self) -> int:
        """Rows that its next network evaluation takes."""

    @property
    def finished(self) -> bool:
        """Return whether no evaluation is left to do."""


TrackT = TypeVar("TrackT", bound=Track)


class StepModel(Protocol[TrackT]):
    """A pipeline taken apart at its network evaluations. Used by the engine's thread alone, but for
    `fill`, `rows_of` and `count_tokens`.

    Attributes:
        height, width: in pixels, of every image that is not asked for in another size.
        max_tokens: of a prompt that is read to its end.
        previews: whether `preview` can be called.
    """

    height: int
    width: int
    max_tokens: int
    previews: bool

    def fill(self, request: ImageRequest) -> ImageRequest:
        """The request with the pipeline's defaults in place of None.

        Raises:
            UsageError: something that the model cannot do.
        """

    def rows_of(self, request: ImageRequest) -> int:
        """Rows that each network evaluation of a filled request will take, as far as is known."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a text before truncation, with the special ones."""

    def prepare(self, max_rows: int) -> None:
        """Do what need not be done while a request waits."""

    def evaluate(self, rows: int) -> None:
        """One evaluation of so many rows, for its time only; after `prepare`."""

    def begin(self, jobs: Sequence[Job]) -> list[TrackT | Exception]:
        """A track, or why there is none, for each job. What is raised fails all of them."""

    def advance(self, tracks: Sequence[TrackT]) -> list[Exception | None]:
        """One network evaluation for tracks of one group. What is raised fails all of them; what
        is returned fails one."""

    def preview(self, track: TrackT) -> npt.NDArray[np.uint8]:
        """Return where a track would end if it went on straight, [H, W, 3] uint8."""

    def pixels(self, track: TrackT) -> npt.NDArray[np.uint8]:
        """The image [H, W, 3] uint8 of a finished track."""

    def drop(self, track: TrackT) -> None:
        """Let go of what an unfinished track holds."""

    def widened(self, widths: Sequence[int]) -> AbstractContextManager[None]:
        """While it lasts, evaluation k has widths[k] rows at the least; copies fill it."""

    def close(self) -> None:
        """Leave the pipeline as it was."""


def step_model(pipeline: Any) -> StepModel[Any]:
    """Return the step model with which the engine drives a pipeline.

    Raises:
        UsageError: a pipeline without a denoiser that could be shared.
    """
    if hasattr(pipeline, "predict_velocity"):
        from modelops.serving.engine.flow import FlowModel

        return FlowModel(pipeline)
    from modelops.serving.engine.diffusers import PipelineModel

    return PipelineModel(pipeline)
