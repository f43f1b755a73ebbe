"""A node of this process behind a real HTTP server, for OpenAI's own client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import uvicorn

from modelops.serving.http.app import create_app
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings


@dataclass(frozen=True)
class LiveNode:
    node: InferenceNode
    url: str

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def metric(self, name: str) -> float:
        for line in self.node.metrics.text().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")


@contextlib.contextmanager
def served(
    release: Path, settings: NodeSettings | None = None, *, host: str = "127.0.0.1"
) -> Iterator[LiveNode]:
    node = InferenceNode(release, settings=settings)
    node.start()
    assert node.readiness() == []
    try:
        with http(node, host=host) as live:
            yield live
    finally:
        node.close(drain=False, timeout_s=10)


@contextlib.contextmanager
def http(node: InferenceNode, *, host: str = "127.0.0.1") -> Iterator[LiveNode]:
    server = uvicorn.Server(
        uvicorn.Config(create_app(node), host=host, port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield LiveNode(node, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(20)
