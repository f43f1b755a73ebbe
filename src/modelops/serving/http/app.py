"""HTTP around a node: the OpenAI Images API, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware

from modelops import __version__
from modelops.serving.api import ApiError, ImagesRequest, ImagesResponse, parse_request
from modelops.serving.http.access import Access
from modelops.serving.http.admin import add_admin_routes
from modelops.serving.http.answers import check_key, error_response, read_body
from modelops.serving.http.limits import Work
from modelops.serving.http.observe import ROUTES, Observe, note_request
from modelops.serving.http.openapi import (
    ANSWER_HEADERS,
    IGNORED_HEADER,
    LIMIT_HEADER,
    REMAINING_HEADER,
    describe,
)
from modelops.serving.http.page import add_page
from modelops.serving.http.routing import AppState, RoutedStream, make_images, through_routes
from modelops.serving.http.sites import SiteRules
from modelops.serving.http.streaming import MEDIA_TYPE as EVENTS
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.logs import PROMPTS
from modelops.serving.telemetry.metrics import CONTENT_TYPE
from modelops.serving.telemetry.tracing import SCOPE_KEY, RequestTrace

if TYPE_CHECKING:
    from modelops.serving.http.peers import Peers
    from modelops.serving.node.node import InferenceNode
    from modelops.serving.rollout.rollout import Rollout
    from modelops.serving.rollout.routes import Route

log = logging.getLogger("modelops.serving")


def create_app(
    node: InferenceNode | None = None,
    *,
    rollout: Rollout | None = None,
    settings: NodeSettings | None = None,
) -> FastAPI:
    """Make the FastAPI application of a node.

    Args:
        node: may also be set later as `app.state.node`; until then everything answers 503.
        rollout: in place of a single node; may also be set later as `app.state.rollout`.
        settings: of the keys, limits, origins and page; otherwise those of the environment.

    Raises:
        UsageError: the environment or the file of keys cannot be used.
    """
    settings = settings or NodeSettings.from_environment()
    app = FastAPI(
        title="modelops inference node",
        version=__version__,
        description="OpenAI Images API for one release, with seeds and receipts.",
        docs_url=None,
        redoc_url=None,
        **_without_own_telemetry(),
    )
    app.state = AppState({"rollout": rollout})
    if node is not None:
        app.state.node = node
    app.state.access = Access.from_settings(settings)
    app.state.preview_turns = asyncio.Semaphore(1)
    app.state.peers = None  # the other workers, where there are any
    origins = settings.allowed_origins
    app.add_middleware(SiteRules, application=app, origins=origins)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"], expose_headers=ANSWER_HEADERS,
        )  # fmt: skip
    app.add_middleware(Observe, application=app)

    _add_errors(app)
    _add_images(app)
    _add_health(app)
    add_admin_routes(app)
    add_page(app, shown=settings.page)

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

    describe(app)
    return app


def _add_errors(app: FastAPI) -> None:
    """Answer failures before or in a route in OpenAI's shape."""

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


