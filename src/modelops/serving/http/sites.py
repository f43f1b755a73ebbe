"""Rules for browsers: a page of another site must not use a node, nor read what it answers.

A node without API keys answers whoever reaches its loopback address, and every page in a browser of
that machine does. So its name must be a loopback name (a foreign name may be made to lead there),
requests that say which site they come from must come from its own, and none may have come through
a proxy, which would open the node to whoever reaches that. Keys are sent on purpose only, so a node
with keys needs no such rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from modelops.serving.api import ApiError
from modelops.serving.http.access import is_loopback
from modelops.serving.http.answers import error_response

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/healthz", "/readyz", "/livez")  # a probe of the platform names the node as it likes
_LOCAL = re.compile(r"(127\.[0-9.]+|localhost|\[::1\])(:[0-9]+)?", re.IGNORECASE)
_FORWARDED = frozenset({  # besides X-Forwarded-...
    b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip", b"true-client-ip",
    b"cf-connecting-ip", b"fastly-client-ip", b"x-original-forwarded-for",
    b"x-envoy-external-address",
})  # fmt: skip
_FOREIGN_PAGE = ApiError(403, "cross_origin_request", "this server answers no page of another site")


class SiteRules:
    """ASGI middleware that refuses what a foreign page may have sent to a node without keys."""

    def __init__(self, app: ASGIApp, *, application: FastAPI, origins: tuple[str, ...]) -> None:
        self.app, self.application, self.origins = app, application, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            access: Any = self.application.state.access
            server = scope.get("server")  # an open address is refused for want of keys, see access
            here = is_loopback(server[0] if server else None)
            if here and not access.keys.required and not access.insecure:
                refusal = _refusal(dict(scope["headers"]), self.origins)
                if refusal is not None:
                    await error_response(self.application, refusal)(scope, receive, send)
                    return
        await self.app(scope, receive, send)


def _refusal(headers: Mapping[bytes, bytes], origins: tuple[str, ...]) -> ApiError | None:
    host = headers.get(b"host", b"").decode("latin-1")
    if any(name in _FORWARDED or name.startswith(b"x-forwarded") for name in headers):
        return ApiError(
            403, "api_keys_not_configured",
            "this server has no API keys and answers no request that came through a proxy",
        )  # fmt: skip
    if not _LOCAL.fullmatch(host):
        return ApiError(
            421, "misdirected_request",
            "this server has no API keys and answers to localhost and 127.0.0.1 only",
        )  # fmt: skip
    origin = headers.get(b"origin")
    if origin is not None:
        said = origin.decode("latin-1")
        if urlsplit(said).netloc != host and said not in origins:
            return _FOREIGN_PAGE
    elif (
        headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
        and headers.get(b"sec-fetch-mode") != b"navigate"  # a link that leads here is fine
    ):
        return _FOREIGN_PAGE
    return None
