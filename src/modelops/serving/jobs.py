"""A request on its way through the engine, and what comes out of it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.errors import ServingError
from modelops.models.sources import ImageRequest
from modelops.serving.failures import CancelledError, DeadlineError


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
    """One network evaluation: rows in it, requests in it, requests that waited, its seconds."""

    rows: int
    requests: int
    waiting: int
    seconds: float


class Job:
    """A request in the engine. `future` ends with an EngineImage or a ServingError."""

    def __init__(self, request: ImageRequest, deadline: float | None) -> None:
        self.request = request
        self.future: Future[EngineImage] = Future()
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.admitted = self.submitted
        self.started: float | None = None
        self.step = 0  # network evaluations done
        self._cancelled = threading.Event()

    @property
    def rows(self) -> int:
        """Rows of a forward pass this request takes."""
        return 1 if self.request.guidance == 1.0 else 2

    @property
    def remaining(self) -> int:
        """Row-steps still to be done."""
        return self.rows * max(0, (self.request.steps or 0) - self.step)

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
