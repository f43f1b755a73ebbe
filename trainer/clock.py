"""Clock of a run: the cost of each kind of work, and the steps that still fit into the limit."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from modelops.training.config import TrainConfig

from .plan import ENOUGH, Rhythm, make_rhythm, seconds_left, steps_in_time

WINDOW = 20  # steps whose mean forecasts the others


class Clock:
    """Clock that counts the seconds of the training itself and forecasts its end.

    Args:
        config: with or without a time limit.
        before: seconds of earlier sessions; they count.
        costs: seconds of each kind of work, as measured or guessed so far.
        now: seconds of a clock that only goes forward.

    Attributes:
        costs: kept up to date during the run.
        reserve: seconds that work outside the plan (checks at their own intervals) may still take.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        before: float = 0.0,
        costs: Mapping[str, float] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.limit = config.training.time_limit_seconds
        self.costs = dict(costs or {})
        self.reserve = 0.0
        self._measured: set[str] = set()
        self._now = now
        self._began = now() - before
        self._step_began = now()
        self._elsewhere = 0.0  # seconds of other work since then
        self._steps: deque[float] = deque(maxlen=WINDOW)

    @property
    def seconds(self) -> float:
        """Seconds so far, those of earlier sessions included."""
        return self._now() - self._began

    @contextlib.contextmanager
    def work(self, kind: str) -> Iterator[None]:
        """Measure one piece of work: validation, grid, checkpoint, early_check or other."""
        began = self._now()
        try:
            yield
        finally:
            seconds = self._now() - began
            self._elsewhere += seconds
            # What came before this session's first measurement was a guess.
            known = self.costs[kind] if kind in self._measured else seconds
            self.costs[kind] = (known + seconds) / 2
            self._measured.add(kind)

    def start_steps(self) -> None:
        """Steps are timed from here on."""
        self._step_began, self._elsewhere = self._now(), 0.0

    def end_step(self) -> float:
        """Count one step; returns its seconds, those of other work left out."""
        now = self._now()
        seconds = now - self._step_began - self._elsewhere
        self._step_began, self._elsewhere = now, 0.0
        self._steps.append(seconds)
        # One stalled step is no forecast of the others; its seconds are spent all the same.
        # The first one sets up, and the guess before it may have been made on few images.
        usual = sorted(self._steps)[:-1] or [min(seconds, self.costs.get("step", seconds))]
        self.costs["step"] = sum(usual) / len(usual)
        return seconds

    def rhythm(self, total: int, early: int) -> Rhythm:
        """Plan the work of a run of `total` steps with the early checkpoint at `early`."""
        return make_rhythm(self.config, total, early_step=early, costs=self.costs, limit=self.limit)

    def total_steps(self, step: int, rhythm: Rhythm | None) -> int:
        """Steps that fill the time limit, seen after `step` steps; those of `rhythm`, the present
        plan, where they nearly do."""
        training, limit = self.config.training, self.limit
        if limit is None:
            return rhythm.total if rhythm else training.total_steps
        left = limit - self.seconds - self.reserve
        if rhythm is not None:
            unused = left - seconds_left(rhythm, step, self.costs)
            if 0 <= unused <= (1 - ENOUGH) * limit:
                return rhythm.total
        return steps_in_time(
            self.config, step, seconds=left, costs=self.costs, limit=limit,
            early=rhythm.early_step if rhythm else 0,
        )  # fmt: skip
