"""Inference node: one verified release, one engine, two filters that fail closed.

    release ─▶ verify ─▶ open model ─▶ engine ─▶ golden image ─▶ filters ─▶ ready
    request ─▶ prompt filter ─▶ engine ─▶ image filter ─▶ encode with metadata ─▶ receipt

Framework-free; `modelops.serving.http.app` puts HTTP around it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.errors import UsageError
from modelops.base.files import sha256_file
from modelops.base.seeding import MAX_SEED
from modelops.models.request import ImageRequest
from modelops.releases.verify import RECORD_FILE, verify_release
from modelops.serving.api import ApiError, ImagesRequest, ImagesResponse, as_api_errors
from modelops.serving.engine.engine import StepEngine
from modelops.serving.engine.jobs import EngineImage, Preview, StepReport
from modelops.serving.failures import (
    QueueFullError,
)
from modelops.serving.moderation.quarantine import open_quarantine
from modelops.serving.node.answers import AnswerMaker, Ticket
from modelops.serving.node.filters import NodeFilters
from modelops.serving.node.golden import (
    DEFAULT_PROMPT,
    GoldenCheck,
    GoldenImage,
    check_golden,
    golden_request,
)
from modelops.serving.node.load import open_released
from modelops.serving.provenance.seal import Origin, Sealer
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.drift import evaluation_cadence, open_drift_log
from modelops.serving.telemetry.metrics import NodeMetrics, evaluation_time
from modelops.serving.telemetry.tracing import RequestTrace, request_id
from modelops.serving.workers import Worker

log = logging.getLogger("modelops.serving")

_FINISHERS = 8  # requests that are filtered, marked and encoded at the same time


class InferenceNode:
    """Node that serves one release. `start` makes it ready; the other methods are thread-safe.

    Args:
        release_dir: verified here, byte by byte.
        settings: see NodeSettings.
        prompt_filter, image_filter: functions that load the filters, in place of those that the
            settings name.
        worker: which worker of a node of several this is.

    Raises:
        UsageError: the settings name a filter that does not exist.
        ModelopsError: the release was changed, or its model cannot be opened.
    """

    def __init__(
        self,
        release_dir: str | Path,
        *,
        settings: NodeSettings | None = None,
        prompt_filter: Callable[[], Any] | None = None,
        image_filter: Callable[[], Any] | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.settings = settings or NodeSettings()
        self.filters = NodeFilters(
            self.settings, prompt_filter, image_filter, store=worker.directory if worker else None
        )
        self.prompt_guard, self.image_guard = self.filters.prompt, self.filters.image
        names = self.filters.names
        self.directory = Path(release_dir)
        self.release = verify_release(self.directory)
        self.release_sha256 = sha256_file(self.directory / RECORD_FILE)
        self.metrics = self.filters.metrics = NodeMetrics(names)
        self.metrics.evaluated(
            evaluation_time(self.directory, self.release),
            every_days=evaluation_cadence(self.directory, self.settings),
        )
        self.opened = open_released(
            self.directory,
            self.release,
            runtime=self.settings.runtime,
            device=self.settings.device,
            batch_size=self.settings.max_rows,
            threads=self.settings.threads,
            worker=worker,
        )
        self.drift = open_drift_log(
            self.settings, self.directory, self.release,
            release_sha256=self.release_sha256, model_sha256=self.opened.sha256,
            filters=names, registry=self.metrics.registry,
        )  # fmt: skip
        source = self.opened.source
        self.runtime = source.runtime
        if not self.runtime.startswith("torch"):
            # What is left to torch is too small to share out, and its idle threads spin on the
            # cores of the runtime that does the work.
            torch.set_num_threads(1)
        self.sealer = Sealer(
            Origin(
                release=self.release, release_sha256=self.release_sha256,
                model_sha256=self.opened.sha256, source=source, filters=names,
            ),
            self.settings, self.metrics.registry,
        )  # fmt: skip
        self.on_step: Callable[[StepReport], None] | None = (
            None  # called after each network evaluation
        )
        self.quarantine = open_quarantine(self.settings, self.sealer.origin, self.metrics.registry)
        self.engine = StepEngine(
            self.opened.pipeline,
            max_rows=self.settings.max_rows,
            queue_limit=self.settings.queue_limit,
            profile_s=self.settings.profile_s,
            on_step=self._stepped,
            on_wasted=self.metrics.on_wasted,
        )
        self.size = f"{self.engine.model.width}x{self.engine.model.height}"  # of every image
        self.max_tokens = self.engine.model.max_tokens
        self.answers = AnswerMaker(
            self.filters, self.sealer, self.metrics, size=self.size,
            quarantine=self.quarantine, drift=self.drift,
        )  # fmt: skip
        # Finished requests wait here for the image filter, while new ones are accepted or refused.
        self.finishers = ThreadPoolExecutor(_FINISHERS, thread_name_prefix="modelops-finish")
        self.metrics.serves(self.release, self.release_sha256, self.opened.sha256, self.runtime)
        stated = self.release.defaults
        (prompt,) = self.engine.model.usable_prompts([DEFAULT_PROMPT])
        self.defaults = self.engine.fill(
            ImageRequest(
                prompt=prompt, seed=0, steps=stated.get("steps"), guidance=stated.get("guidance")
            )
        )
        self._golden = GoldenImage(
            lambda request: self.engine.submit([request])[0].future,
            golden_request(stated, prompt),
            lambda pixels: check_golden(
                pixels, self.directory, stated, fallback=bool(self.opened.fallback)
            ),
        )
        self._closing = False
        self.metrics.watch(self)

    def _stepped(self, report: StepReport) -> None:
        self.metrics.on_step(report)
        if (heard := self.on_step) is not None:
            heard(report)

    def start(self) -> None:
        """Make the golden image and probe the filters; problems end in `readiness`."""
        self._golden.make(self.settings.deadline_s)
        self.filters.probe(self._golden.pixels)
        log.info("node: %s", self.problems() or "ready")

    # --- health -----------------------------------------------------------------------------------

    def alive(self) -> bool:
        """True while the engine's thread works; if not, the process should be restarted."""
        return self.engine.alive and self.engine.stalled_for() < self.settings.stalled_s

    @property
    def golden(self) -> GoldenCheck | None:
        """Difference of this start's golden image from the release's, once it is made."""
        return self._golden.check

    @property
    def golden_ok(self) -> bool:
        """True while the golden image is the released one."""
        return self._golden.check is not None and self._golden.problem is None

    def readiness(self) -> list[str]:
        """Return why the node is not ready; empty when it is.

        Red filters are probed again, and the golden image is made again from time to time.
        """
        if not self._closing:
            self._golden.make_again(self.settings.golden_every_s)
            self.filters.probe(self._golden.pixels, every_s=2.0)
        return self.problems()

    def problems(self) -> list[str]:
        """Return why the node is not ready; probes nothing."""
        problems = []
        if self._closing:
            problems.append("shutting down")
        if not self.alive():
            problems.append("the engine does not answer")
        if self._golden.problem:
            problems.append(self._golden.problem)
        return problems + self.filters.problems()

    # --- requests ---------------------------------------------------------------------------------

    @property
    def model_id(self) -> str:
        """Id in /v1/models: the release's name."""
        return self.release.name

    def submit(
        self,
        request: ImagesRequest,
        trace: RequestTrace | None = None,
        *,
        on_preview: Preview | None = None,
    ) -> Ticket:
        """Check a request and queue its images.

        Args:
            trace: where the phases are noted.
            on_preview: called with the request's partial images, see `jobs.Job`. They are not
                filtered; `preview` does that before they are sent.

        Raises:
            ApiError: 400, 404 (model), 429 (queue) or 503 (not ready, filter).
        """
        problems = self.problems()
        if problems:
            raise ApiError(503, "not_ready", "not ready, see /readyz", retry_after_s=5)
        self._check_possible(request)
        trace = trace or RequestTrace(request_id(None))
        texts = {"prompt": request.prompt}
        if request.negative_prompt:
            texts["negative_prompt"] = request.negative_prompt
        blocked, reasons = self.filters.check_prompts(texts, trace)
        if self.drift is not None:
            tokens = self.engine.count_tokens(request.prompt)
            self.drift.note_request(
                trace.id, request.prompt, tokens=tokens, blocked=blocked is not None
            )
        if blocked is not None:
            if self.quarantine is not None and self.settings.quarantine_stages == "all":
                self.quarantine.keep_prompt(
                    trace.id, request.prompt, request.negative_prompt or "", reasons,
                    self.sealer.origin.filters["prompt"], self.prompt_guard.info,
                )  # fmt: skip
            raise ApiError(
                400, "content_policy_violation",
                f"the {blocked} is against the content policy ({', '.join(reasons) or 'blocked'})",
                param=blocked,
            )  # fmt: skip
        seed = request.seed if request.seed is not None else secrets.randbelow(MAX_SEED + 1)
        wanted = [
            ImageRequest(
                prompt=request.prompt,
                seed=(seed + index) % (MAX_SEED + 1),
                steps=request.steps or self.defaults.steps,
                guidance=self.defaults.guidance if request.guidance is None else request.guidance,
                negative_prompt=request.negative_prompt or "",
            )
            for index in range(request.n or 1)
        ]
        try:
            with as_api_errors():
                jobs = self.engine.submit(
                    wanted,
                    timeout_s=self.settings.deadline_s,
                    previews=(request.partial_images or 0) if on_preview else 0,
                    on_preview=on_preview,
                )
        except ApiError as error:
            if error.status == QueueFullError.status:
                self.metrics.on_rejected("queue_full")
            raise
        except UsageError as error:
            raise ApiError(400, "invalid_value", error.message) from error
        return Ticket(request=request, jobs=jobs, trace=trace)

    def _check_possible(self, request: ImagesRequest) -> None:
        if request.model is not None and request.model != self.model_id:
            raise ApiError(
                404, "model_not_found",
                f"this server has the model {self.model_id!r} only; see /v1/models", param="model",
            )  # fmt: skip
        if request.size not in (None, "auto", self.size):
            raise ApiError(
                400, "unsupported_value",
                f"size: this model makes {self.size} images only; ask for {self.size!r} or "
                "'auto'",
                param="size",
            )  # fmt: skip
        for param in ("prompt", "negative_prompt"):
            tokens = self.engine.count_tokens(getattr(request, param) or "")
            if tokens > self.max_tokens:
                raise ApiError(
                    400, "prompt_too_long",
                    f"{param}: {tokens} tokens, this model reads at most {self.max_tokens}",
                    param=param,
                )  # fmt: skip

    def finish(self, ticket: Ticket, images: Sequence[EngineImage]) -> ImagesResponse:
        """Filter and encode the images of a ticket; see `AnswerMaker.finish`."""
        return self.answers.finish(ticket, images)

    def preview(self, ticket: Ticket, index: int, pixels: npt.NDArray[np.uint8]) -> bytes:
        """Filter and encode a partial image of a ticket; see `AnswerMaker.preview`."""
        return self.answers.preview(ticket, index, pixels)

    def begin_shutdown(self) -> None:
        """Turn /readyz red; requests in progress go on."""
        self._closing = True

    def close(self, *, drain: bool = True, timeout_s: float | None = 60.0) -> None:
        """Finish the work in progress and end the threads."""
        self.begin_shutdown()
        self.engine.close(drain=drain, timeout_s=timeout_s)
        self.filters.close()
        self.finishers.shutdown(wait=False)
        self.sealer.close()
        if self.quarantine is not None:
            self.quarantine.close()
        if self.drift is not None:
            self.drift.close()
