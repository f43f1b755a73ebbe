"""Failures: the ways in which work in a node can end without an image. Imports no torch."""

from __future__ import annotations

import math

from modelops.base.errors import ServingError


class QueueFullError(ServingError):
    """No room in the queue. `wait_s`: seconds until the work now queued should be done."""

    def __init__(self, wait_s: float) -> None:
        super().__init__("the queue is full", hint=f"try again in {math.ceil(wait_s)} s")
        self.wait_s = wait_s


class DeadlineError(ServingError):
    """The request was not finished before its deadline."""


class CancelledError(ServingError):
    """The request was cancelled by its owner, or the engine was closed."""


class EngineError(ServingError):
    """The network, the text encoder or the decoder failed."""


class FilterError(ServingError):
    """A safety filter could not give an answer."""


class ProvenanceError(ServingError):
    """An image could not be marked as AI-generated, so it must not be sent."""


class ReceiptError(ServingError):
    """A receipt could not be kept, and this node sends no image without one."""
