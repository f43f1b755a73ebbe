"""A real HTTP server with the Images API as others speak it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]


@dataclass(slots=True)
class ForeignService:
    """What it was asked: `requests` of (method, path, headers, body), in their order."""

    url: str = ""
    requests: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)

    @property
    def posted(self) -> list[dict[str, Any]]:
        """Bodies of the requests for images."""
        return [body for method, _, _, body in self.requests if method == "POST"]


@contextmanager
def serve(
    image: Callable[[dict[str, Any]], Reply], *, models: Any = None, pages: Any = None
) -> Iterator[ForeignService]:
    """Serve on loopback: `image` answers a request for one, `models` is the list, `pages` by path.

    Answers are JSON, or bytes as they are.
    """
    service = ForeignService()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def reply(self, status: int, body: Any, headers: dict[str, str]) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            service.requests.append(("GET", self.path, dict(self.headers), None))
            if self.path == "/v1/models":
                self.reply(200, {"data": []} if models is None else models, {})
            elif self.path in (pages or {}):
                self.reply(200, pages[self.path], {})
            else:
                self.reply(404, {}, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            service.requests.append(("POST", self.path, dict(self.headers), body))
            self.reply(*image(body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
