"""Requests and answers over HTTP: bodies, keys, errors in OpenAI's shape, clients that leave."""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from modelops.serving.api import ApiError, failure_to_api_error
from modelops.serving.failures import DeadlineError
from modelops.serving.http.connections import LIMITS

if TYPE_CHECKING:
    from starlette.types import Receive

    from modelops.serving.engine.jobs import Job
    from modelops.serving.http.access import Access
    from modelops.serving.http.keys import Caller
    from modelops.serving.node.answers import Ticket

T = TypeVar("T")

MAX_BODY_BYTES = 64 * 1024
SKIPPED_BYTES = 1024 * 1024  # of a body that is refused; a client that is cut off sees no answer
SKIPPED_S = 2.0  # seconds that the rest of such a body is waited for
CLOSING = ("ambiguous_length", "body_timeout", "body_too_large", "unsupported_media_type")
ENGINE_GRACE_S = 5.0  # after a job's deadline, which an engine that hangs does not keep


async def read_body(request: Request) -> bytes:
    """Read the request's body.

    Raises:
        ApiError: 408 when it does not come in time, 413 when it is longer than MAX_BODY_BYTES, 415
            when its type is not JSON or it is compressed.
        ClientDisconnect: the client left.
    """
    body, refused = bytearray(), _refusal(request)
    skipped = 0
    try:
        async with asyncio.timeout(LIMITS.timeout_s if refused is None else SKIPPED_S) as limit:
            async for piece in request.stream():
                if refused is None and len(body) + len(piece) <= MAX_BODY_BYTES:
                    body += piece
                    continue
                if refused is None:
                    refused = _too_large()
                    limit.reschedule(asyncio.get_running_loop().time() + SKIPPED_S)
                skipped += len(piece)
                if skipped > SKIPPED_BYTES:
                    break
    except TimeoutError:
        late = f"the body did not come in {LIMITS.timeout_s:g} s"
        raise refused or ApiError(408, "body_timeout", late) from None
    if refused is not None:
        raise refused
    return bytes(body)


def _refusal(request: Request) -> ApiError | None:
    """Return the reason to refuse a body, by its headers; None if there is none."""
    kind, *parameters = request.headers.get("content-type", "").lower().split(";")
    charsets = [p.strip() for p in parameters if p.strip().startswith("charset=")]
    if kind.strip() != "application/json":
        return ApiError(415, "unsupported_media_type", "send the body as application/json")
    if any(entry.removeprefix("charset=").strip("'\" ") != "utf-8" for entry in charsets):
        return ApiError(415, "unsupported_media_type", "send the body in UTF-8")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        return ApiError(415, "unsupported_media_type", "send the body without Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit():
        digits = length.lstrip("0")
        if len(digits) > 18 or int(digits or "0") > MAX_BODY_BYTES:
            return _too_large()
    return None


def _too_large() -> ApiError:
    return ApiError(413, "body_too_large", f"the body is over {MAX_BODY_BYTES} bytes")


def check_key(app: FastAPI, request: Request) -> Caller:
    """Return the caller; raise ApiError (401, 403 or 503) unless it may ask."""
    access: Access = app.state.access
    server: tuple[str, int | None] | None = request.scope.get("server")
    authorization = request.headers.get("authorization", "")
    return access.identify(authorization, server[0] if server else None)


async def wait_for_images(ticket: Ticket, request: Request) -> list[Any] | None:
    """Return the ticket's images, or None when the client left first."""
    work = asyncio.gather(*(asyncio.wrap_future(job.future) for job in ticket.jobs))
    left = asyncio.ensure_future(disconnected(request.receive))
    first: set[asyncio.Future[Any]] = {work, left}
    try:
        limit = last_moment(ticket.jobs)
        await asyncio.wait(first, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if left.done() and not work.done():
            return None
        if not work.done():
            raise failure_to_api_error(DeadlineError("the engine does not answer"))
        try:
            return work.result()
        except Exception as error:
            raise failure_to_api_error(error) from error
    finally:
        left.cancel()
        if not work.done():
            ticket.cancel()
            work.cancel()
        await asyncio.gather(left, work, return_exceptions=True)


def last_moment(jobs: Sequence[Job]) -> float | None:
    """Return the seconds after which an engine with these jobs hangs; None without deadlines."""
    deadlines = [job.deadline for job in jobs if job.deadline is not None]
    return max(0.0, max(deadlines) - time.monotonic()) + ENGINE_GRACE_S if deadlines else None


async def in_pool(pool: Executor, function: Callable[..., T], *arguments: Any) -> T:
    """Run `asyncio.to_thread` in a separate pool, so that a wait there delays nothing else."""
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(pool, partial(context.run, function, *arguments))


async def disconnected(receive: Receive) -> None:
    """Return when the client has left. The rest of its body is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


def error_response(app: FastAPI, error: ApiError) -> JSONResponse:
    """Count an error and return it in OpenAI's shape."""
    if app.state.node is not None:
        app.state.node.metrics.on_error(error.code)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        # OpenAI's client reads this one first: whole seconds are coarse for a small model.
        headers["Retry-After-Ms"] = str(max(1, math.ceil(1000 * error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.code in CLOSING:
        headers["Connection"] = "close"  # what the client still sends would be taken for a request
    return JSONResponse(error.body, status_code=error.status, headers=headers)
