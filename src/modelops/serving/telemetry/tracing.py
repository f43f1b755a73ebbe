"""Phases of a request, as an access log line and OpenTelemetry spans. No prompt reaches a span.

Spans are made where opentelemetry is installed and something exports them: a program started by
`opentelemetry-instrument`, or OTEL_TRACES_EXPORTER (`otlp` or `console`) and `configure_tracing`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelops.base.errors import UsageError

try:
    from opentelemetry import context as otel_context
    from opentelemetry import propagate, trace
except ImportError:  # BentoML brings it; the framework-free parts do without
    otel_context = propagate = trace = None  # type: ignore[assignment]

log = logging.getLogger("modelops.requests")

SCOPE_KEY = "modelops.trace"  # where the ASGI middleware keeps a request's trace
EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
_SDK = "opentelemetry.sdk.trace"
_OTLP = "opentelemetry.exporter.otlp.proto.http.trace_exporter"  # a package of its own
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def request_id(header: str | None) -> str:
    """Return the caller's own id if it is a plain one, else a new one."""
    return header if header and _ID.fullmatch(header) else uuid.uuid4().hex


@dataclass(slots=True)
class RequestTrace:
    """Trace of one HTTP request.

    Attributes:
        id: in the log, in the span and in the answer's X-Request-Id.
        fields: other fields of the log line: n, steps, guidance, error code.
        prompts: {"prompt": text, ...}; logged only when asked for, never put into a span.
        phases: (name, start, end) in seconds of time.monotonic().
        answer_headers: headers that the answer gets, in ASCII.
    """

    id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    fields: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    answer_headers: dict[str, str] = field(default_factory=dict)
    span: Any = None
    _offset_s: float = field(default_factory=lambda: time.time() - time.monotonic())

    @contextlib.contextmanager
    def current(self, name: str) -> Iterator[None]:
        """Begin the request's span; spans that other libraries make inside become its children.

        Its parent is the caller's span, not the current one: BentoML's own are not sampled.
        """
        token = None
        if trace is not None:
            with contextlib.suppress(Exception):  # a strange header is not the client's failure
                parent = propagate.extract(dict(self.headers), context=otel_context.Context())
                self.span = trace.get_tracer("modelops.serving").start_span(
                    name,
                    context=parent,
                    kind=trace.SpanKind.SERVER,
                    start_time=self._wall(self.began),
                )
                token = otel_context.attach(trace.set_span_in_context(self.span, parent))
        try:
            yield
        finally:
            if token is not None:
                otel_context.detach(token)

    def add(self, phase: str, began: float, ended: float) -> float:
        """Note a phase; returns its seconds."""
        self.phases.append((phase, began, ended))
        return ended - began

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note what runs inside as a phase, also when it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, began, time.monotonic())

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase; of several images in one request the longest."""
        longest: dict[str, float] = {}
        for name, began, ended in self.phases:
            longest[name] = max(longest.get(name, 0.0), round(ended - began, 4))
        return longest

    def finish(self, method: str, route: str, status: int) -> None:
        """Write the log line and the spans. Raises nothing."""
        ended = time.monotonic()
        trace_id = None
        with contextlib.suppress(Exception):  # an exporter's trouble is not the client's
            trace_id = self._end_spans(method, route, status, ended)
        seconds = ended - self.began
        fields: dict[str, Any] = {
            "request_id": self.id,
            **({"trace_id": trace_id} if trace_id else {}),
            "method": method,
            "route": route,
            "status": status,
            "duration_s": round(seconds, 4),
            **self.fields,
        }
        if self.phases:
            fields["phases"] = self.seconds()
        log.info(
            "%s %s %s %.3f s",
            method, route, status, seconds,
            extra={"fields": fields, "prompts": self.prompts},
        )  # fmt: skip

    def _end_spans(self, method: str, route: str, status: int, ended: float) -> str | None:
        """End the request's span with a child for each phase.

        Returns:
            The trace's id, or None if nothing records.
        """
        span = self.span
        if span is None or not span.is_recording():
            return None
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "modelops.request_id": self.id,
                **{
                    f"modelops.{name}": value
                    for name, value in self.fields.items()
                    if isinstance(value, (bool, int, float, str))
                },
            }
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR, str(self.fields.get("code", "")))
        inside = trace.set_span_in_context(span, otel_context.Context())
        tracer = trace.get_tracer("modelops.serving")
        for name, began, phase_ended in self.phases:
            child = tracer.start_span(name, context=inside, start_time=self._wall(began))
            child.end(end_time=self._wall(phase_ended))
        span.end(end_time=self._wall(ended))
        return f"{span.get_span_context().trace_id:032x}"

    def _wall(self, moment: float) -> int:
        """Convert a time.monotonic() to Unix nanoseconds; one offset for all spans of a request."""
        return int((moment + self._offset_s) * 1e9)


def check_tracing(environment: Mapping[str, str]) -> str:
    """Return the exporter in OTEL_TRACES_EXPORTER: "otlp", "console" or "none".

    Raises:
        UsageError: the exporter is unknown or not installed.
    """
    wanted = environment.get(EXPORTER_VARIABLE, "none").strip().lower() or "none"
    if wanted not in ("otlp", "console", "none"):
        raise UsageError(
            f"{EXPORTER_VARIABLE}={wanted}: unknown exporter", hint="otlp, console or none"
        )
    for module in {"otlp": (_SDK, _OTLP), "console": (_SDK,), "none": ()}[wanted]:
        try:
            found = importlib.util.find_spec(module)
        except ImportError:  # a package above it is missing
            found = None
        if found is None:
            raise _not_installed(wanted, module)
    return wanted


def _not_installed(wanted: str, module: str) -> UsageError:
    return UsageError(
        f"{EXPORTER_VARIABLE}={wanted}: {module} is not installed",
        hint="pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
    )


def configure_tracing(environment: Mapping[str, str]) -> bool:
    """Export spans as OTEL_TRACES_EXPORTER says; return False if it asks for none.

    An existing tracer provider (from `opentelemetry-instrument`) is left as it is.

    Raises:
        UsageError: the exporter is unknown or not installed.
    """
    wanted = check_tracing(environment)
    if wanted == "none":
        return False
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

        exporter: Any
        if wanted == "console":
            import sys

            exporter = ConsoleSpanExporter(out=sys.stderr)
        else:
            exporter = importlib.import_module(_OTLP).OTLPSpanExporter()
    except ImportError as error:
        raise _not_installed(wanted, error.name or str(error)) from error
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return True
    name = environment.get("OTEL_SERVICE_NAME", "modelops")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return True


def flush_tracing(timeout_s: float = 5.0) -> None:
    """Export the queued spans, which the end of a worker would lose. Raises nothing."""
    if trace is not None:
        with contextlib.suppress(Exception):
            trace.get_tracer_provider().force_flush(int(1000 * timeout_s))  # type: ignore[attr-defined]
