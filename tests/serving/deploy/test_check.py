"""What is no node of ours is called so; a signal before the server is there is not lost."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from modelops.base.errors import ServingError, UsageError
from modelops.serving.deploy import launch
from modelops.serving.deploy.check import check_endpoint, get

MODEL = {"id": "a", "object": "model", "created": 1, "owned_by": "b"}
MODELS = {"object": "list", "data": [MODEL]}


@contextlib.contextmanager
def answering(answers: dict[str, Any]) -> Iterator[str]:
    """A server that says this of each path, and 200 of every other one."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps(answers.get(self.path, "ok")).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("models", "images"),
    [
        ("hello", None), ({}, None), ({"object": "list", "data": []}, None),
        (MODELS, {"created": 1, "data": []}), (MODELS, {"created": 1, "data": None}),
        (MODELS, {"created": 1, "data": [{"url": "http://x"}]}),
        (MODELS, {"created": 1, "data": [{"b64_json": "aGVsbG8="}]}),
        (MODELS, {"created": 1, "data": [{"b64_json": "aGVsbG8=", "x_modelops": {}}]}),
        (MODELS, {"created": 1, "data": [
            {"b64_json": "aGVsbG8=", "x_modelops": {"output_sha256": "0" * 64}}]}),
    ],
)  # fmt: skip
def test_another_server_is_told_apart(models: Any, images: Any) -> None:
    answers = {"/v1/models": models, "/v1/images/generations": images}
    with answering(answers) as url, pytest.raises(ServingError, match=url):
        check_endpoint(url)


def test_what_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            caller, _ = server.accept()
            with caller:
                caller.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ServingError, match="no answer"):
            get(f"http://127.0.0.1:{server.getsockname()[1]}/livez")
        thread.join()


@pytest.mark.parametrize(
    "url", ["nonsense", "localhost:3000", "ftp://x/y", "file:///etc/hostname", "http://[::1"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="not an"):
        get(url)


def test_a_signal_while_the_server_is_started_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """It came after the process was there and before anybody had a name for it."""
    real, started = subprocess.Popen, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        started.append(real(*arguments, **named))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(launch, "serve_command", lambda host, port: waits)
    monkeypatch.setattr(launch.subprocess, "Popen", interrupted)
    assert launch.run_server(tmp_path, host="127.0.0.1", port=1) == 0
    assert started[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
