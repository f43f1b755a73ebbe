"""The BentoML adapter: `MODELOPS_RELEASE=release bentoml serve modelops.service:ImageGenerator`.

BentoML brings worker processes, packaging and deployment; everything else is `modelops.serving`.
Imports no torch: the process that starts the workers imports this module too.
"""

from __future__ import annotations

import os
import sys
from typing import Any, cast

import bentoml

if "prometheus_client" not in sys.modules:
    # BentoML sets this for its own metrics; with it the client would keep ours in shared files too.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

from modelops.base.errors import ModelopsError
from modelops.base.private import close_copies
from modelops.serving.http.app import create_app
from modelops.serving.http.connections import limit_connections
from modelops.serving.http.peers import Peers
from modelops.serving.rollout.active_release import release_from_settings
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.logs import configure_logging
from modelops.serving.telemetry.tracing import configure_tracing, flush_tracing
from modelops.serving.workers import (
    WorkerField,
    end_with_parent,
    this_worker,
)

try:
    settings = NodeSettings.from_environment()
    app = create_app(settings=settings)
    limits = limit_connections(settings.client_timeout_s, settings.max_connections)
except ModelopsError as error:  # API keys that cannot be read, and the like
    raise SystemExit(f"error: {error}") from error
# A container installs modelops from the bento's own sources. `bentoml build` looks nothing up.
image = (
    bentoml.images.Image(python_version="3.11", lock_python_packages=False)
    .build_include("src", "trainer", "pyproject.toml", "README.md", "LICENSE")
    .python_packages("modelops[demo] @ file:.")
)


class HealthFromNode:
    """BentoML answers health checks before a mounted app is asked; its answers give no reason.

    At / it would show a page of its own, which needs the internet.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # An absolute target (GET http://host/path) matches no route of BentoML's either.
        ours = scope["type"] == "http" and (
            scope["path"] in ("/", "/livez", "/readyz") or not scope["path"].startswith("/")
        )
        await (app if ours else self.app)(scope, receive, send)


@bentoml.service(
    name="modelops-image-generator",
    image=image,
    workers=settings.workers,
    # The node's own deadline answers first, in OpenAI's shape; this one keeps a timer a request.
    traffic={"timeout": int(settings.deadline_s) + 60},
    tracing={"excluded_urls": ".*"},  # spans are the node's, see serving/telemetry/tracing.py
    metrics={"enabled": False},  # its labels hold raw paths; /metrics is the node's
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app, path="/")
class ImageGenerator:
    """Service of the release in MODELOPS_RELEASE, or of the active one in MODELOPS_RELEASES."""

    def __init__(self) -> None:
        from modelops.serving.node.node import InferenceNode
        from modelops.serving.rollout.rollout import open_rollout

        end_with_parent()
        # After each step the engine's thread waits until another one lets go of the interpreter.
        sys.setswitchinterval(0.0005)
        self.lines = configure_logging(settings)
        self.worker = this_worker(bentoml.server_context.worker_index, settings)
        self.lines.addFilter(WorkerField(self.worker))
        configure_tracing(os.environ)
        self.rollout = open_rollout(
            release_from_settings(settings),
            settings,
            lambda path: InferenceNode(path, settings=settings, worker=self.worker),
            workers=self.worker.count,
        )
        self.lines.on_lost = self._count_lost_lines
        limits.on_closed = self._count_closed
        self.rollout.stable.start()
        app.state.rollout = self.rollout

    # The stable node may be another one by then.
    def _count_lost_lines(self, lines: int) -> None:
        self.rollout.stable.metrics.log_lost.inc(lines)

    def _count_closed(self, reason: str) -> None:
        self.rollout.stable.metrics.on_closed(reason)

    @bentoml.on_startup
    async def meet_the_others(self) -> None:
        """Start the peer socket, on which workers answer each other's questions."""
        if self.worker.count > 1:
            app.state.peers = Peers(
                self.worker, node=lambda: self.rollout.stable, text=self.rollout.text
            )
            await app.state.peers.start()

    @bentoml.on_deployment
    @staticmethod
    def check_the_start() -> None:
        """Check once, before any worker starts, so that a bad release, key or setting ends the
        command; a worker that cannot start is started again for ever."""
        from modelops.serving.deploy.start import check_the_start

        try:
            check_the_start(settings)
        except ModelopsError as error:
            raise SystemExit(f"error: {error}") from error

    def __is_alive__(self) -> bool:
        return self.rollout.stable.alive()

    def __is_ready__(self) -> bool:
        return not self.rollout.stable.readiness()

    @bentoml.on_shutdown
    def drain(self) -> None:
        """Finish the work in progress, and write what is to be written about it."""
        self.rollout.close()
        if app.state.peers is not None:
            app.state.peers.close()
        close_copies()
        flush_tracing()
        self.lines.flush()


cast("Any", ImageGenerator).add_asgi_middleware(HealthFromNode)
