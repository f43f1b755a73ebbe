"""Prometheus metrics of one node, in a registry of its own, with bounded labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from modelops.serving.engine import StepReport

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)


class NodeMetrics:
    """What a node counts. Every label takes values from a fixed set; none comes from a request."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "modelops_http_requests", "Answers by route and status",
            ["route", "status"], registry=registry,
        )  # fmt: skip
        self.errors = Counter(
            "modelops_errors", "Answers other than 200 by OpenAI code", ["code"], registry=registry
        )
        self.latency = Histogram(
            "modelops_phase_seconds",
            "Seconds by phase: prompt_filter, queue, denoise, image_filter, encode, total",
            ["phase"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.images = Counter(
            "modelops_images", "Images sent, by format", ["output_format"], registry=registry
        )
        self.filtered = Counter(
            "modelops_filter_triggers", "Requests stopped by a filter", ["filter"],
            registry=registry,
        )  # fmt: skip
        self.filter_failures = Counter(
            "modelops_filter_failures", "Filters that gave no answer", ["filter"], registry=registry
        )
        self.steps = Counter(
            "modelops_steps", "Denoising steps done, by request", registry=registry
        )
        self.step_seconds = Histogram(
            "modelops_step_seconds", "Seconds of one network evaluation",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_rows = Histogram(
            "modelops_batch_rows",
            "Rows of one network evaluation",
            buckets=_ROWS,
            registry=registry,
        )
        self.wasted = Counter(
            "modelops_wasted_steps", "Steps of requests that ended unfinished",
            ["reason"], registry=registry,
        )  # fmt: skip
        self.queue = Gauge("modelops_queue_depth", "Requests that wait", registry=registry)
        self.running = Gauge(
            "modelops_running_requests", "Requests in the batch", registry=registry
        )
        self.ready = Gauge("modelops_ready", "1 when /readyz is green", registry=registry)
        self.release = Gauge(
            "modelops_release_info", "The release that is served",
            ["name", "version", "sha256"], registry=registry,
        )  # fmt: skip
        for phase in ("prompt_filter", "queue", "denoise", "image_filter", "encode", "total"):
            self.latency.labels(phase)
        for name in ("prompt", "image"):
            self.filtered.labels(name)
            self.filter_failures.labels(name)
        for reason in ("cancelled", "deadline", "failed"):
            self.wasted.labels(reason)

    def on_step(self, report: StepReport) -> None:
        """Count one network evaluation."""
        self.steps.inc(report.requests)
        self.step_seconds.observe(report.seconds)
        self.batch_rows.observe(report.rows)

    def on_wasted(self, steps: int, reason: str) -> None:
        """Count the steps of a request that ended unfinished."""
        self.wasted.labels(reason).inc(steps)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
