"""Routing of HTTP requests, with a retry on the stable route if a canary fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response

from modelops.serving.api import ApiError, ImagesRequest, ImagesResponse
from modelops.serving.http.answers import in_pool, wait_for_images
from modelops.serving.http.keys import ANONYMOUS, Caller
from modelops.serving.http.streaming import ImageStream, event_text
from modelops.serving.rollout.rollout import Rollout
from modelops.serving.rollout.routes import Route

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from modelops.serving.telemetry.tracing import RequestTrace

log = logging.getLogger("modelops.serving")

T = TypeVar("T")
Held = Callable[[], AbstractAsyncContextManager[None]]


class AppState(State):
    """State with `rollout` and its stable node as `node`; setting a node makes a rollout of one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "node":
            name, value = "rollout", None if value is None else Rollout(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "node":
            rollout = super().__getattr__("rollout")
            return None if rollout is None else rollout.stable
        return super().__getattr__(name)


async def through_routes(
    rollout: Rollout,
    request: ImagesRequest,
    caller: Caller,
    trace: RequestTrace,
    attempt: Callable[[Route], Awaitable[T]],
    *,
    begun: Callable[[], bool] = lambda: False,
) -> T:
    """Run `attempt` on the request's route, or on the stable one when a canary failed it.

    Args:
        begun: whether the client has seen part of the answer, so that no retry is possible.

    Raises:
        ApiError: what the last attempt raised, or 404 for a model that is neither.
    """
    key = "" if caller is ANONYMOUS else caller.name
    rescue = False
    while True:
        route: Route | None = None
        try:
            with rollout.route(request, key=key, rescue=rescue) as route:
                trace.fields["release"] = f"{route.node.model_id}@{route.node.release.version}"
                return await attempt(route)
        except Exception as error:
            if route is None or rescue or begun() or not route.may_be_rescued(error):
                raise
            log.warning("a canary failed a request, the stable release makes it: %s", error)
            trace.fields["rescued"] = rescue = True


async def make_images(
    route: Route, request: Request, trace: RequestTrace, held: Held
) -> ImagesResponse | None:
    """Make the images of a request on its route; None when the client left."""
    async with held():
        ticket = await asyncio.to_thread(route.node.submit, route.request, trace)
        try:
            images = await wait_for_images(ticket, request)
        finally:
            ticket.cancel()  # nothing to a finished one; stops the work of a client that left
        if images is None:
            return None
        answer = await in_pool(route.node.finishers, route.node.finish, ticket, images)
    route.answered = True
    return answer


class _UnsaidError(Exception):
    """A stream failed, and the client has not been told yet."""


class RoutedStream(Response):
    """`ImageStream` on the request's route; before its first event a failed canary is retried.

    Keep-alive comments are no events: a client that waits for a canary that hangs has seen some.
    """

    def __init__(
        self,
        rollout: Rollout,
        request: ImagesRequest,
        caller: Caller,
        trace: RequestTrace,
        *,
        turns: asyncio.Semaphore,
        held: Held,
    ) -> None:
        super().__init__()
        self._rollout = rollout
        self._request = request
        self._caller = caller
        self._trace = trace
        self._turns = turns
        self._held = held
        self._started = self._said = False  # headers, and an event, were sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await through_routes(
                self._rollout, self._request, self._caller, self._trace,
                lambda route: self._attempt(route, scope, receive, send),
                begun=lambda: self._said,
            )  # fmt: skip
        except ApiError as error:
            if not self._started:
                raise
            self._rollout.stable.metrics.on_error(error.code)
            self._trace.fields["code"] = error.code
            text = event_text("error", {"type": "error", **error.body})
            await send({"type": "http.response.body", "body": text.encode(), "more_body": False})

    async def _attempt(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        failed: BaseException | None = None

        @contextlib.asynccontextmanager
        async def held() -> AsyncIterator[None]:
            nonlocal failed
            try:
                async with self._held():
                    yield
            except BaseException as error:
                failed = error
                route.note(error)  # once it has begun, the stream keeps errors to itself
                raise

        async def watch(message: Any) -> None:
            if message["type"] == "http.response.start":
                if self._started:
                    return
                self._started = True
            elif message.get("body", b"").startswith(b"event: "):
                if failed is not None and not self._said and route.may_be_rescued(failed):
                    raise _UnsaidError
                self._said = True
            await send(message)

        stream = ImageStream(
            route.node, route.request, self._trace, turns=self._turns, held=held
        )  # fmt: skip
        try:
            await stream(scope, receive, watch)
        except _UnsaidError:
            assert failed is not None
            self._trace.fields.pop("code", None)
            raise failed from None
        route.answered = self._trace.fields.get("stream") == "completed"
