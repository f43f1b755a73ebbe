"""A request through a fleet, over HTTP: on its lane, and on the stable one if a canary fails it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response

from modelops.serving.http.answers import wait_for_images
from modelops.serving.http.keys import ANONYMOUS, Caller
from modelops.serving.http.schema import ImagesRequest, ImagesResponse
from modelops.serving.http.streaming import ImageStream
from modelops.serving.swap.fleet import Fleet
from modelops.serving.swap.lanes import Lane

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from modelops.serving.telemetry.tracing import RequestTrace

log = logging.getLogger("modelops.serving")

T = TypeVar("T")
Held = Callable[[], AbstractContextManager[None]]


class AppState(State):
    """`fleet`, and as `node` its stable node; a node that is set becomes a fleet of one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "node":
            name, value = "fleet", None if value is None else Fleet(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "node":
            fleet = super().__getattr__("fleet")
            return None if fleet is None else fleet.stable
        return super().__getattr__(name)


async def through_lanes(
    fleet: Fleet,
    request: ImagesRequest,
    caller: Caller,
    trace: RequestTrace,
    attempt: Callable[[Lane], Awaitable[T]],
    *,
    begun: Callable[[], bool] = lambda: False,
) -> T:
    """What `attempt` returns on the request's lane, or on the stable one when a canary failed it.

    Args:
        begun: whether the client has seen something already, so that nothing can be made again.

    Raises:
        ApiError: what the last attempt raised, or 404 for a model that is neither.
    """
    key = "" if caller is ANONYMOUS else caller.name
    rescue = False
    while True:
        lane: Lane | None = None
        try:
            with fleet.lane(request, identity=trace.id, key=key, rescue=rescue) as lane:
                trace.fields["release"] = f"{lane.node.model_id}@{lane.node.release.version}"
                return await attempt(lane)
        except Exception as error:
            if lane is None or rescue or begun() or not lane.may_be_rescued(error):
                raise
            log.warning("a canary failed a request, the stable release makes it: %s", error)
            trace.fields["rescued"] = rescue = True


async def make_images(
    lane: Lane, request: Request, trace: RequestTrace, held: Held
) -> ImagesResponse | None:
    """The images of a request on its lane; None when the client left."""
    with held():
        ticket = await asyncio.to_thread(lane.node.submit, lane.request, trace)
        try:
            images = await wait_for_images(ticket, request)
        finally:
            ticket.cancel()  # nothing to a finished one; stops the work of a client that left
        if images is None:
            return None
        answer = await in_pool(lane.node.finishers, lane.node.finish, ticket, images)
    lane.answered = True
    return answer


async def in_pool(pool: Executor, function: Callable[..., T], *arguments: Any) -> T:
    """`asyncio.to_thread` in a pool of its own: what waits there keeps nobody else waiting."""
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(pool, partial(context.run, function, *arguments))


class RoutedStream(Response):
    """An `ImageStream` on the request's lane; before its first event a canary can be rescued."""

    def __init__(
        self,
        fleet: Fleet,
        request: ImagesRequest,
        caller: Caller,
        trace: RequestTrace,
        *,
        turns: asyncio.Semaphore,
        held: Held,
    ) -> None:
        super().__init__()
        self._fleet = fleet
        self._request = request
        self._caller = caller
        self._trace = trace
        self._turns = turns
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watch(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        async def attempt(lane: Lane) -> None:
            @contextlib.contextmanager
            def held() -> Iterator[None]:
                try:
                    with self._held():
                        yield
                except BaseException as error:
                    lane.note(error)  # once it has begun, the stream keeps errors to itself
                    raise

            stream = ImageStream(lane.node, lane.request, self._trace, turns=self._turns, held=held)
            await stream(scope, receive, watch)
            lane.answered = self._trace.fields.get("stream") == "completed"

        await through_lanes(
            self._fleet, self._request, self._caller, self._trace, attempt, begun=lambda: begun
        )
