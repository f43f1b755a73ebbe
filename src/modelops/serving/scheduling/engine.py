"""Image requests to images, by one thread that batches between denoising steps.

Requests join and leave the running batch at every step. Each row keeps its own noise, scheduler,
step count and guidance, so a request of 8 steps never waits for one of 30, and the image is the one
the pipeline makes of the same request alone.

    submit() ─▶ waiting (bounded, first in first out) ─▶ running rows ─▶ Job.future
                engine thread: admit, one network evaluation, step each row, decode

A guided request takes two rows of the same forward pass: its prompt and its negative prompt.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.errors import ServingError, UsageError
from modelops.models.sources import ImageRequest, floats_to_uint8
from modelops.serving.failures import CancelledError, DeadlineError, EngineError, QueueFullError
from modelops.serving.scheduling.jobs import MAX_PREVIEWS, EngineImage, Job, Preview, StepReport
from modelops.serving.scheduling.pace import BatchProfile, Pace, measure_profile, widths
from modelops.serving.scheduling.stepping import Schedule, Stepper, guide

log = logging.getLogger("modelops.serving")


Text = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # pooled [1, D], tokens [1, L, D], mask [1, L]
MAX_OVERTAKEN = 4
_WARM_TEXTS = 4  # prompts at once that are worth preparing for
MAX_FAILURES = 3  # network evaluations in a row that raised; then the engine calls itself dead


@dataclass(slots=True)
class _Row:
    """A running request: its own schedule and latents [1, C, h, w]."""

    job: Job
    schedule: Schedule
    latents: torch.Tensor
    text: Text
    negative: Text | None
    batch_rows: list[int] = field(default_factory=list)

    @property
    def timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self.schedule.timesteps[self.job.step]
        return timestep


class StepEngine:
    """Runs one pipeline in one thread.

    Args:
        pipeline: a PixelFlowPipeline, with its networks in torch or in another runtime. The engine
            owns it from now on.
        max_rows: rows of a forward pass, at most (a guided request takes two).
        profile_s: seconds to spend, before the first request, on finding out which widths pay (see
            `pace.BatchProfile`); 0 takes every width up to max_rows for good.
        queue_limit: requests that may wait; an empty queue takes a longer list too.
        text_cache: prompts whose embeddings are kept.
        on_step: called after each network evaluation, in the engine's thread.
        on_wasted: called as (steps, reason) when a request ends unfinished.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        max_rows: int = 16,
        queue_limit: int = 64,
        text_cache: int = 256,
        profile_s: float = 0.0,
        on_step: Callable[[StepReport], None] | None = None,
        on_wasted: Callable[[int, str], None] | None = None,
    ) -> None:
        if max_rows < 2 or queue_limit < 1:
            raise UsageError("max_rows must be at least 2 and queue_limit at least 1")
        self.pipeline = pipeline
        self.max_rows = max_rows
        self.queue_limit = queue_limit
        self._on_step = on_step or (lambda report: None)
        self._on_wasted = on_wasted or (lambda steps, reason: None)
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self._text_cache = text_cache
        self._tokenizer_lock = threading.Lock()  # fast tokenizers keep padding as mutable state
        self._waiting: deque[Job] = deque()
        self._running: list[_Row] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._step_began: float | None = None
        self._step_ended: float | None = None  # None after an idle moment
        self._pace = Pace()
        self._stepper = Stepper(pipeline.scheduler, pipeline._execution_device, pipeline.unet.dtype)
        self._profile_s = profile_s
        self.profile = BatchProfile(narrow=max_rows, wide=max_rows, complete=False)
        self._thread = threading.Thread(target=self._run, name="modelops-engine", daemon=True)
        self._thread.start()

    # --- the callers' side ------------------------------------------------------------------------

    def submit(
        self,
        requests: Sequence[ImageRequest],
        *,
        timeout_s: float | None = None,
        previews: int = 0,
        on_preview: Preview | None = None,
    ) -> list[Job]:
        """Queue requests, all of them or none.

        Args:
            requests: what is None is filled with the pipeline's defaults.
            timeout_s: seconds from now after which unfinished work is dropped.
            previews, on_preview: show each picture so many times on its way; see `Job`.

        Raises:
            QueueFullError: no room for all of them.
            UsageError: a request that the model cannot do.
            ServingError: the engine is closed or dead.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not 0 <= previews <= MAX_PREVIEWS:
            raise UsageError(f"previews must be 0 to {MAX_PREVIEWS}, got {previews}")
        jobs = [
            Job(self.fill(request), deadline, previews=previews, on_preview=on_preview)
            for request in requests
        ]
        with self._changed:
            if self._stopping or not self.alive:
                raise EngineError("the engine is not running")
            if self._waiting and len(self._waiting) + len(jobs) > self.queue_limit:
                raise QueueFullError(self._backlog_seconds())
            self._waiting.extend(jobs)
            self._changed.notify()
        return jobs

    def fill(self, request: ImageRequest) -> ImageRequest:
        """The request with the pipeline's defaults in place of None.

        Raises:
            UsageError: size, steps or guidance out of the model's range.
        """
        config, size = self.pipeline.config, self.pipeline.resolution
        filled = replace(
            request,
            steps=config["default_steps"] if request.steps is None else request.steps,
            guidance=config["default_guidance"] if request.guidance is None else request.guidance,
            height=request.height or size,
            width=request.width or size,
        )
        assert filled.height and filled.width and filled.steps is not None
        if filled.steps < 1:
            raise UsageError(f"steps must be at least 1, got {filled.steps}")
        if filled.guidance is None or not math.isfinite(filled.guidance):
            raise UsageError("guidance must be a finite number")
        try:
            self.pipeline.latent_shape(filled.height, filled.width)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return filled

    def count_tokens(self, text: str) -> int:
        """Tokens of a text before truncation, with the special ones."""
        with self._tokenizer_lock:
            encoded = self.pipeline.tokenizer(text, padding=False, truncation=False, verbose=False)
        return len(encoded["input_ids"])

    def estimated_wait(self) -> float:
        """Seconds until the work now queued and running will have been done; 0 when unknown."""
        with self._changed:
            return self._backlog_seconds()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def oldest_wait(self) -> float:
        """Seconds that the request at the head of the queue has waited; 0 without one."""
        with self._changed:
            return time.monotonic() - self._waiting[0].submitted if self._waiting else 0.0

    @property
    def running(self) -> int:
        """Requests in the running batch."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """The thread runs, and its last network evaluations did not all fail."""
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    def stalled_for(self) -> float:
        """Seconds that the network evaluation in progress has taken so far."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests; finish those in hand (or drop them) and end the thread."""
        with self._changed:
            self._stopping = True
            if not drain:
                for job in (*self._waiting, *(row.job for row in self._running)):
                    job.cancel()
            self._changed.notify()
        self._thread.join(timeout_s)

    # --- the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                if self._profile_s:
                    self._measure_profile()
                while True:
                    with self._changed:
                        while not (self._waiting or self._running or self._stopping):
                            self._step_ended = None
                            self._changed.wait()
                        if not self._waiting and not self._running:
                            return
                        self._drop_stopped()
                        joining = self._admit()
                    self._start(joining)
                    for rows in self._groups():
                        self._step(rows)
        except BaseException as error:
            log.exception("the engine's thread ended")
            with self._changed:
                self._stopping = True
                jobs = [*self._waiting, *(row.job for row in self._running)]
                self._waiting.clear()
                self._running.clear()
            for job in jobs:
                self._fail(job, EngineError(f"the engine ended: {type(error).__name__}"))

    def _drop_stopped(self) -> None:
        for job in [job for job in self._waiting if job.reason_to_stop()]:
            self._waiting.remove(job)
            self._fail(job, job.reason_to_stop())
        for row in [row for row in self._running if row.job.reason_to_stop()]:
            self._running.remove(row)
            self._fail(row.job, row.job.reason_to_stop())

    def _measure_profile(self) -> None:
        """Time the network at the size that it was made for, before anybody waits for it."""
        pipeline, size = self.pipeline, self.pipeline.resolution
        device, dtype = pipeline._execution_device, pipeline.unet.dtype
        shape = pipeline.latent_shape(size, size)
        text = self._encode([""])[""]
        for count in widths(min(self.max_rows, _WARM_TEXTS)):  # whose shapes runtimes compile too
            pipeline.encode_prompt([""] * count)

        def evaluate(rows: int) -> None:
            latents = torch.zeros((rows, *shape), device=device, dtype=dtype)
            sigmas = torch.full((rows,), 0.5, device=device, dtype=dtype)
            parts = [part.expand(rows, *part.shape[1:]).contiguous() for part in text]
            pipeline.predict_velocity(latents, sigmas, *parts)
            if device.type == "cuda":  # pragma: no cover - no GPU here
                torch.cuda.synchronize(device)

        try:
            self.profile = measure_profile(evaluate, self.max_rows, budget_s=self._profile_s)
        except Exception:  # a width too many for the memory, say: the requests will tell
            log.exception("the batching profile could not be measured; batches stay narrow")
            self.profile = BatchProfile(narrow=2, wide=2, pays=False, complete=False)
            return
        self._pace.expect(self.profile.rows_per_second(self.profile.wide))
        log.info("batching profile: %s", self.profile)

    def _cap(self, used: int) -> int:
        """Rows that may run now: the wide cap only where the queue fills it."""
        queued = used
        for job in self._waiting:
            queued += job.rows
            if queued >= self.profile.wide:
                return self.profile.wide
        return self.profile.narrow

    def _admit(self) -> list[Job]:
        """First in, first out; but one row that the head has no use for may go to a later request,
        and no request is overtaken more than `MAX_OVERTAKEN` times."""
        if not self.profile.pays and self._running:
            return []
        used = sum(row.job.rows for row in self._running)
        cap = self._cap(used) if self.profile.pays else 0
        joining: list[Job] = []
        while (
            self._waiting
            and (not joining or self.profile.pays)
            and (used + self._waiting[0].rows <= cap or not (used or joining))
        ):
            joining.append(self._waiting.popleft())
            used += joining[-1].rows
        if self.profile.pays and used == cap - 1 and self._waiting:
            head = self._waiting[0]  # needs two rows
            narrow = next((job for job in self._waiting if job.rows == 1), None)
            if narrow is not None and head.overtaken < MAX_OVERTAKEN:
                head.overtaken += 1
                self._waiting.remove(narrow)
                joining.append(narrow)
        for job in joining:
            job.admitted = time.monotonic()
        return joining

    def _start(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        wanted = [job.request.prompt for job in jobs]
        wanted += [job.request.negative_prompt for job in jobs if job.rows == 2]
        try:
            texts = self._encode(wanted)
        except Exception as error:
            log.exception("text encoder failed")
            for job in jobs:
                self._fail(job, EngineError(f"the text encoder failed: {type(error).__name__}"))
            return
        for job in jobs:
            try:
                row = self._make_row(job, texts)
            except Exception as error:
                log.exception("could not start a request")
                self._fail(job, EngineError(f"could not start: {type(error).__name__}"))
                continue
            job.started = time.monotonic()
            with self._changed:
                self._running.append(row)

    def _encode(self, wanted: list[str]) -> dict[str, Text]:
        missing = [text for text in dict.fromkeys(wanted) if text not in self._texts]
        if missing:
            with self._tokenizer_lock:
                pooled, tokens, mask = self.pipeline.encode_prompt(missing)
            device, dtype = self.pipeline._execution_device, self.pipeline.unet.dtype
            for index, text in enumerate(missing):
                one = slice(index, index + 1)
                self._texts[text] = (
                    pooled[one].to(device, dtype),
                    tokens[one].to(device, dtype),
                    mask[one].to(device),
                )
        found = {}
        for text in wanted:
            self._texts.move_to_end(text)
            found[text] = self._texts[text]
        while len(self._texts) > self._text_cache:
            self._texts.popitem(last=False)
        return found

    def _make_row(self, job: Job, texts: dict[str, Text]) -> _Row:
        request = job.request
        assert request.height and request.width
        device, dtype = self.pipeline._execution_device, self.pipeline.unet.dtype
        shape = (1, *self.pipeline.latent_shape(request.height, request.width))
        generator = torch.Generator("cpu").manual_seed(request.seed)
        assert request.steps is not None
        return _Row(
            job=job,
            schedule=self._stepper.schedule(request.steps),
            latents=torch.randn(shape, generator=generator, dtype=dtype).to(device),
            text=texts[request.prompt],
            negative=texts[request.negative_prompt] if job.rows == 2 else None,
        )

    def _groups(self) -> list[list[_Row]]:
        """Running rows that can share a forward pass: those of one latent shape."""
        groups: dict[tuple[int, ...], list[_Row]] = {}
        for row in self._running:
            groups.setdefault(tuple(row.latents.shape), []).append(row)
        return list(groups.values())

    def _step(self, rows: list[_Row]) -> None:
        began = self._step_began = time.monotonic()
        try:
            self._advance(rows)
        except Exception as error:
            log.exception("a network evaluation failed")
            self._failures += 1
            self._leave(rows)
            for row in rows:
                self._fail(row.job, EngineError(f"the network failed: {type(error).__name__}"))
            return
        finally:
            self._step_began = None
        self._failures = 0
        ended = time.monotonic()
        seconds, width = ended - began, sum(row.job.rows for row in rows)
        if self._step_ended is not None:
            self._pace.add(width, ended - self._step_ended)
        self._step_ended = ended
        self._on_step(
            StepReport(rows=width, requests=len(rows), waiting=self.waiting, seconds=seconds)
        )
        finished = []
        for row in rows:
            row.job.step += 1
            row.batch_rows.append(width)
            if row.job.step >= len(row.schedule.timesteps):
                finished.append(row)
        if finished:
            self._leave(finished)
            self._finish(finished)

    def _advance(self, rows: list[_Row]) -> None:
        """One network evaluation for all rows, then each row's own scheduler step."""
        guided = [row for row in rows if row.negative is not None]
        rows = [*guided, *(row for row in rows if row.negative is None)]
        texts = [row.text for row in rows] + [row.negative for row in guided if row.negative]
        everyone = [*rows, *guided]
        latents = torch.cat([row.latents for row in everyone])
        sigmas = torch.stack([row.timestep / 1000.0 for row in everyone]).to(latents.dtype)
        pooled, tokens, mask = (torch.cat(parts) for parts in zip(*texts, strict=True))
        velocity = self.pipeline.predict_velocity(latents, sigmas, pooled, tokens, mask)
        own, latents = velocity[: len(rows)], latents[: len(rows)]
        if guided:
            scales = [row.job.request.guidance or 1.0 for row in guided]
            toward = guide(own[: len(guided)], velocity[len(rows) :], scales)
            own = torch.cat([toward, own[len(guided) :]])
        after = self._stepper.step(
            [row.schedule for row in rows], [row.job.step for row in rows], own, latents
        )
        for index, row in enumerate(rows):
            shown = row.job.preview_at.get(row.job.step + 1)
            if shown is not None:
                self._show(row, shown, row.latents - sigmas[index] * own[index])
            row.latents = after[index : index + 1]

    def _show(self, row: _Row, index: int, estimate: torch.Tensor) -> None:
        """Hand out a preview: where the trajectory would end if it went on straight."""
        assert row.job.on_preview is not None
        try:
            row.job.on_preview(row.job, index, self._to_pixels(estimate))
        except Exception:
            log.exception("a preview was lost")

    def _to_pixels(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Latents [1, C, h, w] to [H, W, 3] uint8."""
        decoded = self.pipeline.decode(latents)
        return floats_to_uint8(self.pipeline.image_processor.pt_to_numpy(decoded)[0])

    def _leave(self, rows: list[_Row]) -> None:
        gone = {id(row) for row in rows}
        with self._changed:
            self._running = [row for row in self._running if id(row) not in gone]

    def _finish(self, rows: list[_Row]) -> None:
        for row in rows:
            job, stepped = row.job, time.monotonic()
            try:
                pixels = self._to_pixels(row.latents)
            except Exception as error:
                log.exception("an image could not be decoded")
                self._fail(job, EngineError(f"no usable image: {error}"))
                continue
            assert job.started is not None
            result = EngineImage(
                pixels=pixels,
                request=job.request,
                queue_s=job.started - job.submitted,
                denoise_s=time.monotonic() - job.started,
                mean_rows=sum(row.batch_rows) / job.step,
                batch_rows=tuple(row.batch_rows),
                phases=(
                    ("queue", job.submitted, job.admitted),
                    ("text", job.admitted, job.started),
                    ("denoise", job.started, stepped),
                    ("decode", stepped, time.monotonic()),
                ),
            )
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(result)

    def _fail(self, job: Job, error: ServingError | None) -> None:
        reason = {CancelledError: "cancelled", DeadlineError: "deadline"}.get(type(error), "failed")  # type: ignore[arg-type]
        if job.step:
            self._on_wasted(job.step, reason)
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(error or EngineError("unknown"))

    def _backlog_seconds(self) -> float:
        work = sum(job.remaining for job in self._waiting)
        work += sum(row.job.remaining for row in self._running)
        return self._pace.seconds_for(work)
