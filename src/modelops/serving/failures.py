"""Failures: the ways in which work in a node can end without an image. Imports no torch.

Each carries the HTTP status and the code of its answer; see `api.failure_to_api_error`.
"""

from __future__ import annotations

import math
from typing import ClassVar

from modelops.base.errors import ServingError


class NodeError(ServingError):
    """Work that ended without an image.

    Attributes:
        status: HTTP status of the answer.
        code: OpenAI's machine-readable code, or ours where it has none.
        answer: line for the client; "" sends the failure's own message.
        retry_after_s: seconds after which asking again may help.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "generation_failed"
    answer: ClassVar[str] = "the image could not be made"
    retry_after_s: float | None = None


class QueueFullError(NodeError):
    """No room in the queue. `wait_s`: seconds until the work now queued will have been done."""

    status = 429
    code = "rate_limit_exceeded"
    answer = ""

    def __init__(self, wait_s: float) -> None:
        super().__init__(
            f"too many requests are waiting; try again in {max(1, math.ceil(wait_s))} s"
        )
        self.wait_s = self.retry_after_s = wait_s


class DeadlineError(NodeError):
    """The request was not finished before its deadline."""

    status = 503
    code = "deadline_exceeded"
    answer = ""
    retry_after_s = 5.0


class CancelledError(NodeError):
    """The request was cancelled by its owner, or the engine was closed."""

    status = 503
    code = "cancelled"
    answer = "the server is shutting down"
    retry_after_s = 5.0


class EngineError(NodeError):
    """The network, the text encoder or the decoder failed."""


class EngineStoppedError(EngineError):
    """The engine takes no requests: it is closed or dead."""

    status = 503
    code = "engine_unavailable"
    answer = ""


class FilterError(NodeError):
    """A safety filter could not give an answer."""

    status = 503
    code = "safety_filter_unavailable"
    answer = "a safety filter gave no answer, so no image is sent"


class ProvenanceError(NodeError):
    """An image could not be marked as AI-generated, so it must not be sent."""

    status = 503
    code = "provenance_unavailable"
    answer = "the image could not be marked as AI-generated, so it is not sent"


class ReceiptError(NodeError):
    """A receipt could not be kept, and this node sends no image without one."""

    status = 503
    code = "receipt_unavailable"
    answer = ""
