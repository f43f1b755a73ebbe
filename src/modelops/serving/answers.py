"""A request in, an answer out: bodies, keys, errors in OpenAI's shape, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from modelops.serving.failures import CancelledError, DeadlineError
from modelops.serving.schema import ApiError

if TYPE_CHECKING:
    from starlette.types import Receive

    from modelops.serving.access import Access
    from modelops.serving.keys import Caller
    from modelops.serving.node import Ticket

MAX_BODY_BYTES = 64 * 1024


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


async def wait_for_images(ticket: Ticket, request: Request) -> list[Any] | None:
    """The ticket's images, or None when the client left first."""
    work = asyncio.gather(*(asyncio.wrap_future(job.future) for job in ticket.jobs))
    left = asyncio.ensure_future(disconnected(request.receive))
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


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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
