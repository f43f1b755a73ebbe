"""Trial: counts of a canary and the stable release over the same time, for a comparison.

Only requests that chance dealt out count (those that named a release chose it themselves), and both
sides count from the moment at which the canary began to take traffic.

Speed is compared between network evaluations, not between requests: a canary with a tenth of the
traffic waits in shorter queues and makes narrower batches, so its requests would always look fast.
An evaluation takes longer in a wider batch, and while the other engine, which shares the processor,
is busy. So evaluations are compared with others of known order. If the canary's batch was no wider
and no more disturbed, the measured slowness is a lower bound. If it was no narrower and no less
disturbed, the measured speed is a lower bound. If both hold, the ratio is exact. A block of a few
seconds gives one bound of each kind, if possible. Blocks are long compared with an evaluation, so
that their bounds are nearly independent.
"""

from __future__ import annotations

import hmac
import math
import secrets
import statistics
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from modelops.base.errors import UsageError

Arm = Literal["canary", "stable"]
Cells = dict[tuple[int, int], list[float]]  # (width, class of overlap) -> seconds
OUTCOMES = (
    "ok", "prompt_blocked", "image_blocked", "client_error", "rejected", "left", "failed",
)  # fmt: skip
MEASURED = ("ok", "prompt_blocked", "image_blocked", "failed")  # outcomes a verdict counts
_OVERLAPS = (0.1, 0.35, 0.65, 0.9)  # limits of the part of an evaluation that two engines shared
_MAX_CELL = 512  # evaluations of one kind in one block; later ones of it add little
_MAX_BLOCKS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRules:
    """Rules of a canary: its traffic, and how it is judged. All are stated before it takes traffic.

    Attributes:
        share: of the requests that the canary gets, in (0, 1].
        sticky: "request" draws for each request; "key" for each API key, whose requests then all go
            the same way.
        named: whether to deal out requests that name the model, if both releases have that name.
        auto: promote when it is no worse after `requests` and `seconds`, roll back when worse.
        requests: number of the canary's requests before it can be found no worse.
        seconds: of traffic before it can be found no worse.
        alpha: the chance of calling a canary worse that is not, over all measures and looks; and of
            calling one no worse that is worse by a margin or more, over all looks. Not kept with
            `sticky` "key": requests of one key are alike, so a canary is called worse more often.
        error_margin, filter_margin: increase of a rate (absolute) that still counts as no worse.
        latency_margin: ratio of seconds per evaluation that still counts as no worse.
        block_s: seconds of traffic that make one ratio of speeds.
    """

    share: float = 0.1
    sticky: str = "request"
    named: bool = False
    auto: bool = False
    requests: int = 400
    seconds: float = 120.0
    alpha: float = 0.05
    error_margin: float = 0.01
    filter_margin: float = 0.02
    latency_margin: float = 1.1
    block_s: float = 5.0

    def __post_init__(self) -> None:
        limits = {
            "share": (0.0, 1.0), "seconds": (0.0, 1e6), "alpha": (0.0, 0.5),
            "error_margin": (0.0, 1.0), "filter_margin": (0.0, 1.0), "block_s": (0.0, 3600.0),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            if not low < getattr(self, name) <= high:
                raise UsageError(f"{name}: must be above {low:g} and at most {high:g}")
        if not 1.0 < self.latency_margin <= 100.0:
            raise UsageError("latency_margin: must be above 1 and at most 100")
        if not 20 <= self.requests <= 1_000_000:
            raise UsageError("requests: must be 20 to 1000000")
        if self.sticky not in ("request", "key"):
            raise UsageError("sticky: must be request or key")
        if self.auto and self.share == 1.0:
            raise UsageError("share: with auto below 1, so that there is something to compare with")

    def about(self) -> dict[str, Any]:
        """Describe the rules for a status."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialData:
    """Counts of a trial so far.

    Attributes:
        canary, stable: answers by outcome; the same keys as OUTCOMES.
        log_at_least, log_at_most: natural logarithm of canary over stable seconds of an evaluation,
            as bounds from below and from above, by block.
        seconds: since the canary took traffic.
    """

    canary: dict[str, int]
    stable: dict[str, int]
    log_at_least: tuple[float, ...]
    log_at_most: tuple[float, ...]
    seconds: float

    @property
    def requests(self) -> int:
        """Number of the canary's requests that a verdict counts."""
        return sum(self.canary[name] for name in MEASURED)


@dataclass(slots=True)
class _Timeline:
    """Last evaluations of one engine, (start, end), to find their overlap with the other's."""

    spans: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=256))

    def overlap(self, began: float, ended: float, running_since: float | None) -> float:
        """Return the part of [began, ended] in which this engine was busy, in [0, 1]."""
        shared = 0.0 if running_since is None else max(0.0, ended - max(began, running_since))
        for first, last in reversed(self.spans):
            if last <= began:
                break
            shared += max(0.0, min(ended, last) - max(began, first))
        return min(1.0, shared / max(ended - began, 1e-9))


