"""One line a request, without prompts; a log that cannot be written harms nobody."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from modelops.base.errors import UsageError
from modelops.safety.prompt import WordListFilter
from modelops.serving.deploy.launch import start_server
from modelops.serving.http.app import create_app
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.logs import (
    PROMPTS,
    JsonLines,
    LineWriter,
    PlainLines,
    configure_logging,
    redact,
)
from modelops.serving.telemetry.tracing import RequestTrace, configure_tracing, request_id

SECRET = "a purple walrus on a bicycle"


@contextlib.contextmanager
def logging_to(path: Path, **variables: str) -> Iterator[LineWriter]:
    logger = logging.getLogger("modelops")
    before = logger.handlers[:], logger.level, logger.propagate
    writer = configure_logging(
        NodeSettings.from_environment({"MODELOPS_LOG_FILE": str(path), **variables})
    )
    try:
        yield writer
    finally:
        writer.close()
        logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def node(tiny_release: Path) -> Iterator[InferenceNode]:
    node = InferenceNode(tiny_release)
    node.start()
    assert node.readiness() == []
    yield node
    node.close(drain=False)


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    """What a provider set up by `opentelemetry-instrument` would export."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def ask(node: InferenceNode, headers: dict[str, str] | None = None, **body: Any) -> Any:
    with TestClient(
        create_app(node), client=("127.0.0.1", 1), base_url="http://127.0.0.1"
    ) as client:
        client.headers["host"] = "127.0.0.1"
        return client.post(
            "/v1/images/generations", json={"prompt": SECRET} | body, headers=headers
        )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_one_line_a_request_without_its_prompt(node: InferenceNode, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with logging_to(log):
        answer = ask(node, {"X-Request-Id": "order-66"}, steps=2, n=2, negative_prompt="grey mist")
        assert ask(node, steps=0).status_code == 400
    assert answer.headers["x-request-id"] == "order-66"
    made, refused = (line for line in lines(log) if line["logger"] == "modelops.requests")
    assert made["request_id"] == "order-66" and made["status"] == 200
    assert (made["n"], made["steps"], made["route"]) == (2, 2, "/v1/images/generations")
    assert set(made["phases"]) >= {
        "prompt_filter", "queue", "text", "denoise", "decode", "image_filter", "encode",
    }  # fmt: skip
    assert 0 < made["phases"]["denoise"] < made["duration_s"]
    assert refused["status"] == 400 and refused["code"] == "invalid_value"
    assert len(refused["request_id"]) == 32
    assert SECRET not in log.read_text() and "grey mist" not in log.read_text()


def test_prompts_are_logged_when_asked_for(node: InferenceNode, tmp_path: Path) -> None:
    with logging_to(tmp_path / "log", MODELOPS_LOG_PROMPTS="1"):
        assert ask(node, steps=1).status_code == 200
    (line,) = lines(tmp_path / "log")
    assert line["prompt"] == SECRET


@pytest.mark.parametrize("header", ["a b", "x" * 65, "é", 'a"b', "a\tb", ""])
def test_a_strange_request_id_is_replaced(header: str) -> None:
    assert len(request_id(header)) == 32 and request_id(header) != request_id(header)


def test_an_exception_that_quotes_the_prompt_is_logged_without_it(tmp_path: Path) -> None:
    quoting = 'say "purple"\nwalrus é'
    with logging_to(tmp_path / "log"), PROMPTS.in_hand(quoting, None, "ab"):
        try:
            raise ValueError(f"cannot read {quoting!r}, {json.dumps(quoting)}, {quoting}; ab")
        except ValueError:
            logging.getLogger("modelops.serving").exception("prompt filter failed")
    (line,) = lines(tmp_path / "log")
    assert line["message"] == "prompt filter failed" and "ValueError" in line["exception"]
    assert "purple" not in line["exception"] and "; ab" in line["exception"]
    assert PROMPTS.texts() == []
    assert redact("nothing", []) == "nothing"


def test_a_filter_that_quotes_the_prompt_does_not_publish_it(
    tiny_release: Path, tmp_path: Path
) -> None:
    """Neither /readyz nor the log shows it, though the filter's exception does."""

    class Quotes(WordListFilter):
        def check(self, text: str) -> Any:
            if "walrus" in text:
                raise ValueError(f"bad token in {text!r}")
            return super().check(text)

    node = InferenceNode(tiny_release, prompt_filter=Quotes)
    node.start()
    try:
        with logging_to(tmp_path / "log"):
            assert ask(node).status_code == 503
        assert "bad token in '[prompt]'" in " ".join(node.problems())
        assert "walrus" not in " ".join(node.problems()) + (tmp_path / "log").read_text()
    finally:
        node.close(drain=False)


def test_lines_are_json_whatever_is_in_them(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log"):
        for text in ('a "b"\n{', "\ud800 lone", "\x00\x1b[31m", "line separator \u2028"):
            logging.getLogger("modelops.x").warning(text)
    assert len((tmp_path / "log").read_bytes().splitlines()) == 4
    assert lines(tmp_path / "log")[0]["message"] == 'a "b"\n{'


def test_a_full_disk_loses_lines_and_nothing_else(node: InferenceNode) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    lost: list[int] = []
    with logging_to(Path("/dev/full")) as writer:
        writer.on_lost = lost.append
        assert ask(node, steps=1).status_code == 200
        for _ in range(500):
            if lost:
                break
            time.sleep(0.01)
    assert lost == [1] and writer.lost == 1


def test_after_a_torn_line_the_next_one_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC within a line: its rest is lost, what follows starts on a line of its own."""
    reader, writer_end = os.pipe()
    calls = []

    def write(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return os.write.__wrapped__(descriptor, data[:3])  # type: ignore[attr-defined]
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return os.write.__wrapped__(descriptor, data)  # type: ignore[attr-defined]

    write.__wrapped__ = os.write  # type: ignore[attr-defined]
    monkeypatch.setattr("modelops.serving.telemetry.logs.os.write", write)
    handler = LineWriter(writer_end, own=True)
    for text in ("first", "second"):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 1, text, None, None))
    handler.close()
    monkeypatch.undo()
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"fir\nsecond\n"
    assert handler.lost == 1


def test_a_reader_that_stands_still_blocks_nobody() -> None:
    """A pipe takes 64 KiB and then blocks its writer for ever."""
    reader, writer_end = os.pipe()
    handler = LineWriter(writer_end, own=True, max_waiting=10)
    began = threading.Event()
    done = threading.Event()

    def log_much() -> None:
        began.set()
        for _ in range(2000):
            handler.emit(logging.LogRecord("x", logging.INFO, "", 1, "x" * 200, None, None))
        done.set()

    threading.Thread(target=log_much, daemon=True).start()
    assert done.wait(20)
    assert handler.lost > 1000
    handler.close(timeout_s=0.1)
    os.close(reader)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for variables in (
        {"MODELOPS_LOG_PROMPTS": "maybe"},
        {"MODELOPS_LOG_FORMAT": "xml"},
        {"MODELOPS_LOG_FILE": str(tmp_path / "no" / "such" / "folder")},
    ):
        with pytest.raises(UsageError, match=next(iter(variables))):
            configure_logging(NodeSettings.from_environment(variables))


def test_lines_for_a_terminal() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "made", None, None)
    record.fields = {"request_id": "abc"}
    record.prompts = {"prompt": SECRET}
    assert PlainLines().format(record).endswith(" info made  abc")
    assert SECRET in PlainLines(prompts=True).format(record)
    assert json.loads(JsonLines().format(record))["request_id"] == "abc"


def test_spans_by_phase(node: InferenceNode, spans: InMemorySpanExporter, tmp_path: Path) -> None:
    """The request's span joins the caller's trace; its phases lie inside it, in order."""
    spans.clear()
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with logging_to(tmp_path / "log"):
        assert ask(node, {"traceparent": caller, "X-Request-Id": "r1"}, steps=2).status_code == 200
    finished = {span.name: span for span in spans.get_finished_spans()}
    assert len(finished) == len(spans.get_finished_spans()) == 8  # none of FastAPI's own
    root = finished.pop("POST /v1/images/generations")
    assert f"{root.context.trace_id:032x}" == caller.split("-")[1]
    assert root.parent is not None and f"{root.parent.span_id:016x}" == caller.split("-")[2]
    assert root.attributes is not None and root.attributes["modelops.request_id"] == "r1"
    assert root.attributes["http.response.status_code"] == 200
    order = sorted(finished, key=lambda name: finished[name].start_time or 0)
    assert order == [
        "prompt_filter", "queue", "text", "denoise", "decode", "image_filter", "encode",
    ]  # fmt: skip
    for span in finished.values():
        assert span.parent is not None and span.parent.span_id == root.context.span_id
        times = [root.start_time, span.start_time, span.end_time, root.end_time]
        assert times == sorted(time or 0 for time in times)
    assert SECRET not in "".join(span.to_json() for span in spans.get_finished_spans())
    assert lines(tmp_path / "log")[0]["trace_id"] == caller.split("-")[1]


def test_a_failed_request_is_a_failed_span(spans: InMemorySpanExporter) -> None:
    spans.clear()
    request = RequestTrace("r2", fields={"code": "generation_failed"})
    with (
        contextlib.suppress(ZeroDivisionError),
        request.current("POST x"),
        request.phase("denoise"),
    ):
        raise ZeroDivisionError
    request.finish("POST", "/v1/images/generations", 500)
    child, root = spans.get_finished_spans()
    assert child.name == "denoise" and root.status.status_code is trace.StatusCode.ERROR
    assert root.attributes is not None and "trace_id" not in root.attributes


def test_an_exporter_is_configured_or_named_as_missing() -> None:
    assert configure_tracing({}) is False
    assert configure_tracing({"OTEL_TRACES_EXPORTER": "none"}) is False
    with pytest.raises(UsageError, match="unknown exporter"):
        configure_tracing({"OTEL_TRACES_EXPORTER": "pigeon"})
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="is not installed") as caught:
            configure_tracing({"OTEL_TRACES_EXPORTER": "otlp"})
        assert "pip install" in (caught.value.hint or "")


@pytest.mark.slow
def test_bentoml_writes_lines_and_spans(tiny_release: Path, tmp_path: Path) -> None:
    """In BentoML's worker: its own providers and handlers do not swallow ours."""
    log = tmp_path / "server.log"
    environment = {"OMP_NUM_THREADS": "1", "OTEL_TRACES_EXPORTER": "console"}
    body = json.dumps({"prompt": SECRET, "steps": 1}).encode()
    with start_server(tiny_release, log_path=log, environment=environment) as server:
        request = urllib.request.Request(
            f"{server.url}/v1/images/generations",
            body,
            {"Content-Type": "application/json", "X-Request-Id": "via-bentoml"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["x-request-id"] == "via-bentoml"
    text = log.read_text("utf-8")
    (line,) = (
        json.loads(line) for line in text.splitlines() if '"request_id": "via-bentoml"' in line
        and line.startswith("{")
    )  # fmt: skip
    assert line["status"] == 200 and line["phases"]["denoise"] > 0
    assert '"name": "POST /v1/images/generations"' in text and '"name": "denoise"' in text
    assert f'"trace_id": "0x{line["trace_id"]}"' in text
    assert SECRET not in text


@pytest.mark.slow
def test_bentoml_serves_with_a_full_log_disk(tiny_release: Path, tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "1", "MODELOPS_LOG_FILE": "/dev/full"}
    with start_server(tiny_release, log_path=tmp_path / "log", environment=environment) as server:
        body = json.dumps({"prompt": SECRET, "steps": 1}).encode()
        for _ in range(3):
            request = urllib.request.Request(
                f"{server.url}/v1/images/generations", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.status == 200
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
    (lost,) = (
        float(line.split()[1])
        for line in metrics.splitlines()
        if line.startswith("modelops_log_lines_lost_total ")
    )
    assert lost >= 2
