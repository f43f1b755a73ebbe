"""Jobs of the engine: a request on its way, and the finished image."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ServingError
from modelops.serving.failures import CancelledError, DeadlineError

if TYPE_CHECKING:
    from modelops.models.request import ImageRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineImage:
    """A finished image.

    Attributes:
        pixels: [H, W, 3] uint8 RGB.
        request: the request with steps, guidance, height and width filled in.
        queue_s, denoise_s: seconds before the first step, and from there to the pixels.
        mean_rows: rows of the forward passes it took part in, on average.
        batch_rows: the same for each of its steps.
        phases: (name, start, end) of queue, text, denoise and decode, by time.monotonic().
    """

    pixels: npt.NDArray[np.uint8]
    request: ImageRequest
    queue_s: float
    denoise_s: float
    mean_rows: float
    batch_rows: tuple[int, ...]
    phases: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Report of one network evaluation: its rows, its requests, waiting requests, its seconds."""

    rows: int
    requests: int
    waiting: int
    seconds: float


Preview = Callable[["Job", int, npt.NDArray[np.uint8]], None]
MAX_PREVIEWS = 3


class Job:
    """A request in the engine. `future` ends with an EngineImage or a ServingError.

    Args:
        request: with every default filled in.
        deadline: by time.monotonic(); unfinished work is dropped then.
        rows: rows that it takes in each forward pass.
        previews: number of previews of the unfinished image, evenly spaced.
        on_preview: called in the engine's thread as (job, index, pixels [H, W, 3] uint8); must
            return at once.
    """

    def __init__(
        self,
        request: ImageRequest,
        deadline: float | None,
        *,
        rows: int = 1,
        previews: int = 0,
        on_preview: Preview | None = None,
    ) -> None:
        self.request = request
        self.rows = rows
        self.on_preview = on_preview
        self.preview_at = preview_steps(request.steps or 0, previews if on_preview else 0)
        self.future: Future[EngineImage] = Future()
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.admitted = self.submitted
        self.started: float | None = None
        self.step = 0  # network evaluations done
        self.batch_rows: list[int] = []  # rows of each of them
        self.overtaken = 0  # later requests that were admitted before this one
        self._cancelled = threading.Event()

    @property
    def remaining(self) -> int:
        """Row-steps still to be done."""
        return self.rows * max(0, (self.request.steps or 0) - self.step)

    @property
    def cancelled(self) -> bool:
        """Return whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop before the next step; does nothing to a finished job."""
        self._cancelled.set()

    def reason_to_stop(self) -> ServingError | None:
        if self._cancelled.is_set():
            return CancelledError("the request was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            return DeadlineError(
                f"not finished in {self.deadline - self.submitted:.0f} s",
                hint="ask for fewer steps or images, or try again when it is quieter",
            )
        return None


def preview_steps(steps: int, previews: int) -> dict[int, int]:
    """Return the steps after which an image is previewed: {step: index of the preview}.

    Evenly spaced, and never after the last one; fewer than `previews` when there are few steps.
    """
    after = {(index + 1) * steps // (previews + 1) for index in range(previews)}
    return {step: index for index, step in enumerate(sorted(after & set(range(1, steps))))}


def job_to_image(job: Job, pixels: npt.NDArray[np.uint8], *, stepped: float) -> EngineImage:
    """Return the result of a job.

    Args:
        job: all of its steps are done.
        pixels: [H, W, 3] uint8 RGB.
        stepped: time of its last step, of `time.monotonic`.
    """
    assert job.started is not None
    ended = time.monotonic()
    return EngineImage(
        pixels=pixels,
        request=job.request,
        queue_s=job.started - job.submitted,
        denoise_s=ended - job.started,
        mean_rows=sum(job.batch_rows) / job.step,
        batch_rows=tuple(job.batch_rows),
        phases=(
            ("queue", job.submitted, job.admitted),
            ("text", job.admitted, job.started),
            ("denoise", job.started, stepped),
            ("decode", stepped, ended),
        ),
    )
