"""Image requests to images, by one thread that batches between denoising steps.

Requests join and leave the running batch at every step. Each keeps its own noise, scheduler, step
count and guidance, so a request of 8 steps never waits for one of 30, and the image is the one the
pipeline makes of the same request alone.

    submit() ─▶ waiting (bounded, first in first out) ─▶ running tracks ─▶ Job.future
                engine thread: admit, one network evaluation, step each track, decode

The `step_model.StepModel` of a pipeline divides it into such steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from modelops.base.errors import ModelopsError, ServingError, UsageError, first_line
from modelops.models.pipelines.traits import Traits
from modelops.models.request import ImageRequest
from modelops.serving.engine.batch_profile import BatchProfile, RowRate, measure_profile
from modelops.serving.engine.jobs import MAX_PREVIEWS, Job, Preview, StepReport, job_to_image
from modelops.serving.engine.queue import JobQueue
from modelops.serving.engine.step_model import StepModel, Track, step_model
from modelops.serving.failures import (
    CancelledError,
    DeadlineError,
    EngineError,
    EngineStoppedError,
    QueueFullError,
)

log = logging.getLogger("modelops.serving")

MAX_FAILURES = 3  # network evaluations in a row that raised, after which the engine counts as dead


class StepEngine:
    """Engine that runs one pipeline in one thread.

    Args:
        pipeline: any diffusers pipeline with a denoiser, its networks in torch or in another
            runtime. The engine owns it until it is closed.
        traits: of the pipeline; measured if needed and not given.
        max_rows: rows of a forward pass, at most (a guided request takes two).
        profile_s: seconds to spend, before the first request, on finding out which widths pay (see
            `batch_profile.BatchProfile`); 0 measures nothing and allows every width up to max_rows.
        queue_limit: requests that may wait; an empty queue takes a longer list too.
        on_step: called after each network evaluation, in the engine's thread.
        on_wasted: called as (steps, reason) when a request ends unfinished.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        traits: Traits | None = None,
        max_rows: int = 16,
        queue_limit: int = 64,
        profile_s: float = 0.0,
        on_step: Callable[[StepReport], None] | None = None,
        on_wasted: Callable[[int, str], None] | None = None,
    ) -> None:
        if max_rows < 2 or queue_limit < 1:
            raise UsageError("max_rows must be at least 2 and queue_limit at least 1")
        self.pipeline = pipeline
        self.model: StepModel[Any] = step_model(pipeline, traits)
        self.max_rows = max_rows
        self._on_step = on_step or (lambda report: None)
        self._on_wasted = on_wasted or (lambda steps, reason: None)
        # A prompt is counted where it is checked, logged and billed: tokenised once for all.
        self._count_tokens = lru_cache(maxsize=64)(self.model.count_tokens)
        self._waiting = JobQueue(queue_limit)
        self._running: list[Track] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._step_began: float | None = None
        self._step_ended: float | None = None  # None after an idle moment
        self._row_rate = RowRate()
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
            requests: fields that are None get the pipeline's defaults.
            timeout_s: seconds from now after which unfinished work is dropped.
            previews, on_preview: number of previews of each image, and their receiver; see `Job`.

        Raises:
            QueueFullError: no room for all of them.
            UsageError: a request that the model cannot do.
            ServingError: the engine is closed or dead.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not 0 <= previews <= MAX_PREVIEWS:
            raise UsageError(f"previews must be 0 to {MAX_PREVIEWS}, got {previews}")
        if not self.model.previews:
            previews = 0
        filled = [self.model.fill(request) for request in requests]
        jobs = [
            Job(
                request, deadline, rows=self.model.rows_of(request), previews=previews,
                on_preview=on_preview,
            )
            for request in filled
        ]  # fmt: skip
        with self._changed:
            if self._stopping or not self.alive:
                raise EngineStoppedError("the engine is not running")
            if not self._waiting.add(jobs):
                raise QueueFullError(self._backlog_seconds())
            self._changed.notify()
        return jobs

    def fill(self, request: ImageRequest) -> ImageRequest:
        """Return the request with the pipeline's defaults in place of None.

        Raises:
            UsageError: size, steps or guidance out of the model's range.
        """
        return self.model.fill(request)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text before truncation, with the special ones."""
        return self._count_tokens(text)

    def estimated_wait(self) -> float:
        """Estimate the seconds until all queued and running work is done; 0 when unknown."""
        with self._changed:
            return self._backlog_seconds()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def oldest_wait(self) -> float:
        """Seconds that the request at the head of the queue has waited; 0 without one."""
        with self._changed:
            return self._waiting.oldest_wait()

    @property
    def running(self) -> int:
        """Requests in the running batch."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """True while the thread runs and its last network evaluations did not all fail."""
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    def stalled_for(self) -> float:
        """Seconds that the network evaluation in progress has taken so far."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests; finish those in progress (or drop them) and end the thread."""
        with self._changed:
            self._stopping = True
            if not drain:
                for job in (*self._waiting, *(track.job for track in self._running)):
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
                        rows = sum(track.rows for track in self._running)
                        joining = self._waiting.admit(rows, self.profile)
                    self._start(joining)
                    for tracks in self._groups():
                        self._step(tracks)
        except BaseException as error:
            log.exception("the engine's thread ended")
            with self._changed:
                self._stopping = True
                jobs = [*self._waiting, *(track.job for track in self._running)]
                self._waiting.clear()
                self._running.clear()
            for job in jobs:
                self._fail(job, EngineError(f"the engine ended: {type(error).__name__}"))
        finally:
            self.model.close()

    def _drop_stopped(self) -> None:
        for job in self._waiting.take_stopped():
            self._fail(job, job.reason_to_stop())
        for track in [track for track in self._running if track.job.reason_to_stop()]:
            self._running.remove(track)
            self.model.drop(track)
            self._fail(track.job, track.job.reason_to_stop())

    def _measure_profile(self) -> None:
        """Time the network at its own size, before the first request."""
        try:
            self.model.prepare(self.max_rows)
            self.profile = measure_profile(
                self.model.evaluate, self.max_rows, budget_s=self._profile_s
            )
        except Exception as error:  # too wide for the memory, for example: requests will show it
            known = isinstance(error, UsageError)
            log.error("no batch profile; batches stay narrow: %s", error, exc_info=not known)
            self.profile = BatchProfile(narrow=2, wide=2, pays=False, complete=False)
            return
        self._row_rate.expect(self.profile.rows_per_second(self.profile.wide))
        log.info("batching profile: %s", self.profile)

    def _start(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            tracks = self.model.begin(jobs)
        except Exception as error:
            log.exception("the text encoder failed")
            for job in jobs:
                self._fail(job, EngineError(f"the text encoder failed: {type(error).__name__}"))
            return
        for job, track in zip(jobs, tracks, strict=True):
            if isinstance(track, Exception):
                log.error("could not start a request", exc_info=track)
                self._fail(job, EngineError(f"could not start: {first_line(track)}"))
                continue
            job.started, job.rows = time.monotonic(), track.rows
            with self._changed:
                self._running.append(track)

    def _groups(self) -> list[list[Track]]:
        """Group the running tracks by those that can share a forward pass."""
        groups: dict[object, list[Track]] = {}
        for track in self._running:
            groups.setdefault(track.group, []).append(track)
        return list(groups.values())

    def _step(self, tracks: list[Track]) -> None:
        began = self._step_began = time.monotonic()
        width = sum(track.rows for track in tracks)
        try:
            problems = self.model.advance(tracks)
        except Exception as error:
            log.exception("a network evaluation failed")
            self._failures += 1
            self._leave(tracks)
            for track in tracks:
                self.model.drop(track)
                self._fail(track.job, EngineError(f"the network failed: {type(error).__name__}"))
            return
        finally:
            self._step_began = None
        self._failures = 0
        ended = time.monotonic()
        if self._step_ended is not None:
            self._row_rate.add(width, ended - self._step_ended)
        self._step_ended = ended
        self._on_step(
            StepReport(
                rows=width, requests=len(tracks), waiting=self.waiting, seconds=ended - began
            )
        )
        leaving = []
        for track, problem in zip(tracks, problems, strict=True):
            job = track.job
            if job.step + 1 in job.preview_at and problem is None:
                self._show(track, job.preview_at[job.step + 1])
            job.step += 1
            job.batch_rows.append(width)
            if problem is not None or track.finished:
                leaving.append((track, problem))
        if leaving:
            self._leave([track for track, _ in leaving])
        for track, problem in leaving:
            self._finish(track, problem)

    def _show(self, track: Track, index: int) -> None:
        """Hand out a preview."""
        assert track.job.on_preview is not None
        try:
            track.job.on_preview(track.job, index, self.model.preview(track))
        except Exception:
            log.exception("a preview was lost")

    def _leave(self, tracks: list[Track]) -> None:
        gone = {id(track) for track in tracks}
        with self._changed:
            self._running = [track for track in self._running if id(track) not in gone]

    def _finish(self, track: Track, problem: Exception | None) -> None:
        job, stepped = track.job, time.monotonic()
        try:
            if problem is not None:
                raise problem
            pixels = self.model.pixels(track)
        except Exception as error:
            log.exception("an image could not be finished")
            reason = error.message if isinstance(error, ModelopsError) else type(error).__name__
            self._fail(job, EngineError(f"no usable image: {reason}"))
            return
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(job_to_image(job, pixels, stepped=stepped))

    def _fail(self, job: Job, error: ServingError | None) -> None:
        reason = {CancelledError: "cancelled", DeadlineError: "deadline"}.get(type(error), "failed")  # type: ignore[arg-type]
        if job.step:
            self._on_wasted(job.step, reason)
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(error or EngineError("unknown"))

    def _backlog_seconds(self) -> float:
        jobs = [*self._waiting, *(track.job for track in self._running)]
        return self._row_rate.seconds_for(sum(job.remaining for job in jobs))
