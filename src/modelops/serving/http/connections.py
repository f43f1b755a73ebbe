"""Time and connection limits for clients: uvicorn has none on a request's head or on its reader.

    connected ─▶ head ─▶ body ─▶ (the node works) ─▶ answer read ─▶ next head
                 ^ here   ^ answers.read_body         ^ here

uvicorn ends a quiet keep-alive connection, and nothing else: a client that never finishes its
head, or never reads its answer, keeps its connection and the answer's bytes for as long as it likes
(Slowloris; CWE-400). BentoML passes no protocol class on, so `limit_connections` puts this one
where uvicorn looks for its own.
"""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from modelops.serving.api import ApiError

log = logging.getLogger("modelops.serving")

FAREWELL_S = 5.0  # so long before the end of the drain, unfinished requests are ended
SPARE_HANDLES = 128  # for the model, the logs, and the files that an image is signed in


@dataclass(slots=True)
class ClientLimits:
    """Limits of one client, and of all clients together.

    Attributes:
        timeout_s: seconds for a request's head, or without a byte of the answer being read.
        max_connections: open at once, in this process; one more is closed unanswered.
        on_closed: called with "head", "read" or "full" for each connection that is closed for it.
    """

    timeout_s: float = 30.0
    max_connections: int = 2000
    on_closed: Callable[[str], Any] = lambda reason: None


LIMITS = ClientLimits()  # of this process: uvicorn makes the protocols, so nothing can be passed in


def limit_connections(timeout_s: float, max_connections: int) -> ClientLimits:
    """Set this process's limits; servers that uvicorn starts from now on keep them."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = max_connections
    if handles != resource.RLIM_INFINITY:
        possible = max(1, min(max_connections, handles - SPARE_HANDLES))
    if possible < max_connections:
        log.warning(
            "%d connections at once, not %d: this process may open %d files (see ulimit -n)",
            possible, max_connections, handles,
        )  # fmt: skip
    LIMITS.timeout_s = timeout_s
    LIMITS.max_connections = possible
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedProtocol"
    return LIMITS


class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's HTTP protocol with LIMITS; the server side of one connection."""

    _look_again: Any = None
    _farewell: Any = None
    _good_at = 0.0  # when the client had last done its part, in seconds of the loop's clock
    _unsent = 0  # bytes of the answer that waited for the client when last looked at
    _latest: Any = None  # the request that was the latest when last looked at

    def connection_made(self, transport: Any) -> None:
        """Refuse the connection if there are too many; else check it from time to time."""
        super().connection_made(transport)
        if len(self.connections) > LIMITS.max_connections:
            LIMITS.on_closed("full")
            transport.abort()
            return
        self._good_at = self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the checks."""
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Let a request go on until just before uvicorn would cut it off with a bare 500."""
        super().shutdown()
        limit, cycle = self.config.timeout_graceful_shutdown, self.cycle
        if limit is not None and cycle is not None and not cycle.response_complete:
            wait_s = max(limit - FAREWELL_S, limit / 2)
            self.loop.call_later(wait_s, self._say_farewell, cycle)

    def _say_farewell(self, cycle: Any) -> None:
        self._farewell = self.loop.create_task(_farewell(cycle))  # a loop keeps no task alive

    def _look_later(self) -> None:
        self._look_again = self.loop.call_later(LIMITS.timeout_s / 4, self._look)

    def _look(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if self.transport.is_closing() and not unsent:
            return
        working = self.cycle is not None and not self.cycle.response_complete
        asked = self.cycle is not self._latest  # and was answered since, perhaps
        reads = unsent != self._unsent
        if reads if unsent else working or asked:
            self._good_at = self.loop.time()
        self._unsent, self._latest = unsent, self.cycle
        if self.loop.time() - self._good_at < LIMITS.timeout_s:
            self._look_later()
            return
        LIMITS.on_closed("read" if unsent else "head")
        self.transport.abort()


async def _farewell(cycle: Any) -> None:
    """End a request for which the drain has no time left: 503 if it has no answer; no more work."""
    if not cycle.response_complete and not cycle.response_started:
        error = ApiError(503, "cancelled", "the server is shutting down", retry_after_s=5)
        body = json.dumps(error.body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", b"5"),
        ]
        await cycle.send({"type": "http.response.start", "status": 503, "headers": headers})
        await cycle.send({"type": "http.response.body", "body": body})
    cycle.disconnected = True  # the route then sees that the client has left
    cycle.message_event.set()
