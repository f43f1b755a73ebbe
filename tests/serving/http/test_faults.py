"""What clients can do to a node: bytes that are no requests, hang-ups, standing still, crowds.

The node is real and so is uvicorn, with the connection limits that service.py sets.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from modelops.serving.http import answers, streaming
from modelops.serving.http.app import create_app
from modelops.serving.http.connections import LIMITS, BoundedProtocol, limit_connections
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings

PATH = "/v1/images/generations"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: 127.1\r\nContent-Type: application/json\r\n".encode()


class Live:
    """A node behind uvicorn, asked with raw bytes."""

    def __init__(self, node: InferenceNode, port: int) -> None:
        self.node = node
        self.port = port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of the first answer to these bytes; (0, {}, b"") for none."""
        with self.connect() as caller:
            with contextlib.suppress(OSError):  # it may answer and close before it has all
                caller.sendall(data)
            return read_answer(caller)

    def post(self, body: bytes, *headers: str) -> tuple[int, Any]:
        extra = "".join(f"{line}\r\n" for line in headers).encode()
        status, _, answer = self.raw(
            HEAD + extra + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        return status, json.loads(answer)

    def works(self) -> bool:
        status, answer = self.post(b'{"prompt": "sun", "steps": 1, "guidance": 1}')
        return status == 200 and len(answer["data"]) == 1

    def metric(self, name: str) -> float:
        for line in self.node.metrics.text().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def idle(self) -> bool:
        return not self.node.engine.running and not self.node.engine.waiting

    def failures(self) -> float:
        """Answers that say that the node failed."""
        return sum(
            float(line.split()[-1])
            for line in self.node.metrics.text().decode().splitlines()
            if line.startswith("modelops_http_requests_total") and 'status="5' in line
        )


def read_answer(caller: socket.socket) -> tuple[int, dict[str, str], bytes]:
    data = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in data and (piece := caller.recv(65536)):
            data += piece
    if not data:
        return 0, {}, b""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    length = int(headers.get("content-length", "0"))
    chunked = headers.get("transfer-encoding") == "chunked"
    while chunked and not body.endswith(b"0\r\n\r\n") and (piece := caller.recv(65536)):
        body += piece
    while len(body) < length and (piece := caller.recv(65536)):
        body += piece
    return int(lines[0].split()[1]), headers, body


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen")


@contextlib.contextmanager
def http(node: InferenceNode, **options: Any) -> Iterator[Live]:
    config = uvicorn.Config(
        create_app(node), host="127.0.0.1", port=0, log_level="critical", http=BoundedProtocol,
        **options,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Live(node, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "a client held up the end of the server"


@pytest.fixture(scope="module")
def live(tiny_release: Path) -> Iterator[Live]:
    node = InferenceNode(tiny_release, settings=NodeSettings(profile_s=0))
    node.start()
    assert node.readiness() == []
    with http(node) as live:
        yield live
    node.close(drain=False, timeout_s=10)


@pytest.fixture(autouse=True)
def no_fault_of_the_nodes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a client does, the node is not to call it its own failure, and goes on."""
    if "live" not in request.fixturenames:
        yield
        return
    live: Live = request.getfixturevalue("live")
    before = live.failures()
    yield
    assert live.works()
    assert live.failures() == before


@pytest.fixture
def impatient(live: Live) -> Iterator[None]:
    """Clients get 0.6 s for a head, a body, or to read."""
    before = LIMITS.timeout_s, LIMITS.max_connections, LIMITS.on_closed
    LIMITS.timeout_s, LIMITS.on_closed = 0.6, live.node.metrics.on_closed
    yield
    LIMITS.timeout_s, LIMITS.max_connections, LIMITS.on_closed = before


def sun(**fields: Any) -> bytes:
    return json.dumps({"prompt": "sun", "steps": 1, "guidance": 1, **fields}).encode()


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "}", "[]", "null", "0", '"sun"', "\x00", "{'prompt': 'sun'}", '{"prompt": sun}',
        "[" * 30_000, '{"a":' * 10_000, '{"prompt": "sun"' + ',"n":1' * 9_000, "1e99999", "-",
        '{"prompt": "\\ud800"}', '{"prompt": "\\udc00\\ud800"}', '{"\\ud800": 1, "prompt": "sun"}',
        '{"prompt": "a\\u0000b"}', '{"prompt": "   "}', '{"prompt": "\\u2028\\u200b"',
        '{"prompt": null}', '{"prompt": ["sun"]}', '{"prompt": {"a": 1}}', '{"prompt": 5}',
        '{"prompt": "sun", "n": true}', '{"prompt": "sun", "n": "1"}', '{"prompt": "sun", "n": -1}',
        '{"prompt": "sun", "n": 1.5}', '{"prompt": "sun", "n": 1e400}',
        '{"prompt": "sun", "seed": 1e30}', '{"prompt": "sun", "seed": ' + "9" * 5_000 + "}",
        '{"prompt": "sun", "seed": -0.5}', '{"prompt": "sun", "steps": NaN}',
        '{"prompt": "sun", "guidance": NaN}', '{"prompt": "sun", "guidance": Infinity}',
        '{"prompt": "sun", "guidance": -Infinity}', '{"prompt": "sun", "guidance": 1e400}',
        '{"prompt": "sun", "guidance": true}', '{"prompt": "sun", "guidance": "3"}',
        '{"prompt": "sun", "stream": "yes"}', '{"prompt": "sun", "stream": 1}',
        '{"prompt": "sun", "size": "32x32\\n"}', '{"prompt": "sun", "size": "٣٢x٣٢"}',
        '{"prompt": "sun", "output_format": "PNG"}', '{"prompt": "sun", "output_format": "../x"}',
        '{"prompt": "sun", "__proto__": {}}', '{"prompt": "sun", "": 1}',
        '{"prompt": "sun", "x\\r\\nSet-Cookie: a=b": 1}', "\ufeff" + '{"prompt": "sun"}',
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_bodies_that_are_no_requests(live: Live, text: str) -> None:
    status, answer = live.post(text.encode())
    assert status == 400
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 400 and error["message"].isprintable()


def test_bodies_that_are_no_utf8(live: Live) -> None:
    for body in (
        b'{"prompt": "\xff\xfe"}',
        b"\x80",
        bytes(range(256)),
        b'{"prompt": "\xed\xa0\x80"}',
    ):
        assert live.post(body)[0] == 400


def test_texts_of_all_kinds_are_drawn(live: Live) -> None:
    joined = "\U0001f469\u200d\U0001f469\u200d\U0001f467\ufe0f\U0001f3f3\ufe0f\u200d\U0001f308"
    stacked = "s\u0334\u0322\u031bu\u0358\u035dn\u0337\u031b"
    hebrew = "\u05e9\u05de\u05e9 \u202esun\u202c"
    for prompt in (hebrew, stacked, joined, "<script>", "'; --", "%s %n {0}", "a\tb", "\U0010ffff"):
        for escaped in (True, False):
            body = json.dumps({"prompt": prompt, "steps": 1}, ensure_ascii=escaped)
            status, answer = live.post(body.encode())
            assert status == 200, (prompt, answer)
            assert answer["data"][0]["x_modelops"]["request"]["prompt"] == prompt


def test_of_two_values_of_a_field_the_last_one_counts(live: Live) -> None:
    status, answer = live.post(b'{"prompt": "a star", "prompt": "sun", "steps": 1, "steps": 2}')
    request = answer["data"][0]["x_modelops"]["request"]
    assert (status, request["prompt"], request["steps"]) == (200, "sun", 2)


@pytest.mark.parametrize(
    "header",
    [
        "Content-Type: application/json; charset=utf-16", "Content-Encoding: gzip",
        "Content-Encoding: br, identity", "Content-Type: application/json+x", "Content-Type: ;",
    ],
)  # fmt: skip
def test_bodies_in_another_form_are_refused(live: Live, header: str) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.1\r\n{header}\r\nContent-Length: 4\r\n\r\nxxxx"
    status, headers, answer = live.raw(head.encode())
    assert (status, json.loads(answer)["error"]["code"]) == (415, "unsupported_media_type")
    assert headers["connection"] == "close"


def test_utf8_by_its_name_is_fine(live: Live) -> None:
    kind = b'Content-Type: Application/JSON ; Charset="UTF-8"\r\n'
    head = HEAD.replace(b"Content-Type: application/json\r\n", kind)
    assert live.raw(head + b"Content-Length: %d\r\n\r\n%s" % (len(sun()), sun()))[0] == 200


def test_huge_bodies_are_refused_and_the_answer_is_seen(live: Live) -> None:
    for size in (70_000, 900_000):
        assert live.post(b"x" * size)[1]["error"]["code"] == "body_too_large"
    for stated in (10**9, 10**19):
        status, headers, _ = live.raw(HEAD + b"Content-Length: %d\r\n\r\n" % stated + b"x" * 2**21)
        assert (status, headers["connection"]) == (413, "close")
    chunks = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    status, headers, _ = live.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks * 40)
    assert (status, headers["connection"]) == (413, "close")


# --- heads ----------------------------------------------------------------------------------------


def test_two_lengths_are_refused_and_nothing_behind_them_is_read(live: Live) -> None:
    """Of a request with both, a proxy before us may have believed the other one (smuggling)."""
    inner = b"GET /v1/models HTTP/1.1\r\nHost: 127.1\r\n\r\n"
    with live.connect() as caller:
        caller.sendall(
            HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner
        )
        status, headers, body = read_answer(caller)
        assert (status, json.loads(body)["error"]["code"]) == (400, "ambiguous_length")
        assert headers["connection"] == "close"
        assert read_answer(caller) == (0, {}, b"")


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 1\r\nContent-Length: 2\r\n", b"Content-Length: -1\r\n",
        b"Content-Length: +1\r\n", b"Content-Length: 1_0\r\n", b"Content-Length: \xb2\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding : chunked\r\n",
        b"X-Request-Id: a\x00b\r\n", b"X-Request-Id: a\rb\r\n", b"Host: y\r\n", b": x\r\n",
        b"X: " + b"a" * 200_000 + b"\r\n",
    ],
)  # fmt: skip
def test_heads_that_are_no_heads(live: Live, head: bytes) -> None:
    assert live.raw(HEAD + head + b"\r\n")[0] == 400


@pytest.mark.parametrize(
    "line",
    [
        b"GET /x HTTP/0.9", b"GET /a\x00b HTTP/1.1", b"GET /\xff HTTP/1.1", b"\x16\x03\x01\x02\x00",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1", b"GET  /livez HTTP/1.1", b"livez",
    ],
)  # fmt: skip
def test_lines_that_are_no_requests(live: Live, line: bytes) -> None:
    assert live.raw(line + b"\r\nHost: 127.1\r\n\r\n")[0] in (400, 404)


@pytest.mark.parametrize(
    "target",
    [
        "/%2e%2e/%2e%2e/etc/passwd", "/v1/images/../../etc/passwd", "/a%00b", "/%ff%fe",
        "//v1/models", "/v1/models%0d%0aSet-Cookie:%20a=b", "/v1/models/", "/V1/models",
        "/v1//models", "/;/v1/models", "/" + "a" * 60_000, "/x?" + "a=b&" * 10_000,
        "http://elsewhere.example/v1/models", "*",
    ],
)  # fmt: skip
def test_paths_that_lead_nowhere(live: Live, target: str) -> None:
    status, headers, body = live.raw(f"GET {target} HTTP/1.1\r\nHost: 127.1\r\n\r\n".encode())
    assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
    assert "set-cookie" not in headers and "etc" not in body.decode()


def test_strange_headers_of_observers_change_nothing(live: Live) -> None:
    for header in (
        b"X-Request-Id: a%0d%0ab", b"X-Request-Id: " + b"a" * 5_000, b"X-Request-Id: \xc3\xa9",
        b"traceparent: 00-\xff\xfe-zz", b"traceparent: 00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01",
        b"tracestate: " + b"a=b," * 2_000, b"baggage: \xff=\xff", b"baggage: " + b"k=v," * 5_000,
        b"Authorization: Bearer \xff\xfe", b"Authorization: Basic",
        b"Expect: 200-maybe", b"Upgrade: h2c", b"Accept: \xff/*",
    ):  # fmt: skip
        body = sun()
        status, headers, _ = live.raw(
            HEAD + header + b"\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert status == 200, header
        assert len(headers["x-request-id"]) <= 64 and headers["x-request-id"].isascii()


def test_other_methods_are_told_which_one(live: Live) -> None:
    for method in ("PUT", "TRACE", "OPTIONS", "GET", "PROPFIND"):
        status, headers, _ = live.raw(f"{method} {PATH} HTTP/1.1\r\nHost: 127.1\r\n\r\n".encode())
        assert (status, headers["allow"]) == (405, "POST"), method
    with live.connect() as caller:
        caller.sendall(f"HEAD {PATH} HTTP/1.1\r\nHost: 127.1\r\nConnection: close\r\n\r\n".encode())
        assert caller.recv(4096).startswith(b"HTTP/1.1 405 ")


# --- clients that leave ---------------------------------------------------------------------------


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def threads() -> int:
    """Threads, but for those of pools, which are bounded and grow when they like."""
    pools = ("asyncio_", "AnyIO worker", "modelops-finish")
    return sum(not thread.name.startswith(pools) for thread in threading.enumerate())


def test_two_hundred_hang_ups_at_every_stage_leak_nothing(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(data: bytes, when: Callable[[], bool] = lambda: True) -> None:
        with live.connect() as caller:
            caller.sendall(data)
            until(when)

    encoding = threading.Event()
    seal = live.node.sealer.seal

    def slow_seal(*arguments: Any) -> Any:
        encoding.set()
        time.sleep(0.01)
        return seal(*arguments)

    monkeypatch.setattr(live.node.sealer, "seal", slow_seal)
    long = sun(steps=200, n=2)
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(long) + long
    short = HEAD + b"Content-Length: %d\r\n\r\n" % len(sun()) + sun()
    stream = sun(steps=200, stream=True, partial_images=3)
    stages: list[Callable[[], None]] = [
        lambda: leave(b""),
        lambda: leave(HEAD[:30]),
        lambda: leave(HEAD + b"Content-Length: 400\r\n\r\n"),
        lambda: leave(HEAD + b"Content-Length: 400\r\n\r\n{"),
        lambda: leave(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"),
        lambda: leave(whole),
        lambda: leave(whole, lambda: live.node.engine.running > 0),
        lambda: leave(HEAD + b"Content-Length: %d\r\n\r\n" % len(stream) + stream,
                      lambda: live.node.engine.running > 0),
        lambda: (encoding.clear(), leave(short, encoding.is_set), None)[-1],
        lambda: leave(b"GET /metrics HTTP/1.1\r\nHost: 127.1\r\n\r\n" * 20),
    ]  # fmt: skip
    for stage in stages:  # once round: pools of threads and files that are opened once
        stage()
    assert live.works()
    until(live.idle)
    before = handles(), threads()
    for _ in range(20):
        for stage in stages:
            stage()
    until(live.idle)
    assert live.works()
    until(lambda: handles() <= before[0])
    until(lambda: threads() <= before[1])


def test_a_body_that_stops_halfway_is_not_the_nodes_failure(live: Live) -> None:
    name = 'modelops_http_requests_total{route="/v1/images/generations",status="499"}'
    before = live.metric(name) if name.encode() in live.node.metrics.text() else 0.0
    with live.connect() as caller:
        caller.sendall(HEAD + b"Content-Length: 400\r\n\r\n{")
    until(lambda: name.encode() in live.node.metrics.text() and live.metric(name) > before)


# --- clients that stand still ---------------------------------------------------------------------


def test_a_body_that_does_not_come_is_408(live: Live, impatient: None) -> None:
    for head in (b"Content-Length: 400\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
        status, headers, body = live.raw(HEAD + head)
        assert (status, json.loads(body)["error"]["code"]) == (408, "body_timeout")
        assert headers["connection"] == "close"
    assert live.metric('modelops_errors_total{code="body_timeout"}') >= 2


@pytest.mark.parametrize(
    "data", [b"", b"POST /v1/im", HEAD, b"GET /livez HTTP/1.1\r\nHost: 127.1\r\n\r\nG"]
)
def test_a_head_that_does_not_come_ends_the_connection(
    live: Live, impatient: None, data: bytes
) -> None:
    name = 'modelops_connections_closed_total{reason="head"}'
    before = live.metric(name)
    with live.connect() as caller:
        caller.sendall(data)
        if b"livez" in data:
            assert read_answer(caller)[0] == 200
        assert read_answer(caller) == (0, {}, b"")
    assert live.metric(name) == before + 1


def test_dripping_bytes_buys_no_time(live: Live, impatient: None) -> None:
    with live.connect() as caller, contextlib.suppress(ConnectionError):
        for byte in itertools.cycle(b"X-A: b\r\n"):
            caller.sendall(HEAD if byte == HEAD[0] else bytes([byte]))
            time.sleep(0.02)


def test_quick_requests_one_after_the_other_keep_their_connection(
    live: Live, impatient: None
) -> None:
    """Each is answered between two looks at the connection, which is as old as four timeouts."""
    name = 'modelops_connections_closed_total{reason="head"}'
    before, end = live.metric(name), time.monotonic() + 4 * LIMITS.timeout_s
    with live.connect() as caller:
        while time.monotonic() < end:
            caller.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.1\r\n\r\n")
            assert read_answer(caller)[0] == 200
            time.sleep(0.02)
    assert live.metric(name) == before


def test_an_answer_that_nobody_reads_ends_the_connection(live: Live, impatient: None) -> None:
    name = 'modelops_connections_closed_total{reason="read"}'
    before = live.metric(name)
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: 127.1\r\n\r\n"
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(("127.0.0.1", live.port))
        caller.settimeout(5)
        with contextlib.suppress(OSError):
            for _ in range(2_000):
                caller.sendall(asked)
        until(lambda: live.metric(name) == before + 1)


def test_a_slow_reader_gets_all_of_it(live: Live, impatient: None) -> None:
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: 127.1\r\n\r\n" * 150
    size, name = 0, 'modelops_connections_closed_total{reason="read"}'
    before = live.metric(name)
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(("127.0.0.1", live.port))
        caller.sendall(asked + b"GET /livez HTTP/1.1\r\nHost: 127.1\r\nConnection: close\r\n\r\n")
        while piece := caller.recv(65536):
            size += len(piece)
            tail = piece
            time.sleep(0.002)
    assert tail.endswith(b"ok\n") and size > 150 * len(json.dumps(create_app().openapi())) / 2
    assert live.metric(name) == before


def test_one_connection_too_many_is_closed_and_counted(live: Live, impatient: None) -> None:
    LIMITS.timeout_s, LIMITS.max_connections = 30.0, 20
    name = 'modelops_connections_closed_total{reason="full"}'
    before = live.metric(name)
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(live.connect()) for _ in range(30)]
        until(lambda: live.metric(name) == before + 10)
        callers[0].sendall(b"GET /livez HTTP/1.1\r\nHost: 127.1\r\n\r\n")
        assert read_answer(callers[0])[0] == 200, "those that were in stay in"
    until(live.works)


def test_limits_leave_files_for_the_node_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LIMITS.timeout_s, LIMITS.max_connections
    registered = dict(uvicorn.config.HTTP_PROTOCOLS)
    monkeypatch.setattr("resource.getrlimit", lambda what: (256, 256))
    try:
        assert limit_connections(5.0, 2_000).max_connections == 128
        config = uvicorn.Config(lambda: None)
        config.load()
        assert config.http_protocol_class is BoundedProtocol, "uvicorn moved its table"
    finally:
        uvicorn.config.HTTP_PROTOCOLS.update(registered)
        LIMITS.timeout_s, LIMITS.max_connections = before


# --- a node that hangs ----------------------------------------------------------------------------


def test_a_hung_network_turns_livez_red_and_leaves_no_client_waiting(
    tiny_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = NodeSettings(profile_s=0, stalled_s=0.5, deadline_s=30)
    node = InferenceNode(tiny_release, settings=settings)
    node.start()
    node.settings = settings.model_copy(update={"deadline_s": 0.5})
    monkeypatch.setattr(answers, "ENGINE_GRACE_S", 0.5)
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.5)
    go_on = threading.Event()
    evaluate = node.engine.pipeline.unet.forward

    def hang(*arguments: Any, **named: Any) -> Any:
        go_on.wait(60)
        return evaluate(*arguments, **named)

    monkeypatch.setattr(node.engine.pipeline.unet, "forward", hang)
    with http(node) as live:
        for extra in ({}, {"stream": True}):
            if extra:
                node.settings = node.settings.model_copy(update={"stalled_s": 60.0})
            body = sun(**extra)
            status, headers, answer = live.raw(
                HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            if status == 200:  # a stream that had said that it is still at it
                assert b"deadline_exceeded" in answer
            else:
                assert (status, json.loads(answer)["error"]["code"]) == (503, "deadline_exceeded")
                assert int(headers["retry-after"]) >= 1
        node.settings = node.settings.model_copy(update={"stalled_s": 0.5})
        livez = b"GET /livez HTTP/1.1\r\nHost: 127.1\r\n\r\n"
        assert live.raw(livez)[0] == 503
        ready = live.raw(livez.replace(b"livez", b"readyz"))
        assert ready[0] == 503 and b"the engine does not answer" in ready[2]
        assert live.post(sun())[1]["error"]["code"] == "not_ready"
        go_on.set()
        until(lambda: live.raw(livez)[0] == 200)
        until(live.works)
    node.close(drain=False, timeout_s=10)


def test_a_node_that_hangs_can_still_be_closed(
    tiny_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = InferenceNode(tiny_release, settings=NodeSettings(profile_s=0))
    go_on = threading.Event()
    monkeypatch.setattr(node.engine.pipeline.unet, "forward", lambda *a, **k: go_on.wait(60))
    waiting = threading.Thread(target=node.start)  # makes the golden image
    waiting.start()
    until(lambda: node.engine.running > 0)
    node.close(drain=True, timeout_s=0.2)
    assert "shutting down" in node.problems()
    go_on.set()
    waiting.join(30)
    assert not waiting.is_alive()


def test_the_end_of_the_drain_is_said_in_openais_shape(
    tiny_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn alone answers a bare 500 to what it cuts off."""
    node = InferenceNode(tiny_release, settings=NodeSettings(profile_s=0))
    node.start()
    evaluate = node.engine.pipeline.unet.forward

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.1)
        return evaluate(*arguments, **named)

    monkeypatch.setattr(node.engine.pipeline.unet, "forward", slow)
    answers_got: list[tuple[int, Any]] = []
    with http(node, timeout_graceful_shutdown=2) as live:
        caller = threading.Thread(target=lambda: answers_got.append(live.post(sun(steps=200))))
        caller.start()
        until(lambda: node.engine.running > 0)
    caller.join(30)
    ((status, answer),) = answers_got
    assert (status, answer["error"]["code"]) == (503, "cancelled")
    until(lambda: node.engine.running == 0)
    node.close(timeout_s=10)