class Trial:
    """Counter of what two releases do. Thread-safe; its memory is bounded."""

    def __init__(self, rules: CanaryRules, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        self._secret = secrets.token_bytes(32)
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._counts: dict[Arm, dict[str, int]] = {
            "canary": dict.fromkeys(OUTCOMES, 0), "stable": dict.fromkeys(OUTCOMES, 0),
        }  # fmt: skip
        self._timelines: dict[Arm, _Timeline] = {"canary": _Timeline(), "stable": _Timeline()}
        self._block = 0
        self._cells: dict[Arm, Cells] = {"canary": {}, "stable": {}}
        self._at_least: deque[float] = deque(maxlen=_MAX_BLOCKS)
        self._at_most: deque[float] = deque(maxlen=_MAX_BLOCKS)

    def deal(self, key: str = "") -> bool:
        """Return whether chance deals a request to the canary.

        Callers cannot aim at a release: nothing that they send decides. The draw of a key holds for
        the trial and is keyed with a secret of it.

        Args:
            key: name of the caller's API key, "" without one.
        """
        if self.rules.sticky == "key" and key:
            drawn = hmac.digest(self._secret, key.encode(), "sha256")
        else:
            drawn = secrets.token_bytes(8)
        return int.from_bytes(drawn[:8]) < self.rules.share * 2**64

    def count(self, arm: Arm, outcome: str) -> None:
        """Count a request that ended."""
        with self._lock:
            self._counts[arm][outcome] += 1

    def step(self, arm: Arm, *, rows: int, seconds: float, other_since: float | None) -> None:
        """Count a network evaluation that ended now.

        Args:
            rows: of its batch.
            other_since: start of the other engine's evaluation in progress; None without one.
        """
        ended = self._clock()
        began = ended - seconds
        other: Arm = "stable" if arm == "canary" else "canary"
        with self._lock:
            self._close_blocks(ended)
            if began < self._began:
                return
            self._timelines[arm].spans.append((began, ended))
            shared = self._timelines[other].overlap(began, ended, other_since)
            kind = _width(rows), bisect_right(_OVERLAPS, shared)
            values = self._cells[arm].setdefault(kind, [])
            if len(values) < _MAX_CELL:
                values.append(seconds)

    def data(self) -> TrialData:
        """Return everything so far; the block that has not ended is left out."""
        now = self._clock()
        with self._lock:
            self._close_blocks(now)
            return TrialData(
                canary=dict(self._counts["canary"]),
                stable=dict(self._counts["stable"]),
                log_at_least=tuple(self._at_least),
                log_at_most=tuple(self._at_most),
                seconds=now - self._began,
            )

    def measured(self) -> int:
        """Return the number of the canary's requests so far that a verdict counts."""
        with self._lock:
            counts = self._counts["canary"]
            return sum(counts[name] for name in MEASURED)

    def seconds(self) -> float:
        """Return the seconds since the canary took traffic."""
        return self._clock() - self._began

    def counts(self) -> dict[Arm, dict[str, int]]:
        """Return the number of answers by outcome so far."""
        with self._lock:
            return {arm: dict(counts) for arm, counts in self._counts.items()}

    def _close_blocks(self, now: float) -> None:
        block = int((now - self._began) / self.rules.block_s)
        if block == self._block:
            return
        canary, stable = self._cells["canary"], self._cells["stable"]
        for bounds, sign in ((self._at_least, 1), (self._at_most, -1)):
            bound = log_bound(canary, stable, sign)
            if bound is not None:
                bounds.append(bound)
        self._cells = {"canary": {}, "stable": {}}
        self._block = block


def _width(rows: int) -> int:
    """Return the width class of a batch: exact up to 4 rows, then in steps of 2, then of 4."""
    step = 1 if rows <= 4 else 2 if rows <= 8 else 4
    return -(-rows // step) * step


def log_bound(canary: Cells, stable: Cells, sign: int) -> float | None:
    """Bound the log ratio of median seconds, canary over stable; None if nothing compares.

    Each kind of the canary's evaluations is compared with the nearest kind of the stable one's that
    was no easier (`sign` 1: a bound from below) or no harder (-1: from above), weighted by the
    smaller of the two counts. A canary so slow that requests pile up in it runs wider batches than
    the stable one ever does. Then a batch is compared with the narrower ones that it could be cut
    into, which take at least as long.
    """
    bound = _bound(canary, stable, sign, cut=False)
    return _bound(canary, stable, sign, cut=True) if bound is None and sign > 0 else bound


def _bound(canary: Cells, stable: Cells, sign: int, *, cut: bool) -> float | None:
    total, weights = 0.0, 0
    for kind, seconds in canary.items():
        able = {}
        for other in stable:
            wider, busier = (sign * (b - a) for a, b in zip(kind, other, strict=True))
            if busier >= 0 and (wider >= 0 or cut):
                pieces = -(-kind[0] // other[0]) if cut else 1
                able[other] = (pieces, wider + busier, other)
        if not able:
            continue
        nearest = min(able, key=lambda other: able[other])
        others, pieces = stable[nearest], able[nearest][0]
        weight = min(len(seconds), len(others))
        ratio = max(statistics.median(seconds), 1e-9) / max(statistics.median(others), 1e-9)
        total += weight * math.log(ratio / pieces)
        weights += weight
    return total / weights if weights else None
