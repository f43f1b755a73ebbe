"""A real HTTP server that speaks the Images API and does what the prompt says."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

RELEASE, CANARY = "ab" * 32, "cd" * 32


@dataclass(slots=True)
class Service:
    """What it was asked for: `bodies`, in the order of their coming."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def handle(self, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        """(status, answer, headers)"""
        self.bodies.append(body)
        prompt, now = body["prompt"], {"Retry-After": "0"}
        times = sum(each["prompt"] == prompt for each in self.bodies)
        if prompt == "hang":
            self._stopped.wait()
        if prompt == "always busy" or (prompt == "busy" and times <= 2):
            return 429, {"error": {"code": "rate_limit_exceeded", "message": "later"}}, now
        if prompt == "full":
            return 503, {"error": {"code": "full", "message": "full"}}, {}
        if prompt == "blocked":
            error = {"code": "content_policy_violation", "message": "the prompt is not allowed"}
            return 400, {"error": error}, {}
        if prompt == "broken":
            return 200, b"<html>", {}
        if prompt == "no image":
            return 200, {"data": []}, {}
        size, shade = (16, 16) if prompt == "another size" else (32, 32), body["seed"] % 200
        buffer = io.BytesIO()
        Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        release = CANARY if prompt == "canary" else RELEASE
        receipt = {"release": {"name": "pilot", "sha256": release}}
        return 200, {"created": 0, "data": [{"b64_json": data, "x_modelops": receipt}]}, {}


@contextmanager
def serve() -> Iterator[Service]:
    """A service whose own size is 32x32, on this machine."""
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self, status: int, body: Any, headers: dict[str, str]) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            about = {"release_sha256": RELEASE, "size": "32x32", "runtime": "torch-cpu"}
            self.answer(200, {"data": [{"id": "pilot", "x_modelops": about}]}, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = service.handle(body)
            if not service._stopped.is_set():
                self.answer(*answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service._stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
