"""HTTP around a node: the OpenAI Images API, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from modelops import __version__
from modelops.serving.access import Access
from modelops.serving.failures import CancelledError, DeadlineError
from modelops.serving.logs import PROMPTS
from modelops.serving.metrics import CONTENT_TYPE
from modelops.serving.schema import ApiError, ImagesRequest, ImagesResponse, parse_request
from modelops.serving.tracing import SCOPE_KEY, RequestTrace, request_id

if TYPE_CHECKING:
    from modelops.serving.keys import Caller
    from modelops.serving.node import InferenceNode, Ticket

log = logging.getLogger("modelops.serving")

MAX_BODY_BYTES = 64 * 1024
_LOGGED = ("n", "size", "output_format", "steps", "guidance", "seed")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ROUTES = ("/v1/images/generations", "/v1/models", "/livez", "/readyz", "/metrics", "/openapi.json")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def create_app(node: InferenceNode | None = None) -> FastAPI:
    """The FastAPI application of a node.

    Args:
        node: may also be set later as `app.state.node`; until then everything answers 503.
    """
    app = FastAPI(
        title="modelops inference node",
        version=__version__,
        description="OpenAI Images API for one release, with seeds and receipts.",
        docs_url=None,
        redoc_url=None,
        **_without_own_telemetry(),
    )
    app.state.node = node
    app.state.access = Access.from_environment(os.environ)
    app.add_middleware(_Observe, application=app)

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        request.scope[SCOPE_KEY].fields["code"] = error.code
        return error_response(app, error)

    @app.exception_handler(404)
    async def _not_found(request: Request, error: Exception) -> JSONResponse:
        return error_response(app, ApiError(404, "not_found", "there is no such route"))

    @app.exception_handler(405)
    async def _not_allowed(request: Request, error: Exception) -> JSONResponse:
        return error_response(app, ApiError(405, "method_not_allowed", "use another HTTP method"))

    @app.post(
        "/v1/images/generations",
        response_model=ImagesResponse,
        summary="Make images",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": ImagesRequest.model_json_schema()}},
            }
        },
    )
    async def generate(request: Request) -> Response:
        caller = check_key(app, request)
        body = await read_body(request)
        served = _node(app)
        wanted = parse_request(body)
        trace: RequestTrace = request.scope[SCOPE_KEY]
        note_request(trace, wanted)
        trace.fields["key"] = caller.name
        access: Access = app.state.access
        images_wanted = wanted.n or 1
        try:
            access.take(caller, images_wanted)
        except ApiError as error:
            if error.status == 429:
                served.metrics.on_rejected("rate_limit")
            raise
        texts = (wanted.prompt, wanted.negative_prompt)
        with access.refunding(caller, images_wanted), PROMPTS.in_hand(*texts):
            ticket = await asyncio.to_thread(served.submit, wanted, trace)
            try:
                images = await _wait(ticket, request)
            finally:
                ticket.cancel()  # nothing to a finished one; stops the work of a client that left
            if images is None:
                return Response(status_code=499)
            answer = await asyncio.to_thread(served.finish, ticket, images)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/v1/models", summary="The model that is served")
    async def models(request: Request) -> JSONResponse:
        check_key(app, request)
        served = _node(app)
        created = int(served.release.started_at.timestamp())
        entry = {
            "id": served.model_id,
            "object": "model",
            "created": created,
            "owned_by": "modelops",
            "x_modelops": {
                "version": served.release.version,
                "release_sha256": served.release_sha256,
                "model_sha256": served.release.model_sha256,
                "size": f"{served.resolution}x{served.resolution}",
                "runtime": served.runtime,
                "steps": served.defaults.steps,
                "guidance": served.defaults.guidance,
                "signing": served.sealer.about,
            },
        }
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/livez", summary="Whether the process should go on")
    async def livez() -> Response:
        alive = app.state.node is not None and app.state.node.alive()
        return PlainTextResponse("ok\n" if alive else "dead\n", status_code=200 if alive else 503)

    @app.get("/readyz", summary="Whether requests should be sent here")
    async def readyz() -> Response:
        served = app.state.node
        problems = ["starting"] if served is None else await asyncio.to_thread(served.readiness)
        body: dict[str, Any] = {"ready": not problems, "problems": problems}
        if served is not None and served.golden is not None:
            body["golden_pixels_sha256"] = served.golden.pixels_sha256
            body["golden_mean_difference"] = served.golden.mean_difference
        return JSONResponse(body, status_code=503 if problems else 200)

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(_node(app).metrics.text(), media_type=CONTENT_TYPE)

    # Inside BentoML's router an unmatched path would get its answer, not ours.
    @app.api_route(
        "/{path:path}",
        methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        include_in_schema=False,
    )
    async def unknown(path: str) -> Response:
        if f"/{path}" in ROUTES:
            raise ApiError(405, "method_not_allowed", "use another HTTP method")
        raise ApiError(404, "not_found", "there is no such route")

    return app


async def _wait(ticket: Ticket, request: Request) -> list[Any] | None:
    """The ticket's images, or None when the client left first."""
    work = asyncio.gather(*(asyncio.wrap_future(job.future) for job in ticket.jobs))
    left = asyncio.ensure_future(_disconnected(request.receive))
    first: set[asyncio.Future[Any]] = {work, left}
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return None
        try:
            return work.result()
        except Exception as error:
            raise failure_to_api_error(error) from error
    finally:
        left.cancel()
        if not work.done():
            ticket.cancel()
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await left


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413 when it is longer than MAX_BODY_BYTES, 415 when it is no JSON by its type.
    """
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "unsupported_media_type", "send the body as application/json")
    too_large = ApiError(413, "body_too_large", f"the body is over {MAX_BODY_BYTES} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


def check_key(app: FastAPI, request: Request) -> Caller:
    """Who asks; raises ApiError (401, 403 or 503) unless it may."""
    access: Access = app.state.access
    server: tuple[str, int | None] | None = request.scope.get("server")
    authorization = request.headers.get("authorization", "")
    return access.identify(authorization, server[0] if server else None)


def error_response(app: FastAPI, error: ApiError) -> JSONResponse:
    """An error in OpenAI's shape; counts it."""
    if app.state.node is not None:
        app.state.node.metrics.on_error(error.code)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        # OpenAI's client reads this one first: whole seconds are coarse for a small model.
        headers["Retry-After-Ms"] = str(max(1, math.ceil(1000 * error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def failure_to_api_error(error: BaseException) -> ApiError:
    """What a client is told when its work ended without an image."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DeadlineError):
        return ApiError(503, "deadline_exceeded", str(error), retry_after_s=5)
    if isinstance(error, CancelledError):
        return ApiError(503, "cancelled", "the server is shutting down", retry_after_s=5)
    return ApiError(500, "generation_failed", "the image could not be made")


def _without_own_telemetry() -> dict[str, Any]:
    """Newer FastAPI makes spans and log records of its own, which may quote a request's body."""
    if "telemetry" not in inspect.signature(FastAPI.__init__).parameters:
        return {}
    return {"telemetry": {"tracing": False, "logs": False, "operation_spans": False}}


def note_request(trace: RequestTrace, request: ImagesRequest) -> None:
    """What the log line says of a request. Its texts are kept apart from the rest."""
    asked = request.model_dump(exclude_none=True, include=set(_LOGGED))
    trace.fields |= asked
    trace.prompts["prompt"] = request.prompt
    if request.negative_prompt:
        trace.prompts["negative_prompt"] = request.negative_prompt


def _node(app: FastAPI) -> InferenceNode:
    if app.state.node is None:
        raise ApiError(503, "not_ready", "the server is starting", retry_after_s=5)
    node: InferenceNode = app.state.node
    return node


class _Observe:
    """Counts, logs and traces answers, and turns an unforeseen error into OpenAI's shape.

    Pure ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnect from the route.
    """

    def __init__(self, app: App, application: FastAPI) -> None:
        self.app = app
        self.application = application

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0
        headers = {name.decode("latin-1"): text.decode("latin-1")
                   for name, text in scope["headers"]}  # fmt: skip
        trace = RequestTrace(request_id(headers.get("x-request-id")), headers=headers)
        scope[SCOPE_KEY] = trace
        route = scope["path"] if scope["path"] in ROUTES else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", trace.id.encode("ascii")),
                ]
            await send(message)

        try:
            with trace.current(f"{method} {route}"):
                await self.app(scope, receive, watch)
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
            if route.startswith("/v1/") or route == "other":
                trace.finish(method, route, status or 499)
