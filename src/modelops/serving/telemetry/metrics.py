"""Prometheus metrics of one node, in a registry of its own, with bounded labels."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from modelops.releases.verify import evaluation_end, released_evaluations

if TYPE_CHECKING:
    from modelops.records.release import ReleaseRecord
    from modelops.serving.engine.jobs import StepReport

log = logging.getLogger("modelops.serving")

disable_created_metrics()  # a second series beside each counter, which nothing here reads

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"  # label of all values outside a label's fixed set
PHASES = (
    "prompt_filter", "queue", "text", "denoise", "decode", "image_filter", "encode", "total",
)  # fmt: skip
FILTERS = ("prompt", "image")
WASTE_REASONS = ("cancelled", "deadline", "failed")
REJECTIONS = ("queue_full", "rate_limit")
CLOSED_REASONS = ("head", "read", "full")
STREAM_OUTCOMES = ("completed", "blocked", "failed", "client_left", "slow_reader")
# Codes that say that the node failed; what the client did wrong, a red filter, a full queue and a
# start that is not over yet have metrics of their own.
FAULT_CODES = (
    "api_keys_unavailable", "deadline_exceeded", "engine_unavailable", "generation_failed",
    "internal_error", "provenance_unavailable", "receipt_unavailable",
)  # fmt: skip
CODES = frozenset(FAULT_CODES) | {
    "admin_key_required", "ambiguous_length", "api_keys_not_configured", "body_timeout",
    "body_too_large", "canary_worse", "cancelled", "content_policy_violation",
    "cross_origin_request", "invalid_api_key", "invalid_json", "invalid_value",
    "method_not_allowed", "misdirected_request", "missing_required_parameter", "model_not_found",
    "not_found", "not_ready", "prompt_too_long", "rate_limit_exceeded",
    "safety_filter_unavailable", "swap_conflict", "swap_failed", "swap_off", "unknown_parameter",
    "unsupported_media_type", "unsupported_value",
}  # fmt: skip
FORMATS = ("png", "webp", "jpeg")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)


class NodeMetrics:
    """Metrics of a node. Every label takes values from a fixed set; none comes from a request.

    Args:
        filter_names: {"prompt": name, "image": name}, the filters by the names of their kind
            (`words`, `open_nsfw`), without what they open.
    """

    def __init__(self, filter_names: Mapping[str, str] | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        self._names = {kind: (filter_names or {}).get(kind, OTHER) for kind in FILTERS}

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"modelops_{name}", help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(f"modelops_{name}", help_text, labels, registry=registry)

        def histogram(
            name: str, help_text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
        ) -> Histogram:
            return Histogram(
                f"modelops_{name}", help_text, labels, buckets=buckets, registry=registry
            )

        self.requests = counter("http_requests", "Answers by route and status", "route", "status")
        self.errors = counter("errors", "Answers other than 200 by OpenAI code", "code")
        self.rejected = counter("rejected", "Requests answered 429, by reason", "reason")
        self.latency = histogram(
            "phase_seconds",
            "Seconds by phase; total is from the request's body to its answer",
            "phase",
        )
        self.images = counter("images", "Images sent, by format", "output_format")
        self.partial_images = counter("partial_images", "Unfinished images sent in streams")
        self.streams = counter("streams", "Streams that ended, by outcome", "outcome")
        self.filter_checks = counter("filter_checks", "Texts and images judged", "filter", "name")
        self.filtered = counter("filter_triggers", "Requests stopped by a filter", "filter", "name")
        self.filter_failures = counter(
            "filter_failures", "Filters that gave no answer", "filter", "name"
        )
        self.filter_up = gauge(
            "filter_up", "1 while the filter passes its own checks", "filter", "name"
        )
        self.steps = counter("steps", "Denoising steps done, by request")
        self.step_seconds = histogram("step_seconds", "Seconds of one network evaluation")
        self.batch_rows = histogram("batch_rows", "Rows of one network evaluation", buckets=_ROWS)
        self.wasted = counter(
            "wasted_steps", "Steps of requests that ended unfinished, by reason", "reason"
        )
        self.queue = gauge("queue_depth", "Requests that wait")
        self.queue_limit = gauge("queue_limit", "Requests that may wait")
        self.queue_age = gauge("queue_oldest_seconds", "Age of the request that waits longest")
        self.running = gauge("running_requests", "Requests in the batch")
        self.ready = gauge("ready", "1 when /readyz is green")
        self.engine_alive = gauge("engine_alive", "1 while the engine's thread gets on")
        self.golden_ok = gauge("golden_image_ok", "1 when the golden image was the released one")
        self.release = gauge(
            "release_info", "The release that is served",
            "name", "version", "sha256", "model_sha256", "runtime",
        )  # fmt: skip
        self.cadence = gauge(
            "evaluation_cadence_seconds", "The released model is to be evaluated this often"
        )
        self.connections_closed = counter(
            "connections_closed", "Connections that broke a limit, by part", "reason"
        )
        self.log_lost = counter("log_lines_lost", "Log lines that could not be written")
        self._make_series()
        ProcessCollector(registry=registry)
        registry.register(GpuMemory())

    def _make_series(self) -> None:
        """Start series at 0, so that their first increase shows."""
        for phase in PHASES:
            self.latency.labels(phase)
        for kind, name in self._names.items():
            for metric in (self.filter_checks, self.filtered, self.filter_failures, self.filter_up):
                metric.labels(kind, name)
        for reason in WASTE_REASONS:
            self.wasted.labels(reason)
        for reason in REJECTIONS:
            self.rejected.labels(reason)
        for code in CODES:
            self.errors.labels(code)
        for output_format in FORMATS:
            self.images.labels(output_format)
        for reason in CLOSED_REASONS:
            self.connections_closed.labels(reason)
        for outcome in STREAM_OUTCOMES:
            self.streams.labels(outcome)
        self.requests.labels("/v1/images/generations", "200")

    def serves(self, release: ReleaseRecord, sha256: str, model_sha256: str, runtime: str) -> None:
        """Set the digests of the release and the model that are served."""
        self.release.labels(
            release.name, release.version, sha256[:16], model_sha256[:16], runtime
        ).set(1)

    def evaluated(self, timestamp: float | None, *, every_days: float) -> None:
        """Set the time of the model's last evaluation; without one there is no such series."""
        self.cadence.set(every_days * 86400)
        if timestamp is not None:
            Gauge(
                "modelops_evaluation_timestamp_seconds",
                "When the evaluation of the released model ended, in Unix seconds",
                registry=self.registry,
            ).set(timestamp)

    def watch(self, node: Any) -> None:
        """Read the gauges from an InferenceNode whenever they are scraped."""
        self.queue_limit.set(node.settings.queue_limit)
        sources: dict[Gauge, Callable[[], float]] = {
            self.queue: lambda: node.engine.waiting,
            self.queue_age: lambda: float(node.engine.oldest_wait()),
            self.running: lambda: node.engine.running,
            self.ready: lambda: not node.problems(),
            self.engine_alive: lambda: float(node.alive()),
            self.golden_ok: lambda: node.golden_ok,
            self._filter(self.filter_up, "prompt"): lambda: node.prompt_guard.reason is None,
            self._filter(self.filter_up, "image"): lambda: node.image_guard.reason is None,
        }
        for gauge, read in sources.items():
            gauge.set_function(_as_number(read))

    def _filter(self, metric: Any, kind: str) -> Any:
        return metric.labels(kind, self._names[kind])

    def on_filter(self, kind: str, checked: int, *, blocked: bool) -> None:
        """Count a filter's answers, and the request if the filter stopped it."""
        self._filter(self.filter_checks, kind).inc(checked)
        if blocked:
            self._filter(self.filtered, kind).inc()

    def on_filter_failure(self, kind: str) -> None:
        """Count a filter that gave no answer."""
        self._filter(self.filter_failures, kind).inc()

    def on_request(self, route: str, status: int) -> None:
        """Count an answer; `route` is one of a fixed set."""
        self.requests.labels(route, str(status)).inc()

    def on_error(self, code: str) -> None:
        """Count an answer that is an error."""
        self.errors.labels(code if code in CODES else OTHER).inc()

    def on_rejected(self, reason: str) -> None:
        """Count a 429: `queue_full` or `rate_limit`."""
        self.rejected.labels(reason if reason in REJECTIONS else OTHER).inc()

    def on_phase(self, phase: str, seconds: float) -> None:
        """Count the seconds that a phase of a request took."""
        self.latency.labels(phase if phase in PHASES else OTHER).observe(seconds)

    def on_images(self, output_format: str, count: int) -> None:
        """Count images that were sent."""
        self.images.labels(output_format if output_format in FORMATS else OTHER).inc(count)

    def on_closed(self, reason: str) -> None:
        """Count a connection that was closed for what its client did: one of CLOSED_REASONS."""
        self.connections_closed.labels(reason if reason in CLOSED_REASONS else OTHER).inc()

    def on_stream(self, outcome: str) -> None:
        """Count a stream that ended: one of STREAM_OUTCOMES."""
        self.streams.labels(outcome if outcome in STREAM_OUTCOMES else OTHER).inc()

    def on_step(self, report: StepReport) -> None:
        """Count one network evaluation."""
        self.steps.inc(report.requests)
        self.step_seconds.observe(report.seconds)
        self.batch_rows.observe(report.rows)

    def on_wasted(self, steps: int, reason: str) -> None:
        """Count the steps of a request that ended unfinished."""
        self.wasted.labels(reason if reason in WASTE_REASONS else OTHER).inc(steps)

    def text(self) -> bytes:
        """Return the exposition."""
        return generate_latest(self.registry)


