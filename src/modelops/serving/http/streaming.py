"""Server-sent events of one image, in the shapes of OpenAI's Images API: partial images, then it.

    engine thread ─▶ newest partial ─▶ image filter ─▶ mark ─▶ event ─▶ socket
                     (one place)

    event: image_generation.partial_image   b64_json, partial_image_index; marked, no receipt
    event: image_generation.completed       b64_json, usage, x_modelops (the signed receipt)
    event: error                            error, as in the body of an ordinary answer

The engine never waits for a reader: a partial image that nobody has fetched yet is replaced by the
next one, and is dropped when the image itself is ready, so a fast model may send fewer than were
asked for (as OpenAI's may). What fails before the first event is an ordinary HTTP status, but once
the request is let in, the answer begins with a comment after KEEP_ALIVE_S at the latest. A reader
that takes longer than `stream_write_timeout_s` for an event is dropped, and one that leaves stops
its work before the next step.

Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import math
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from starlette.responses import Response

from modelops.serving.api import ApiError, ImagesRequest, failure_to_api_error
from modelops.serving.engine.jobs import Job
from modelops.serving.failures import DeadlineError
from modelops.serving.http.answers import (
    disconnected,
    in_pool,
    last_moment,
)

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from modelops.serving.engine.jobs import EngineImage
    from modelops.serving.node.answers import Ticket
    from modelops.serving.node.node import InferenceNode
    from modelops.serving.telemetry.tracing import RequestTrace

log = logging.getLogger("modelops.serving")

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 5.0  # a comment line this often while there is nothing else to say
_STILL = ": still at it\n\n"
PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
HEADERS = (
    (b"content-type", f"{MEDIA_TYPE}; charset=utf-8".encode()),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
)


class SlowReaderError(Exception):
    """The reader of a stream did not take an event in time."""


class NewestPreview:
    """Slot for one preview between the engine's thread and an event loop; newer ones replace it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived = asyncio.Event()
        self._place: deque[tuple[int, npt.NDArray[np.uint8]]] = deque(maxlen=1)

    def put(self, job: Job, index: int, pixels: npt.NDArray[np.uint8]) -> None:
        """Leave a preview [H, W, 3]. Called by the engine's thread; returns at once."""
        self._place.append((index, pixels))
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def arrived(self) -> None:
        """Wait until there is one."""
        while not self._place:
            self._arrived.clear()
            if not self._place:
                await self._arrived.wait()

    def take(self) -> tuple[int, npt.NDArray[np.uint8]]:
        """Take (index, pixels) of the newest preview.

        Raises:
            IndexError: there is none.
        """
        return self._place.popleft()


