"""Records of the load generator to figures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serving.mix import Wanted

BENCH = Path(__file__).resolve().parents[1]
OK, FULL = 200, 429


class Record(NamedTuple):
    """One try of one request; see load.py."""

    kind: str
    number: int
    attempt: int
    due: float
    sent: float
    done: float
    status: int
    retry_after_s: float | None
    bytes: int

    @property
    def latency(self) -> float:
        return self.done - self.due


@dataclass(frozen=True)
class Played:
    """What came back of a plan."""

    began: float
    elapsed_s: float
    cores: float
    records: list[Record]
    loads: list[Record] = field(default_factory=list)

    @property
    def statuses(self) -> dict[str, int]:
        return {str(key): n for key, n in sorted(Counter(r.status for r in self.loads).items())}

    def lateness(self) -> float:
        """Seconds that the generator itself was late, 99th percentile."""
        return quantile([record.sent - record.due for record in self.loads], 0.99)


def play(plan: dict[str, Any], while_running: Callable[[], None] | None = None) -> Played:
    """Run the load generator in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "plan.json", Path(folder) / "result.json"
        given.write_text(json.dumps(plan))
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.load", str(given), str(result)], cwd=BENCH
        )
        try:
            while process.poll() is None:
                if while_running:
                    while_running()
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
        if process.returncode:
            raise SystemExit(f"the load generator ended with {process.returncode}")
        raw = json.loads(result.read_text())
    records = [Record(*entry) for entry in raw["records"]]
    loads = [record for record in records if record.kind == "load"]
    return Played(raw["began"], raw["elapsed_s"], raw["cores"], records, loads)


@dataclass(frozen=True)
class Rate:
    """Work done in a window."""

    images_per_s: float
    row_steps_per_s: float
    images: int


def rate(played: Played, mix: Sequence[Wanted], since: float, until: float) -> Rate:
    """Answers between the last one before `since` and the last one before `until`.

    Both ends are answers: a server that answers in batches is not cut within one.
    """
    done = sorted((r for r in played.loads if r.status == OK), key=lambda record: record.done)
    before = [record for record in done if record.done <= since]
    inside = [record for record in done if since < record.done <= until]
    if not inside:
        return Rate(0.0, 0.0, 0)
    start = before[-1].done if before else 0.0  # a slow server: from the load's own start
    seconds = inside[-1].done - start
    work = sum(mix[record.number % len(mix)].row_steps for record in inside)
    return Rate(len(inside) / seconds, work / seconds, len(inside))


def quantile(values: Sequence[float], level: float) -> float:
    """NaN of nothing."""
    return float(np.quantile(values, level)) if len(values) else float("nan")


@dataclass(frozen=True)
class Spread:
    """Median over rounds, with the lowest and the highest."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(float(np.median(values)), min(values), max(values))

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        numbers = (f"{scale * v:.{digits}f}" for v in (self.value, self.low, self.high))
        return "{} ({} to {})".format(*numbers)


def drain_times(played: Played) -> list[tuple[float, float]]:
    """(what a 429 said, seconds until all that had been let in before it was answered).

    A refused request would have had its place behind these: when they are done, it is its turn.
    """
    accepted = sorted((r for r in played.records if r.status == OK), key=lambda record: record.sent)
    sent = [record.sent for record in accepted]
    last_done = np.maximum.accumulate([record.done for record in accepted])
    pairs = []
    for record in played.loads:
        ahead = int(np.searchsorted(sent, record.sent))
        if record.status == FULL and record.retry_after_s and ahead:
            pairs.append((record.retry_after_s, float(last_done[ahead - 1]) - record.done))
    return pairs


def knock_times(played: Played) -> list[tuple[float, float]]:
    """(what a probe's first 429 said, seconds until a probe that kept knocking was let in)."""
    pairs: list[tuple[float, float]] = []
    first: dict[str, Record] = {}
    for record in sorted(played.records, key=lambda record: record.sent):
        if not record.kind.startswith("probe"):
            continue
        if record.status == FULL:
            first.setdefault(record.kind, record)
        elif record.status == OK and (refused := first.pop(record.kind, None)):
            pairs.append((refused.retry_after_s or 0.0, record.sent - refused.done))
    return pairs


def within_factor_2(pairs: Sequence[tuple[float, float]]) -> float:
    """Share of pairs (said, was) with said / 2 <= was <= 2 said."""
    return float(np.mean([s / 2 <= w <= 2 * s for s, w in pairs])) if pairs else float("nan")


def phases_by_request(log: Path, since: int = 0) -> dict[str, dict[str, float]]:
    """Phases in seconds by X-Request-Id, from the node's JSON log after its first `since` bytes."""
    found = {}
    for line in log.read_bytes()[since:].decode("utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("status") == OK and "phases" in entry:
            found[entry["request_id"]] = entry["phases"]
    return found