class GpuMemory:
    """Collector of `modelops_gpu_memory_bytes` for the CUDA devices on which torch holds memory.

    A machine without CUDA has no such series. Memory of other runtimes than torch shows only in
    `used` (of the whole device). Not yet run on a GPU.
    """

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return nothing, so that nothing is read when the collector is registered."""
        yield self._family()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Bytes by device and kind: allocated and reserved by torch, used and total of the device.

        torch is asked only where something else has imported and used it.
        """
        torch = sys.modules.get("torch")
        family = self._family()
        if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
            return
        for index in range(torch.cuda.device_count()):
            reserved = torch.cuda.memory_reserved(index)
            if not reserved:
                continue  # asking a device for its free memory makes a context on it
            free, total = torch.cuda.mem_get_info(index)
            values = {
                "allocated": torch.cuda.memory_allocated(index),
                "reserved": reserved,
                "used": total - free,
                "total": total,
            }
            for kind, value in values.items():
                family.add_metric([str(index), kind], float(value))
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "modelops_gpu_memory_bytes", "GPU memory", labels=["device", "kind"]
        )


def evaluation_time(release_dir: str | Path, record: ReleaseRecord) -> float | None:
    """Return the end of the newest evaluation of the released model, in Unix seconds.

    Only evaluations that lie in the release, succeeded and are of the very model that it holds
    count; None without one.
    """
    found = released_evaluations(release_dir, record).values()
    return max(map(evaluation_end, found), default=None)


def _as_number(read: Callable[[], Any]) -> Callable[[], float]:
    """Wrap a gauge's source so that it never fails the whole scrape: NaN if it cannot be read."""
    last = 0.0

    def value() -> float:
        nonlocal last
        try:
            return float(read())
        except Exception:
            if time.monotonic() - last > 60.0:
                last = time.monotonic()
                log.exception("a gauge could not be read")
            return float("nan")

    return value