class ImageStream(Response):
    """Answer with the events of one image; an ApiError before the first event is raised.

    Args:
        node: makes it.
        request: with `stream`, for one image.
        trace: of this HTTP request.
        turns: bounds the partial images that are filtered and encoded at once in this process, so
            that finished images never wait for them.
        held: context that is held until the stream has ended; it sees the final ApiError.
    """

    def __init__(
        self,
        node: InferenceNode,
        request: ImagesRequest,
        trace: RequestTrace,
        *,
        turns: asyncio.Semaphore,
        held: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        super().__init__()
        self.node = node
        self.request = request
        self.trace = trace
        self._turns = turns
        self._held = held
        self._begun = False
        self._limit_s = node.settings.stream_write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        previews = NewestPreview(asyncio.get_running_loop())
        outcome = "failed"
        try:
            async with self._held():
                ticket = await asyncio.to_thread(
                    self.node.submit, self.request, self.trace, on_preview=previews.put
                )
                try:
                    outcome = await self._unless_left(self._run(ticket, previews, send), receive)
                except ApiError as error:
                    blocked = error.code == "content_policy_violation"
                    outcome = "blocked" if blocked else "failed"
                    raise
                finally:
                    ticket.cancel()  # nothing to a finished one
                    self.node.metrics.on_stream(outcome)
        except ApiError as error:
            if not self._begun:
                raise
            self.node.metrics.on_error(error.code)
            self.trace.fields["code"] = error.code
            try:
                await self._write(send, event_text("error", {"type": "error", **error.body}))
                await self._end(send)
            except SlowReaderError:
                outcome = "slow_reader"
        self.trace.fields["stream"] = outcome
        if outcome == "slow_reader":
            await drop_connection(receive)
        elif (
            not self._begun
        ):  # the client has left, but BentoML would wait for an answer for minutes
            await Response(status_code=499)(scope, receive, send)

    async def _unless_left(self, work: Any, receive: Receive) -> str:
        """Run `work`, and end it when the client leaves. Return the stream's outcome."""
        left = asyncio.ensure_future(disconnected(receive))
        run = asyncio.ensure_future(work)
        both: set[asyncio.Future[Any]] = {left, run}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not run.done():
                return "client_left"
            run.result()
            return "completed"
        except SlowReaderError:
            return "slow_reader"
        except ApiError:
            raise
        except Exception as error:
            log.exception("unforeseen error in a stream")
            raise ApiError(500, "internal_error", "something went wrong here") from error
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _run(self, ticket: Ticket, previews: NewestPreview, send: Send) -> None:
        async with contextlib.aclosing(self._events(ticket, previews)) as events:
            async for text in events:
                await self._write(send, text)
        await self._end(send)

    async def _events(self, ticket: Ticket, previews: NewestPreview) -> AsyncGenerator[str, None]:
        """Yield the texts of a stream, keep-alive comments among them.

        Raises:
            ApiError: instead of the completed event.
        """
        image = asyncio.wrap_future(ticket.jobs[0].future)
        limit = last_moment(ticket.jobs)
        end = math.inf if limit is None else time.monotonic() + limit
        partial = asyncio.ensure_future(self._partial(ticket, previews))
        try:
            while True:
                either: set[asyncio.Future[Any]] = {image, partial}
                await asyncio.wait(
                    either, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
                )
                if image.done():
                    break
                if time.monotonic() > end:
                    raise failure_to_api_error(DeadlineError("the engine does not answer"))
                if not partial.done():
                    yield _STILL
                    continue
                text = partial.result()
                partial = asyncio.ensure_future(self._partial(ticket, previews))
                yield text
                self.node.metrics.partial_images.inc()
            try:
                finished = image.result()
            except Exception as error:
                raise failure_to_api_error(error) from error
        finally:
            partial.cancel()
            image.cancel()
            await asyncio.gather(partial, image, return_exceptions=True)
        async with contextlib.aclosing(self._finish(ticket, finished)) as texts:
            async for text in texts:
                yield text

    async def _partial(self, ticket: Ticket, previews: NewestPreview) -> str:
        """Make the event of the next partial image: the newest one when its turn comes."""
        await previews.arrived()
        async with self._turns:
            index, pixels = previews.take()
            file = await in_pool(self.node.finishers, self.node.preview, ticket, index, pixels)
        fields = {"b64_json": base64.b64encode(file).decode("ascii"), "partial_image_index": index}
        return event_text(PARTIAL, {**self._common(PARTIAL), **fields})

    async def _finish(self, ticket: Ticket, image: EngineImage) -> AsyncGenerator[str, None]:
        """Yield the last event, and comments while the image waits for its filter."""
        work = asyncio.ensure_future(in_pool(self.node.finishers, self._completed, ticket, image))
        try:
            while not (await asyncio.wait({work}, timeout=KEEP_ALIVE_S))[0]:
                yield _STILL
            yield work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def _completed(self, ticket: Ticket, image: EngineImage) -> str:
        """Make the event of the finished image."""
        answer = self.node.finish(ticket, [image])
        fields = {**answer.data[0].model_dump(), "usage": self._usage()}
        return event_text(COMPLETED, {**self._common(COMPLETED), **fields})

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "type": kind,
            "created_at": int(time.time()),
            "size": self.node.size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self.request.output_format or "png",
        }

    def _usage(self) -> dict[str, Any]:
        """Return OpenAI's usage field: text tokens that the model read, and no image tokens."""
        texts = (self.request.prompt, self.request.negative_prompt or "")
        tokens = sum(self.node.engine.count_tokens(text) for text in texts if text)
        return {
            "input_tokens": tokens,
            "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": tokens,
        }

    async def _write(self, send: Send, text: str) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        await self._send(send, text.encode(), more=True)

    async def _end(self, send: Send) -> None:
        """Wait until the reader has taken all but a small rest of the last event, and end."""
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        """Send; the server waits here while its buffer for this reader is full."""
        message = {"type": "http.response.body", "body": body, "more_body": more}
        try:
            await asyncio.wait_for(send(message), self._limit_s)
        except TimeoutError as error:
            raise SlowReaderError from error


def event_text(kind: str, data: dict[str, Any]) -> str:
    """Format one server-sent event; `data` becomes one line of JSON."""
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


async def drop_connection(receive: Receive) -> None:
    """Reset the connection at once, with all that is still buffered for its reader.

    ASGI has no message for it: after an exception the server closes only when the reader has taken
    all. So this finds uvicorn's transport behind the middlewares; without one, it raises.

    Raises:
        SlowReaderError: there is no such transport.
    """
    inner: Any = receive
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    transport = getattr(getattr(inner, "__self__", None), "transport", None)
    if transport is None:
        raise SlowReaderError("the reader of a stream was too slow")
    connection = transport.get_extra_info("socket")
    if connection is not None:
        # Else the kernel would keep offering its part of the buffer for minutes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    with contextlib.suppress(TimeoutError):  # so that the server knows before we return
        await asyncio.wait_for(disconnected(receive), 1.0)
