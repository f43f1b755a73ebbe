"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing, without an event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Return once the condition holds.

    Raises:
        AssertionError: it did not within `timeout_s` seconds.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"did not happen within {timeout_s:g} seconds"
        time.sleep(0.02)
