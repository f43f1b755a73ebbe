"""Metrics, access log and traces of each answer."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelops.serving.api import ApiError, ImagesRequest
from modelops.serving.http.admin import ADMIN_ROUTES
from modelops.serving.http.answers import error_response
from modelops.serving.telemetry.tracing import SCOPE_KEY, RequestTrace, request_id

log = logging.getLogger("modelops.serving")

_LOGGED = ("n", "size", "output_format", "steps", "guidance", "seed")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MODEL_ROUTE = "/v1/models/{name}"
ROUTES = (
    "/", "/v1/images/generations", "/v1/models", "/livez", "/readyz", "/metrics", "/openapi.json",
    *ADMIN_ROUTES,
)  # fmt: skip


def note_request(trace: RequestTrace, request: ImagesRequest) -> None:
    """Add a request to its log line. Its texts are kept apart from the rest."""
    asked = request.model_dump(exclude_none=True, include=set(_LOGGED))
    trace.fields |= asked
    trace.prompts["prompt"] = request.prompt
    if request.negative_prompt:
        trace.prompts["negative_prompt"] = request.negative_prompt


class Observe:
    """Middleware that counts, logs and traces answers; puts unexpected errors into OpenAI's shape.

    Pure ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnect from the route.
    """

    def __init__(self, app: ASGIApp, application: FastAPI) -> None:
        self.app = app
        self.application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0
        headers = {name.decode("latin-1"): text.decode("latin-1")
                   for name, text in scope["headers"]}  # fmt: skip
        trace = RequestTrace(request_id(headers.get("x-request-id")), headers=headers)
        scope[SCOPE_KEY] = trace
        route = scope["path"] if scope["path"] in ROUTES else "other"
        if scope["path"].startswith(MODEL_ROUTE.partition("{")[0]):
            route = MODEL_ROUTE
        method = scope["method"] if scope["method"] in METHODS else "other"

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", trace.id.encode("ascii")),
                    *(
                        (name.lower().encode("ascii"), text.encode("ascii"))
                        for name, text in trace.answer_headers.items()
                    ),
                    *_allow(self.application, scope, status),
                ]
            await send(message)

        try:
            with trace.current(f"{method} {route}"):
                if {"content-length", "transfer-encoding"} <= headers.keys():
                    # A proxy that reads the other one would see another request behind this one.
                    raise ApiError(400, "ambiguous_length", "one length of the body, not two")
                await self.app(scope, receive, watch)
        except ApiError as error:
            trace.fields["code"] = error.code
            await error_response(self.application, error)(scope, receive, watch)
        except ClientDisconnect:  # while it sent its body; BentoML waits for an answer all the same
            if not status:
                await Response(status_code=499)(scope, receive, watch)
        except Exception:
            log.exception("unforeseen error")
            trace.fields["code"] = "internal_error"
            if status:
                raise
            failure = error_response(
                self.application, ApiError(500, "internal_error", "something went wrong here")
            )
            await failure(scope, receive, watch)
        finally:
            node = self.application.state.node
            if node is not None:
                node.metrics.on_request(route, status or 499)
            if route.startswith(("/v1/", "/admin/")) or route == "other":
                trace.finish(method, route, status or 499)


def _allow(application: FastAPI, scope: Scope, status: int) -> list[tuple[bytes, bytes]]:
    """Return the Allow header that RFC 9110 requires with a 405."""
    if status != 405:
        return []
    methods = {
        method
        for route in application.routes
        if getattr(route, "path", None) == scope["path"]
        for method in getattr(route, "methods", None) or ()
    }
    return [(b"allow", ", ".join(sorted(methods)).encode("ascii"))]
