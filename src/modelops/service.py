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

from modelops.errors import ModelopsError, UsageError
from modelops.release import verify_release
from modelops.serving.app import create_app
from modelops.serving.logs import configure_logging
from modelops.serving.tracing import configure_tracing, flush_tracing

RELEASE_VARIABLE = "MODELOPS_RELEASE"

try:
    app = create_app()
except ModelopsError as error:  # API keys that cannot be read, and the like
    raise SystemExit(f"error: {error}") from error
# A container installs modelops from the bento's own sources. `bentoml build` looks nothing up.
image = (
    bentoml.images.Image(python_version="3.11", lock_python_packages=False)
    .build_include("src", "trainer", "pyproject.toml", "README.md", "LICENSE")
    .python_packages("modelops[demo] @ file:.")
)


class HealthFromNode:
    """BentoML answers health checks before a mounted app is asked; its answers give no reason."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        ours = scope["type"] == "http" and scope["path"] in ("/livez", "/readyz")
        await (app if ours else self.app)(scope, receive, send)


def _release_directory() -> str:
    directory = os.environ.get(RELEASE_VARIABLE, "")
    if not directory:
        raise UsageError(
            f"{RELEASE_VARIABLE} is not set", hint="export it, or use `modelops serve`"
        )
    return directory


@bentoml.service(
    name="modelops-image-generator",
    image=image,
    workers=1,
    traffic={"timeout": 600},  # the node's own deadline answers first, in OpenAI's shape
    metrics={"enabled": False},  # its labels hold raw paths; /metrics is the node's
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app, path="/")
class ImageGenerator:
    """Serves the release named by MODELOPS_RELEASE."""

    def __init__(self) -> None:
        from modelops.serving.node import InferenceNode
        from modelops.serving.settings import NodeSettings

        self.lines = configure_logging(os.environ)
        configure_tracing(os.environ)
        self.node = InferenceNode(_release_directory(), settings=NodeSettings.from_environment())
        self.lines.on_lost = self.node.metrics.log_lost.inc
        self.node.start()
        app.state.node = self.node

    @bentoml.on_deployment
    @staticmethod
    def refuse_a_changed_release() -> None:
        """Runs once before any worker starts, so that a bad release or key ends the command."""
        from modelops.serving.signing import open_signing_key

        try:
            verify_release(_release_directory())
            open_signing_key(
                os.environ.get("MODELOPS_SIGNING_KEY"), os.environ.get("MODELOPS_SIGNING_CHAIN")
            )
        except ModelopsError as error:
            raise SystemExit(f"error: {error}") from error

    def __is_alive__(self) -> bool:
        return self.node.alive()

    def __is_ready__(self) -> bool:
        return not self.node.readiness()

    @bentoml.on_shutdown
    def drain(self) -> None:
        """Finish the work in hand, and write what is to be written about it."""
        self.node.close()
        flush_tracing()
        self.lines.flush()


cast("Any", ImageGenerator).add_asgi_middleware(HealthFromNode)
