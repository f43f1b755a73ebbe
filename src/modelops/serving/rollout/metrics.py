"""Metrics of a rollout on one page: the stable release's series, the canary's, and the swaps.

The stable node's series keep their names, so that alerts and dashboards need not know of swapping.
When a canary is promoted the counters continue from the former node's values: they neither fall nor
jump, and requests that the former node finishes while it drains are counted. Gauges are the stable
node's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from modelops.serving.rollout.trial import OUTCOMES
from modelops.serving.telemetry.metrics import FILTERS

EVENTS = (
    "loading", "load_failed", "canary", "promoted", "rolled_back", "rolled_back_worse",
    "rolled_back_red", "drained",
)  # fmt: skip
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_Key = tuple[str, tuple[tuple[str, str], ...]]


class RolloutMetrics:
    """Counters of a rollout beyond its nodes'; they run on from one canary to the next."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "modelops_canary_requests", "Requests that a canary ended, by outcome; those that "
            "failed or were rejected were then answered by the stable release, unless they had "
            "named the canary",
            ["outcome"], registry=registry,
        )  # fmt: skip
        self.triggers = Counter(
            "modelops_canary_filter_triggers", "Requests of a canary stopped by a filter",
            ["filter"], registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "modelops_canary_request_seconds", "Seconds of a canary's requests that made an image",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.share = Gauge(
            "modelops_canary_share", "Share of the requests that the canary is dealt",
            registry=registry,
        )  # fmt: skip
        self.up = Gauge(
            "modelops_canary_up", "1 while a canary takes requests and is well", registry=registry
        )
        self.worse = Gauge(
            "modelops_canary_worse", "1 while the verdict on the canary is worse", registry=registry
        )
        self.events = Counter(
            "modelops_swap_events", "What happened to canaries", ["event"], registry=registry
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for kind in FILTERS:
            self.triggers.labels(kind)
        for event in EVENTS:
            self.events.labels(event)

    def watch(
        self,
        *,
        share: Callable[[], float],
        up: Callable[[], float],
        worse: Callable[[], float],
    ) -> None:
        """Read the gauges whenever they are scraped."""
        self.share.set_function(share)
        self.up.set_function(up)
        self.worse.set_function(worse)

    def on_canary(self, outcome: str, seconds: float) -> None:
        """Count a request of the canary: one of OUTCOMES."""
        self.requests.labels(outcome).inc()
        if outcome == "ok":
            self.seconds.observe(seconds)
        if outcome.endswith("_blocked"):
            self.triggers.labels(outcome.removesuffix("_blocked")).inc()


class RunningTotals:
    """Series of the stable node, with counters that outlive the node. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[_Key, float] | None = None  # None while there has been one node only
        self._families: dict[str, tuple[Metric, dict[_Key, Sample]]] = {}
        self._seen: dict[int, dict[_Key, float]] = {}
        self._former: list[CollectorRegistry] = []

    def take_over(self, old: CollectorRegistry, new: CollectorRegistry) -> None:
        """Make `new` the stable node's registry; `old` still counts until `forget`."""
        with self._lock:
            if self._totals is None:
                self._totals = {}
            self._add(old)
            self._seen[id(new)] = {}
            self._add(new, baseline=True)
            self._former.append(old)

    def forget(self, old: CollectorRegistry) -> None:
        """Stop counting `old`."""
        with self._lock:
            if old in self._former:
                self._add(old)
                self._former.remove(old)
                self._seen.pop(id(old), None)

    def collect(self, stable: CollectorRegistry) -> Iterator[Metric]:
        """Return the families of the stable node's registry."""
        with self._lock:
            if self._totals is None:
                yield from stable.collect()
                return
            for registry in self._former:
                self._add(registry)
            if id(stable) not in self._seen:  # a scrape that a whole drain held up: counted before
                self._add(stable, baseline=True)
            current = {family.name: family for family in self._add(stable)}
            for name, (family, samples) in self._families.items():
                shown = current.pop(name, family)
                shown.samples = [
                    sample._replace(value=self._totals[key]) for key, sample in samples.items()
                ]
                yield shown
            yield from current.values()

    def _add(self, registry: CollectorRegistry, *, baseline: bool = False) -> list[Metric]:
        """Add a node's counts since the last time; return its families."""
        assert self._totals is not None
        seen = self._seen.setdefault(id(registry), {})
        families = list(registry.collect())
        for family in families:
            if not (
                family.name.startswith("modelops_") and family.type in ("counter", "histogram")
            ):
                continue
            _, samples = self._families.setdefault(family.name, (family, {}))
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                samples.setdefault(key, sample)
                more = 0.0 if baseline else max(0.0, sample.value - seen.get(key, 0.0))
                self._totals[key] = self._totals.get(key, 0.0) + more
                seen[key] = sample.value
        return families


def exposition(
    totals: RunningTotals, stable: CollectorRegistry, rollout: CollectorRegistry
) -> bytes:
    """Return all metrics as one page for Prometheus."""

    class Both:
        def collect(self) -> Iterator[Any]:
            yield from totals.collect(stable)
            yield from rollout.collect()

    return generate_latest(cast("CollectorRegistry", Both()))
