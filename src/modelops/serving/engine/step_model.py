"""Interface of the engine to a model: unfinished images, one network evaluation at a time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from modelops.models.pipelines.traits import Traits
from modelops.models.request import ImageRequest
from modelops.serving.engine.jobs import Job


class Track(Protocol):
    """Unfinished image.

    Attributes:
        job: the job that it belongs to.
    """

    job: Job

    @property
    def group(self) -> Hashable:
        """Tracks of one group can share a network evaluation."""

    @property
    def rows(self) -> int:
        """Rows that the next network evaluation takes."""

    @property
    def finished(self) -> bool:
        """Return whether no evaluation is left to do."""


TrackT = TypeVar("TrackT", bound=Track)


class StepModel(Protocol[TrackT]):
    """Pipeline divided at its network evaluations. Only the engine's thread uses it, except for
    `usable_prompts`, `fill`, `rows_of` and `count_tokens`.

    Attributes:
        height, width: default size of an image, in pixels.
        max_tokens: longest prompt that is read to its end, in tokens.
        previews: whether `preview` can be called.
    """

    height: int
    width: int
    max_tokens: int
    previews: bool

    def usable_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts, or as many others that the pipeline takes."""

    def fill(self, request: ImageRequest) -> ImageRequest:
        """Return the request with the pipeline's defaults in place of None.

        Raises:
            UsageError: something that the model cannot do.
        """

    def rows_of(self, request: ImageRequest) -> int:
        """Return the expected rows of each network evaluation of a filled request."""

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text before truncation, special tokens included."""

    def prepare(self, max_rows: int) -> None:
        """Do the work that can be done before the first request."""

    def evaluate(self, rows: int) -> None:
        """Run one evaluation of this many rows, only to time it; after `prepare`."""

    def begin(self, jobs: Sequence[Job]) -> list[TrackT | Exception]:
        """Start a track for each job; return it, or its error. An exception fails all of them."""

    def advance(self, tracks: Sequence[TrackT]) -> list[Exception | None]:
        """Run one network evaluation for tracks of one group. A raised exception fails all of
        them, a returned one fails its own track."""

    def preview(self, track: TrackT) -> npt.NDArray[np.uint8]:
        """Return where a track would end if it went on straight, [H, W, 3] uint8."""

    def pixels(self, track: TrackT) -> npt.NDArray[np.uint8]:
        """Return the image [H, W, 3] uint8 of a finished track."""

    def drop(self, track: TrackT) -> None:
        """Free what an unfinished track holds."""

    def widened(self, widths: Sequence[int]) -> AbstractContextManager[None]:
        """Within the block, give evaluation k at least widths[k] rows; copies fill it."""

    def close(self) -> None:
        """Leave the pipeline as it was."""


def step_model(pipeline: Any, traits: Traits | None = None) -> StepModel[Any]:
    """Return the step model with which the engine drives a pipeline.

    Args:
        pipeline: with its networks in torch or in another runtime.
        traits: of the pipeline; measured if they are needed and not given.

    Raises:
        UsageError: a pipeline without a denoiser that could be shared.
    """
    if hasattr(pipeline, "predict_velocity"):
        from modelops.serving.engine.flow import FlowModel

        return FlowModel(pipeline)
    from modelops.serving.engine.diffusers import PipelineModel

    return PipelineModel(pipeline, traits)
