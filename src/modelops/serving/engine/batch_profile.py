"""Speed of an engine: which batch widths pay, and how long a backlog will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

PAYS = 1.1  # the best width must do this many times the rows per second of one row
KNEE = 0.9  # the narrow cap is the smallest width with this share of the best rate
BEST = 0.99  # the wide cap is the smallest width with this share of it
PATIENCE = 6  # times the budget that all of it may take, with compiling, which is not timed
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProfile:
    """Seconds of one network evaluation by its rows, and what follows from them.

    Attributes:
        seconds: of the fastest run, by rows (other load on the machine only adds to them); empty
            when nothing was measured.
        pays: whether rows in a batch are done faster than one by one. If not, one request runs at
            a time (its two rows, if it is guided, together).
        narrow: rows in a batch while few requests wait: near-peak throughput at lower latency.
        wide: rows in a batch once enough requests wait to fill it.
        complete: whether every width was measured. If the time for it was over, wider batches
            than the measured ones are assumed to be as good as the best of those.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    pays: bool = True
    narrow: int
    wide: int
    complete: bool = True

    def rows_per_second(self, rows: int) -> float:
        """Measured rate at the widest measured width of at most `rows`; 0 when unknown."""
        known = [width for width in self.seconds if width <= rows]
        return max(known) / self.seconds[max(known)] if known else 0.0


def widths(max_rows: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to max_rows, and max_rows: the shapes runtimes compile."""
    width = 1
    while width < max_rows:
        yield width
        if width >= 2 and width * 3 // 2 < max_rows:
            yield width * 3 // 2
        width *= 2
    yield max_rows


def measure_profile(
    evaluate: Callable[[int], object], max_rows: int, *, budget_s: float
) -> BatchProfile:
    """Time network evaluations of growing width.

    Args:
        evaluate: runs the network on that many rows. The first run of each width is not counted:
            runtimes compile and warm up in it.
        max_rows: the widest batch.
        budget_s: seconds of timed runs after which no width above 2 is begun; `PATIENCE` times
            this bounds the whole time.
    """
    began, timed = time.monotonic(), 0.0
    seconds: dict[int, float] = {}
    wanted = list(widths(max_rows))
    for width in wanted:
        late = time.monotonic() - began > PATIENCE * budget_s
        if width > 2 and (late or timed > budget_s):
            break
        evaluate(width)
        seconds[width] = math.inf
        timed += _best_of(evaluate, width, seconds, budget_s - timed)
    for width in seconds if timed < budget_s else ():  # once more, as a disturbance may have passed
        timed += _best_of(evaluate, width, seconds, budget_s - timed)
    return profile_from_seconds(seconds, widest=max_rows)


def _best_of(
    evaluate: Callable[[int], object], width: int, seconds: dict[int, float], budget_s: float
) -> float:
    """Time some runs, at least one, into `seconds`; return the seconds that it took."""
    timed = 0.0
    for _ in range(_REPEATS):
        start = time.perf_counter()
        evaluate(width)
        taken = time.perf_counter() - start
        timed += taken
        seconds[width] = min(taken, seconds[width])
        if timed > budget_s:
            break
    return timed


def profile_from_seconds(seconds: dict[int, float], *, widest: int) -> BatchProfile:
    """Derive the batch caps from measured seconds by rows (at least one width).

    Args:
        widest: rows of the widest batch that may run; beyond the measured widths it is assumed, not
            known, that it is as fast as the best of them.
    """
    rates = {width: width / max(taken, 1e-9) for width, taken in seconds.items()}
    best = max(rates.values())
    complete = max(rates) >= widest
    pays = best >= PAYS * rates[min(rates)] or (not complete and max(rates) < widest // 2)

    def cap(share: float) -> int:
        return max(2, min(width for width, rate in rates.items() if rate >= share * best))

    wide = cap(BEST) if complete or cap(BEST) < max(rates) else widest
    return BatchProfile(
        seconds=seconds,
        pays=pays,
        narrow=cap(KNEE) if pays else 2,
        wide=wide if pays else 2,
        complete=complete,
    )


class RowRate:
    """Speed of a busy engine in row-steps per second, with the time between two steps.

    Only steps that follow another at once count: an idle engine has no speed.

    Args:
        half_life_s: seconds of work after which half of a change in speed is known.
    """

    def __init__(self, half_life_s: float = 2.0) -> None:
        self._half_life_s = half_life_s
        self._rate = 0.0
        self._known_s = 0.0

    def expect(self, rate: float) -> None:
        """Take the rate that a profile promises, until something was measured."""
        if not self._known_s:
            self._rate = rate

    def add(self, rows: int, seconds: float) -> None:
        """Add a step of `rows` that took `seconds`, counted from the end of the step before."""
        if seconds <= 0:
            return
        keep = 0.5 ** (seconds / self._half_life_s) if self._known_s else 0.0
        self._rate = keep * self._rate + (1 - keep) * rows / seconds
        self._known_s += seconds

    def seconds_for(self, row_steps: int) -> float:
        """Return the seconds that `row_steps` will take; 0 when the speed is not known."""
        return row_steps / self._rate if self._rate else 0.0
