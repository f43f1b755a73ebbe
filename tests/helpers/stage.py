"""A node behind a server, whose network passes a gate and whose image filter does as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from live_node import LiveNode, http
from modelops.safety.image import ImageVerdict
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings
from waiting import wait_until


class Filter:
    """An image filter that does as it is told; `held` is clear while it shall hang."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.blocks, self.raises, self.checks = False, False, 0
        self.held = threading.Event()
        self.held.set()

    def check(self, images: Sequence[Any]) -> list[ImageVerdict]:
        self.checks += 1
        self.held.wait(30)
        if self.raises:
            raise RuntimeError("told to")
        return [ImageVerdict(float(image.mean()) / 510, self.blocks) for image in images]


class Gate:
    """Counts the network's evaluations, and lets through as many as were allowed."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real = real
        self.reset()

    def reset(self) -> None:
        self.evaluations, self.free, self.fails = 0, True, False
        self._allowed = threading.Semaphore(0)

    def close(self) -> None:
        self.free = False

    def allow(self, evaluations: int) -> None:
        self._allowed.release(evaluations)

    def open(self) -> None:
        self.free = True
        self._allowed.release(1000)

    def __call__(self, *arguments: Any) -> Any:
        if not self.free:
            self._allowed.acquire(timeout=30)
        self.evaluations += 1
        if self.fails:
            raise RuntimeError("told to")
        return self.real(*arguments)


class Stage:
    """A node with its gate and filter behind a server."""

    def __init__(self, live: LiveNode, gate: Gate, image_filter: Filter) -> None:
        self.live, self.node, self.gate, self.filter = live, live.node, gate, image_filter

    def stream(self, *, steps: int = 6, partial_images: int | None = 2, **extra: Any) -> Any:
        return self.live.client().images.generate(
            prompt="a red heart",
            stream=True,
            partial_images=partial_images,
            extra_body={"seed": 7, "steps": steps, **extra},
        )

    def streams(self, outcome: str) -> float:
        return self.live.metric(f'modelops_streams_total{{outcome="{outcome}"}}')

    def post(self, body: bytes, *, receive_buffer: int | None = None) -> socket.socket:
        caller = socket.socket()
        if receive_buffer is not None:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        caller.settimeout(30)
        caller.connect(("127.0.0.1", int(self.live.url.rsplit(":", 1)[1])))
        caller.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.1\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        return caller


@contextlib.contextmanager
def staged(release: Path, settings: NodeSettings) -> Iterator[Stage]:
    image_filter = Filter()
    node = InferenceNode(release, settings=settings, image_filter=lambda: image_filter)
    node.start()
    assert node.readiness() == []
    gate = Gate(node.engine.pipeline.predict_velocity)
    node.engine.pipeline.predict_velocity = gate
    try:
        with http(node) as live:
            yield Stage(live, gate, image_filter)
    finally:
        gate.open()
        node.close(drain=False, timeout_s=10)


@contextlib.contextmanager
def cleared(stage: Stage) -> Iterator[Stage]:
    """The stage as new, and again afterwards."""
    stage.gate.reset()
    stage.filter.reset()
    yield stage
    stage.filter.held.set()
    stage.gate.open()
    wait_until(lambda: stage.node.engine.running == 0)
