"""The local web page that raters vote on. Standard library only; key.json is never opened."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from modelops.abtest.study import IMAGES, VOTES, Showing, rater_order, read_study
from modelops.abtest.votes import Vote, VoteLog, clean_rater
from modelops.base.errors import IntegrityError, ModelopsError, ServingError, UsageError
from modelops.base.files import sha256_file

MAX_BODY = 4096  # bytes of a request
IDLE_S = 30  # seconds a connection may be silent
_ORDERS_KEPT = 256  # raters whose order is remembered
_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class ConflictError(ModelopsError):
    """A vote on another trial than the rater's current one: their page is out of date."""


class Session:
    """Session of a study: the next trial of each rater, and their votes.

    Raises:
        UsageError: there is no study in the directory.
        IntegrityError: an image is missing or changed, or votes.jsonl is damaged.
        ServingError: another process serves the study.
    """

    def __init__(
        self, directory: str | Path, *, on_finished: Callable[[str], None] | None = None
    ) -> None:
        folder = Path(directory)
        self.study, self._sha256 = read_study(folder)
        self.images = {name: folder / IMAGES / f"{name}.png" for name in self.study.images}
        for name, path in self.images.items():
            if not path.is_file() or sha256_file(path) != self.study.images[name]:
                raise IntegrityError(f"{path}: missing, or not the image the study was built with")
        self.log = VoteLog(folder / VOTES, self._sha256)
        self._on_finished = on_finished
        self._lock = threading.Lock()
        self._orders: OrderedDict[str, list[Showing]] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """Content of the page before a rater gives a name."""
        return {
            "title": self.study.title, "question": self.study.question,
            "total": len(self.study.trials),
        }  # fmt: skip

    def state(self, rater: str) -> dict[str, Any]:
        """Content of the rater's page."""
        with self._lock:
            return self._state(clean_rater(rater))

    def vote(self, rater: str, trial: str, choice: Any, latency_ms: Any) -> dict[str, Any]:
        """Record a vote on the rater's current trial; returns the state after it.

        Raises:
            ConflictError: the trial is not the rater's current one.
            UsageError: the choice or latency is not one.
        """
        name = clean_rater(rater)
        with self._lock:
            showing = self._current(name)
            if showing is None or showing.trial != trial:
                raise ConflictError("this pair is not the next one; your page was out of date")
            if choice is None:
                raise UsageError("no choice")
            self._append("vote", name, showing, choice=choice, latency_ms=latency_ms)
            if self._current(name) is None and self._on_finished:
                self._on_finished(name)
            return self._state(name)

    def undo(self, rater: str, trial: str) -> dict[str, Any]:
        """Take back the rater's last vote, which was on this trial; returns the state after it.

        Raises:
            ConflictError: it was not.
        """
        name = clean_rater(rater)
        with self._lock:
            mine = self.log.standing.get(name, [])
            if not mine or mine[-1].trial != trial:
                raise ConflictError("that is not your last vote; your page was out of date")
            last = mine[-1]
            self._append("undo", name, Showing(last.trial, "", last.left, last.right))
            return self._state(name)

    def close(self) -> None:
        """Release votes.jsonl."""
        self.log.close()

    def _append(self, kind: str, rater: str, showing: Showing, **more: Any) -> None:
        try:
            vote = Vote.model_validate(
                {"kind": kind, "study": self._sha256, "rater": rater, "trial": showing.trial,
                 "left": showing.left, "right": showing.right, **more}
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{first['loc'][0]}: {first['msg']}") from error
        self.log.append(vote)

    def _order(self, rater: str) -> list[Showing]:
        order = self._orders.pop(rater, None) or rater_order(self.study, rater)
        self._orders[rater] = order
        if len(self._orders) > _ORDERS_KEPT:
            self._orders.popitem(last=False)
        return order

    def _left(self, rater: str) -> list[Showing]:
        voted = {vote.trial for vote in self.log.standing.get(rater, [])}
        return [showing for showing in self._order(rater) if showing.trial not in voted]

    def _current(self, rater: str) -> Showing | None:
        return next(iter(self._left(rater)), None)

    def _state(self, rater: str) -> dict[str, Any]:
        left, mine = self._left(rater), self.log.standing.get(rater, [])

        def shown(showing: Showing) -> dict[str, str]:
            return {
                "trial": showing.trial, "prompt": showing.prompt,
                "left": f"/image/{showing.left}.png", "right": f"/image/{showing.right}.png",
            }  # fmt: skip

        return {
            **self.about(), "rater": rater, "done": len(mine),
            "undo": mine[-1].trial if mine else None,
            "current": shown(left[0]) if left else None,
            "next": shown(left[1]) if len(left) > 1 else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    kind: str
    body: bytes
    cache: str = "no-store"


class AbTestServer(ThreadingHTTPServer):
    """The study's page on one address. `url` names it; `serve_forever` and `shutdown` as usual.

    Raises:
        UsageError: the host is not an address of this machine, or the port is out of range.
        ServingError: the port is in use.
    """

    daemon_threads = True
    allow_reuse_port = False  # two servers on one port would share the votes at random
    request_queue_size = 64

    def __init__(self, session: Session, host: str = "127.0.0.1", port: int = 8765) -> None:
        address = "127.0.0.1" if host == "localhost" else host
        try:
            ip = ip_address(address)
        except ValueError as error:
            raise UsageError(
                f"{host}: not an IP address", hint="use 127.0.0.1, or 0.0.0.0 for all interfaces"
            ) from error
        if not 0 <= port <= 65535:
            raise UsageError(f"port {port}: must be 0 (any free one) to 65535")
        self.session = session
        self.pages = {
            path: (files(__package__).joinpath("page", name).read_bytes(), kind)
            for path, (name, kind) in _PAGES.items()
        }
        self.address_family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        try:
            super().__init__((address, port), _Handler)
        except OSError as error:
            raise ServingError(
                f"{address}:{port}: {(error.strerror or str(error)).lower()}",
                hint="choose another one with --port, or stop what is listening there",
            ) from error
        shown = f"[{address}]" if ip.version == 6 else address
        if ip.is_unspecified:
            shown = "127.0.0.1" if ip.version == 4 else "[::1]"
        self.loopback = ip.is_loopback
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        # Not HTTPServer's: that one looks up the machine's name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that hangs up, which is not a server error."""


class _Handler(BaseHTTPRequestHandler):
    server: AbTestServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server_version = "modelops"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Votes are the log."""

    def _answer(self, make: Callable[[], _Answer]) -> None:
        try:
            answer = self._refusal() or make()
        except ConflictError as error:
            answer = _problem(HTTPStatus.CONFLICT, error.message)
        except UsageError as error:
            answer = _problem(HTTPStatus.BAD_REQUEST, error.message)
        except ModelopsError as error:
            answer = _problem(HTTPStatus.INSUFFICIENT_STORAGE, error.message)
        if answer.status >= 400:
            self.close_connection = True  # there may be a body that was not read
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", answer.cache)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _refusal(self) -> _Answer | None:
        """Pages of other sites must neither vote nor, by a name that leads here, read."""
        host = self.headers.get("Host", "")
        local = re.fullmatch(r"(127\.[\d.]+|localhost|\[::1\])(:\d+)?", host)
        if self.server.loopback and not local:
            return _problem(HTTPStatus.MISDIRECTED_REQUEST, "not a name of this server")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return _problem(HTTPStatus.FORBIDDEN, "a request from another site")
        return None

    def _get(self) -> _Answer:
        url = urlsplit(self.path)
        if url.path in self.server.pages:
            body, kind = self.server.pages[url.path]
            return _Answer(HTTPStatus.OK, kind, body, "no-cache")
        session = self.server.session
        if url.path == "/api/study":
            return _json(session.about())
        if url.path == "/api/state":
            raters = parse_qs(url.query, max_num_fields=4).get("rater", [""])
            return _json(session.state(raters[0]))
        image = re.fullmatch(r"/image/([0-9a-f]+)\.png", url.path)
        if image and image[1] in session.images:
            try:
                body = session.images[image[1]].read_bytes()
            except OSError:
                return _problem(HTTPStatus.GONE, "the image is no longer there")
            return _Answer(HTTPStatus.OK, "image/png", body, "private, max-age=86400, immutable")
        return _problem(HTTPStatus.NOT_FOUND, "nothing here")

    def _post(self) -> _Answer:
        if self.headers.get_content_type() != "application/json":
            return _problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length):
            return _problem(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if int(length) > MAX_BODY:
            return _problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY} bytes")
        try:
            data = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return _problem(HTTPStatus.BAD_REQUEST, "not JSON")
        if not isinstance(data, dict):
            return _problem(HTTPStatus.BAD_REQUEST, "not a JSON object")
        rater, trial = data.get("rater"), data.get("trial")
        if not isinstance(rater, str) or not isinstance(trial, str):
            return _problem(HTTPStatus.BAD_REQUEST, "rater and trial should be text")
        session = self.server.session
        if self.path == "/api/vote":
            return _json(
                session.vote(rater, trial, data.get("choice"), data.get("latency_ms", 0.0))
            )
        if self.path == "/api/undo":
            return _json(session.undo(rater, trial))
        return _problem(HTTPStatus.NOT_FOUND, "nothing here")


def _json(value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> _Answer:
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return _Answer(status, "application/json", body)


def _problem(status: HTTPStatus, message: str) -> _Answer:
    return _json({"error": message}, status)
