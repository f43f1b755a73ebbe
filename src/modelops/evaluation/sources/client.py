"""HTTP client for a service that nobody need trust: bounded answers, and a key kept from others."""

from __future__ import annotations

import ipaddress
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from modelops.base.errors import EvaluationError, UsageError
from modelops.base.files import parse_json

KEY_VARIABLE = "MODELOPS_API_KEY"
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of a service: HTTP status, headers, and its body without any compression."""

    status: int
    headers: Any
    body: bytes

    def json(self) -> dict[str, Any]:
        """Parse the body.

        Raises:
            EvaluationError: it is not a JSON object.
        """
        try:
            found = parse_json(self.body.decode("utf-8"), source="the service's answer")
        except UnicodeDecodeError as error:
            raise EvaluationError("the service's answer is not JSON") from error
        except UsageError as error:
            raise EvaluationError(error.message) from error
        if not isinstance(found, dict):
            raise EvaluationError("the service's answer is not a JSON object")
        return found


class ServiceClient:
    """Client for one service; several threads may use it.

    A key goes to https and to this machine alone, through no proxy, and no redirect is followed.

    Args:
        base: URL.
        timeout_s: for the whole answer to one request.
        api_key: sent as a bearer token; read from MODELOPS_API_KEY when not given.
        with_key: false for another place than the service, which gets no key.

    Raises:
        UsageError: no URL of a service, or one that no key may be sent to.
    """

    def __init__(
        self, base: str, *, timeout_s: float, api_key: str | None = None, with_key: bool = True
    ) -> None:
        import httpx

        try:
            parts = urlsplit(base)
            local = is_loopback(parts.hostname or "")
            _ = parts.port  # read only now
        except ValueError as error:
            raise UsageError(f"{base}: not a URL: {error}") from error
        if not parts.hostname:
            raise UsageError(f"{base}: a URL without a host")
        if parts.username is not None or parts.password is not None:
            raise UsageError(
                f"{parts.hostname}: a URL with a name or password, which records would show",
                hint=f"set {KEY_VARIABLE}",
            )
        key = (api_key or os.environ.get(KEY_VARIABLE)) if with_key else None
        if key and parts.scheme != "https" and not local:
            raise UsageError(
                f"{base}: {KEY_VARIABLE} is not sent over plain http, where others can read it",
                hint=f"use https, or unset {KEY_VARIABLE}",
            )
        if key and not key.isascii():
            raise UsageError(f"{KEY_VARIABLE}: not an API key: it has characters beyond ASCII")
        headers = {"Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.base, self.timeout_s = base, timeout_s
        self._client = httpx.Client(
            timeout=timeout_s, headers=headers, follow_redirects=False,
            trust_env=not key and not local,
        )  # fmt: skip

    def get(self, url: str, *, limit: int, timeout_s: float | None = None) -> Answer:
        """Get a page of at most `limit` bytes; see `post`."""
        return self._ask("GET", url, limit, timeout_s or self.timeout_s)

    def post(self, url: str, body: dict[str, Any], *, limit: int) -> Answer:
        """Post JSON.

        Raises:
            EvaluationError: the answer has more than `limit` bytes, or an unknown compression.
            httpx.HTTPError: the service cannot be reached, or does not answer in time.
        """
        return self._ask("POST", url, limit, self.timeout_s, json=body)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, method: str, url: str, limit: int, timeout_s: float, **more: Any) -> Answer:
        import httpx

        end = time.monotonic() + timeout_s
        body = bytearray()
        with self._client.stream(method, url, timeout=timeout_s, **more) as answer:
            for piece in _decoded(answer):
                body += piece
                if len(body) > limit:
                    raise EvaluationError(f"{self.base}: an answer of more than {limit:,} bytes")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the answer took too long")
        return Answer(answer.status_code, answer.headers, bytes(body))


def is_loopback(host: str) -> bool:
    """Return whether a URL's host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _decoded(answer: Any) -> Iterator[bytes]:
    """Yield the pieces of an answer, each small, whatever it unpacks to."""
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        yield from answer.iter_raw(_PIECE)
        return
    if encoding not in ("gzip", "deflate"):
        raise EvaluationError(f"an answer packed as {encoding}, though none was asked for")
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # of gzip or zlib
    for raw in answer.iter_raw(_PIECE):
        waiting = raw
        while waiting:
            try:
                yield unpacking.decompress(waiting, _PIECE)
            except zlib.error as error:
                raise EvaluationError("an answer whose packing is broken") from error
            waiting = unpacking.unconsumed_tail