def _add_images(app: FastAPI) -> None:
    """Add OpenAI's routes: images, and the models that make them."""

    @app.post(
        "/v1/images/generations",
        response_model=ImagesResponse,
        responses={200: {"content": {EVENTS: {"schema": {"type": "string"}}}}},
        summary="Make images; with `stream`, one image as server-sent events",
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
        steps = served.defaults.steps
        assert steps is not None  # the engine filled it in
        if ignored := wanted.ignored:
            trace.answer_headers[IGNORED_HEADER] = ", ".join(ignored)
        try:
            charge = await access.take(
                caller, Work(images=wanted.n or 1, steps=wanted.steps or steps, own_steps=steps)
            )
        except ApiError as error:
            if error.status == 429:
                served.metrics.on_rejected("rate_limit")
            raise

        if charge.rate is not None:
            trace.answer_headers |= {
                LIMIT_HEADER: f"{charge.rate.limit:.0f}",
                REMAINING_HEADER: f"{math.floor(charge.rate.remaining)}",
            }

        @contextlib.asynccontextmanager
        async def held() -> AsyncIterator[None]:
            async with charge.attempt():
                with PROMPTS.in_hand(wanted.prompt, wanted.negative_prompt):
                    yield

        if wanted.stream:
            turns: asyncio.Semaphore = app.state.preview_turns
            return RoutedStream(app.state.rollout, wanted, caller, trace, turns=turns, held=held)

        async def attempt(route: Route) -> ImagesResponse | None:
            return await make_images(route, request, trace, held)

        answer = await through_routes(app.state.rollout, wanted, caller, trace, attempt)
        if answer is None:
            return Response(status_code=499)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/v1/models", summary="The model that is served, and a canary beside it")
    async def models(request: Request) -> JSONResponse:
        check_key(app, request)
        _node(app)
        rollout: Rollout = app.state.rollout
        entries = [
            {"id": name, **_model_entry(role, node)} for name, role, node in rollout.models()
        ]
        return JSONResponse({"object": "list", "data": entries})

    @app.get("/v1/models/{name}", summary="One of these models")
    async def model(request: Request, name: str) -> JSONResponse:
        check_key(app, request)
        _node(app)
        rollout: Rollout = app.state.rollout
        for known, role, node in rollout.models():
            if known == name:
                return JSONResponse({"id": known, **_model_entry(role, node)})
        raise ApiError(
            404, "model_not_found", f"this server has no model {name[:100]!r}; see /v1/models",
            param="model",
        )  # fmt: skip


def _add_health(app: FastAPI) -> None:
    """Add probes and metrics; they need no key, and answer for all workers."""

    @app.get("/livez", summary="Whether the process should go on")
    async def livez() -> Response:
        alive = app.state.node is not None and app.state.node.alive()
        peers: Peers | None = app.state.peers
        if alive and peers is not None:
            alive = await peers.alive()
        return PlainTextResponse("ok\n" if alive else "dead\n", status_code=200 if alive else 503)

    @app.get("/readyz", summary="Whether requests should be sent here")
    async def readyz() -> Response:
        served = app.state.node
        problems = ["starting"] if served is None else await asyncio.to_thread(served.readiness)
        peers: Peers | None = app.state.peers
        if peers is not None:
            problems = problems + await peers.problems()
        body: dict[str, Any] = {"ready": not problems, "problems": problems}
        if served is not None and served.golden is not None:
            body["golden_pixels_sha256"] = served.golden.pixels_sha256
            body["golden_mean_difference"] = served.golden.mean_difference
        return JSONResponse(body, status_code=503 if problems else 200)

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        peers: Peers | None = app.state.peers
        _node(app)
        text = app.state.rollout.text() if peers is None else await peers.exposition()
        return Response(text, media_type=CONTENT_TYPE)


def _without_own_telemetry() -> dict[str, Any]:
    """Turn off newer FastAPI's own spans and log records, which may quote a request's body."""
    if "telemetry" not in inspect.signature(FastAPI.__init__).parameters:
        return {}
    return {"telemetry": {"tracing": False, "logs": False, "operation_spans": False}}


def _model_entry(role: str, node: InferenceNode) -> dict[str, Any]:
    return {
        "object": "model",
        "created": int(node.release.started_at.timestamp()),
        "owned_by": "modelops",
        "x_modelops": {
            "version": node.release.version,
            "role": role,
            "release_sha256": node.release_sha256,
            "model_sha256": node.opened.sha256,
            "fallback": node.opened.fallback or None,  # why the release's model is not served
            "size": node.size,
            "runtime": node.runtime,
            "precision": node.opened.source.precision,
            "processor": node.opened.source.details.get("processor"),
            "error": node.opened.source.details.get("error"),  # relative, beside torch
            "steps": node.defaults.steps,
            "guidance": node.defaults.guidance,
            "batches": None if node.opened.fallback else node.release.defaults.get("company"),
            "signing": node.sealer.about,
        },
    }


def _node(app: FastAPI) -> InferenceNode:
    if app.state.node is None:
        raise ApiError(503, "not_ready", "the server is starting", retry_after_s=5)
    node: InferenceNode = app.state.node
    return node
