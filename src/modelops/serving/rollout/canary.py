"""Canary: a release is opened and compared, its events are noted, and its memory is freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.base.errors import ModelopsError, ServingError
from modelops.base.files import sha256_file
from modelops.releases.verify import RECORD_FILE
from modelops.serving.provenance.receipts import utc_now

if TYPE_CHECKING:
    from prometheus_client import Counter

    from modelops.serving.engine.jobs import StepReport
    from modelops.serving.node.node import InferenceNode
    from modelops.serving.rollout.trial import Arm, Trial

log = logging.getLogger("modelops.serving")

MAX_EVENTS = 50


def open_canary(
    path: Path, stable: InferenceNode, open_node: Callable[[Path], InferenceNode]
) -> InferenceNode:
    """Open a node of a release that is ready and can be dealt the same requests as the stable one.

    Raises:
        ModelopsError: this failed, with the reason; nothing of it is left behind.
    """
    if sha256_file(path / RECORD_FILE) == stable.release_sha256:
        raise ServingError("this is the stable release itself")
    node: InferenceNode | None = None
    try:
        node = open_node(path)
        node.start()
        problem = "; ".join(node.problems()) or _misfit(node, stable)
        if problem:
            raise ServingError(problem)
        return node
    except BaseException as error:
        if node is not None:
            node.close(drain=False)
        if isinstance(error, ModelopsError) or not isinstance(error, Exception):
            raise
        # Whatever a broken model does, the stable one continues.
        log.exception("a canary could not be loaded")
        raise ServingError(f"{type(error).__name__}: {error}") from error


def _misfit(node: InferenceNode, stable: InferenceNode) -> str:
    """Return why requests cannot be dealt to both nodes alike; "" if they can."""
    if (node.model_id, node.release.version) == (stable.model_id, stable.release.version):
        return "it has the stable one's name and version; give it a version of its own"
    if node.size != stable.size:
        return (
            f"it makes images of {node.size} px, the stable one of {stable.size} px; give it a "
            "node of its own"
        )
    if node.max_tokens < stable.max_tokens:
        return f"it reads {node.max_tokens} tokens, the stable one {stable.max_tokens}"
    return ""


def compare_speed(trial: Trial, canary: InferenceNode, stable: InferenceNode) -> None:
    """Report every network evaluation of both nodes to the trial."""

    def listener(arm: Arm, other: InferenceNode) -> Callable[[StepReport], None]:
        def heard(report: StepReport) -> None:
            running = other.engine.stalled_for()
            trial.step(
                arm, rows=report.rows, seconds=report.seconds,
                other_since=time.monotonic() - running if running else None,
            )  # fmt: skip

        return heard

    canary.on_step, stable.on_step = listener("canary", stable), listener("stable", canary)


class SwapEvents:
    """Events of canaries: kept (the last ones), counted and logged. Thread-safe."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._entries: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def note(self, event: str, release: str, **more: str) -> None:
        """Note one of `metrics.EVENTS`; `more` may hold `by`, `reason` and `sha256`."""
        entry = {"time": utc_now(), "event": event, "release": release}
        entry |= {name: value for name, value in more.items() if value}
        self._entries.append(entry)
        self._counter.labels(event).inc()
        bad = event == "load_failed" or event.startswith("rolled_back_")
        about = f" ({entry['reason']})" if "reason" in entry else ""
        log.log(
            logging.WARNING if bad else logging.INFO, "swap: %s %s%s", event, release, about,
            extra={"fields": {"swap": entry}},
        )  # fmt: skip

    def entries(self) -> list[dict[str, Any]]:
        """Return the events, oldest first."""
        return list(self._entries)


def give_memory_back() -> None:
    """Collect a closed node's cycles, and return its pages to the system where glibc keeps them."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
