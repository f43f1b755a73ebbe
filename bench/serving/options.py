"""How much is measured, and goals beside what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serving.figures import FULL, OK, Spread, play, rate
from serving.mix import BLOCK, Wanted, make_mix
from serving.servers import Paths, Server

CLIENTS = 48  # in a closed loop: fewer than the node's queue takes, enough to keep all batches full


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured; seconds and counts."""

    paths: Paths
    prompts: list[str]
    rounds: int = 3
    warm_s: float = 4.0
    window_s: float = 12.0
    steady_s: float = 25.0
    overload_s: float = 12.0
    obey_s: float = 5.0
    singles: int = 2 * BLOCK
    offline_images: int = 8 * BLOCK
    starts: int = 3
    memory_requests: int = 10_000
    mixed_requests: int = 2_000
    max_rows: int = 16
    queue_limit: int = 64
    only_filtered: bool = False

    @property
    def mix(self) -> list[Wanted]:
        return make_mix(self.prompts, 100 * BLOCK)


@dataclass(frozen=True)
class Goal:
    """A goal of the issue beside what was measured."""

    text: str
    bound: float
    found: Spread
    at_most: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        """Met in every round, by the median alone, or not."""
        sign = 1.0 if self.at_most else -1.0
        worst = self.found.high if self.at_most else self.found.low
        if not sign * self.found.value <= sign * self.bound:  # NaN too
            return "NOT MET"
        return "met" if sign * worst <= sign * self.bound else "met, but not in every round"

    def line(self) -> str:
        relation = "<=" if self.at_most else ">="
        goal = f"{relation} {self.bound:g}{self.unit}"
        return f"  {self.text}: {self.found.text()}{self.unit}, goal {goal}: {self.verdict}"


@dataclass
class Result:
    """Figures for --json, and goals."""

    figures: dict[str, Any] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)

    def goal(self, text: str, bound: float, values: Sequence[float], **more: Any) -> None:
        self.goals.append(Goal(text, bound, Spread.of(values), **more))


def saturated(server: Server, options: Options, mix: Sequence[Wanted],
              *, clients: int = CLIENTS) -> dict[str, float]:  # fmt: skip
    """A closed loop."""
    end = options.warm_s + options.window_s
    cpu, before = server.cpu_s(), server.batch_rows()
    played = play({"url": server.generate, "bodies": [server.body(w) for w in mix],
                   "closed": {"concurrency": clients, "seconds": end}})  # fmt: skip
    done = rate(played, mix, options.warm_s, end)
    failures = sum(record.status not in (OK, FULL) for record in played.loads)
    cores = (server.cpu_s() - cpu) / played.elapsed_s
    rows, batches = (b - a for a, b in zip(before, server.batch_rows(), strict=True))
    return {**asdict(done), "cores": cores, "load_cores": played.cores, "failures": failures,
            "mean_rows": rows / batches if batches else float("nan")}  # fmt: skip
