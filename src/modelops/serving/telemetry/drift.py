"""Drift log: features and scores of a share of the requests, for `modelops monitor`.

    request ─▶ sampled? ─▶ bounded queue ─▶ features, in a slow thread ─▶ drift-*.jsonl

No image and nothing of a prompt's text is kept. A request never waits: what the queue cannot take
is dropped and counted, and a full disk loses lines, not requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ModelopsError
from modelops.metrics.protocol import protocol_id
from modelops.monitoring.extractors import features_protocol, open_extractor
from modelops.monitoring.policy import DEFAULT_EVALUATE_EVERY_DAYS, released_monitoring
from modelops.monitoring.rows import PREFIX, features_to_text
from modelops.monitoring.scripts import script_shares
from modelops.releases.verify import released_evaluations
from modelops.serving.telemetry.outage import EVERY_S, Outage
from modelops.serving.telemetry.segments import SegmentLog, result_counter

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from modelops.records.release import ReleaseRecord
    from modelops.serving.engine.jobs import EngineImage
    from modelops.serving.settings import NodeSettings

log = logging.getLogger("modelops.serving")

MAX_WAITING = 64  # rows
MAX_WAITING_BYTES = 64_000_000  # of their pixels
NICE = 10  # of the thread: a tenth of a busy core, and enough to let go of the interpreter's lock
_KEY = secrets.token_bytes(32)  # of the tags; in memory only


@dataclass(slots=True)
class _Row:
    values: dict[str, Any]
    pixels: npt.NDArray[np.uint8] | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.pixels is None else self.pixels.nbytes


@dataclass(slots=True)
class DriftLog:
    """Writer of the rows of sampled requests. Any thread may add rows, and never waits.

    Attributes:
        segments: sink of the rows.
        identity: digests of the release and its model, which every row has.
        filters: names of the prompt and the image filter.
        sample: share of the requests that are logged; all images of such a request are.
        extractor: of the features; None logs none.
        results: counter labelled written, failed (no room on the disk, or an odd row) or dropped
            (fell behind).
    """

    segments: SegmentLog
    identity: Mapping[str, str]
    filters: Mapping[str, str]
    sample: float
    extractor: Any = None
    results: Any = None
    _extractor_sha256: str = ""
    _features: Outage = field(default_factory=lambda: Outage("features of the drift log"))
    _waiting: queue.Queue[_Row | None] = field(default_factory=lambda: queue.Queue(MAX_WAITING))
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None
    _ends: bool = False

    def __post_init__(self) -> None:
        if self.extractor is not None:
            self._extractor_sha256 = protocol_id(self.extractor.protocol)
        self._thread = threading.Thread(target=self._run, name="modelops-drift", daemon=True)
        self._thread.start()

    def takes(self, request_id: str) -> bool:
        """Return whether a request is in the sample; the same for the same id in this process.

        Nobody can choose an id that is in or out, as the key is not known; but a client that sends
        one id for all its requests is in or out as a whole.
        """
        return int(_tag("sample", request_id), 16) < self.sample * 2**64

    def note_request(
        self, request_id: str, prompt: str, *, tokens: int, blocked: bool
    ) -> None:  # fmt: skip
        """Log the prompt filter's answer on a request, if it is in the sample."""
        if not self.takes(request_id):
            return
        self._put(
            _Row(
                self._common("request", request_id, prompt, self.filters["prompt"])
                | {
                    "blocked": blocked,
                    "characters": len(prompt),
                    "tokens": tokens,
                    "scripts": script_shares(prompt),
                }
            )
        )

    def note_images(
        self,
        request_id: str,
        images: Sequence[EngineImage],
        scores: Sequence[float],
        blocked: Sequence[bool],
        seconds: Mapping[str, float],
    ) -> None:
        """Log the image filter's answer on a request's images, if it is in the sample.

        Args:
            seconds: by phase, and `total`.
        """
        if not self.takes(request_id):
            return
        for image, score, stopped in zip(images, scores, blocked, strict=True):
            request = image.request
            values = self._common("image", request_id, request.prompt, self.filters["image"]) | {
                "blocked": bool(stopped),
                "score": round(float(score), 6),
                "steps": request.steps,
                "guidance": request.guidance,
                "rows": round(float(image.mean_rows), 2),
                "seconds": {name: round(value, 4) for name, value in seconds.items()},
            }
            self._put(_Row(values, image.pixels if self.extractor is not None else None))

    def flush(self, timeout_s: float = 10.0) -> None:
        """Wait until all queued rows are written, for `timeout_s` seconds at most."""
        deadline = time.monotonic() + timeout_s
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write the queued rows, for `timeout_s` seconds at most, and end the thread; the rest is
        dropped and counted."""
        self.flush(timeout_s)
        with self._lock:
            self._ends = True
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        if self._thread is not None:
            self._thread.join(timeout_s)
        with contextlib.suppress(queue.Empty):
            while True:
                if self._waiting.get_nowait() is not None:
                    self.results.labels("dropped").inc()
        with contextlib.suppress(queue.Full):  # this may have been the item that ends the thread
            self._waiting.put_nowait(None)
        self.segments.close()

    def _common(self, kind: str, request_id: str, prompt: str, name: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "schema_version": 1,
            "time": round(time.time(), 3),
            **self.identity,
            "request": _tag("request", request_id),
            "prompt": _tag("prompt", prompt),
            "filter": name,
        }

    def _put(self, row: _Row) -> None:
        """Queue a row, or drop and count it; never blocks and never raises."""
        with self._lock:
            fits = self._bytes + row.bytes <= MAX_WAITING_BYTES and not self._ends
            if fits:
                try:
                    self._waiting.put_nowait(row)
                    self._bytes += row.bytes
                    return
                except queue.Full:
                    pass
        self.results.labels("dropped").inc()

    def _run(self) -> None:
        if sys.platform == "linux":  # there a thread has a priority of its own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        quiet_until = 0.0
        while not self._ends and (row := self._waiting.get()) is not None:
            try:
                self._write(row)
            except Exception:  # one bad row must not end the log
                self.results.labels("failed").inc()
                if time.monotonic() >= quiet_until:
                    quiet_until = time.monotonic() + EVERY_S
                    log.exception("a row of the drift log could not be made")
            finally:
                with self._lock:
                    self._bytes -= row.bytes
                self._waiting.task_done()

    def _write(self, row: _Row) -> None:
        values = row.values
        if row.pixels is not None and self.extractor is not None:
            try:  # one image's failure says nothing about the next
                text = features_to_text(self.extractor.images_to_features([row.pixels])[0])
            except Exception as error:
                self._features.failed(str(error))
            else:
                self._features.worked()
                values |= {"extractor": self._extractor_sha256, "features": text}
        line = json.dumps(values, separators=(",", ":"), allow_nan=False)
        self.segments.write_line(line.encode("ascii"))


def open_drift_log(
    settings: NodeSettings,
    release_dir: str | Path,
    release: ReleaseRecord,
    *,
    release_sha256: str,
    model_sha256: str,
    filters: Mapping[str, str],
    registry: CollectorRegistry | None = None,
) -> DriftLog | None:
    """Open the drift log of a node; None if the settings name no folder.

    Raises:
        UsageError: the limit is out of range.
        ModelopsError: the folder cannot be written to.
    """
    if not settings.drift_log:
        return None
    extractor = None
    evaluations = list(released_evaluations(release_dir, release).values())
    try:
        if not evaluations:
            raise ModelopsError("the release holds no evaluation of its model")
        extractor = open_extractor(features_protocol(evaluations[-1]))
    except ModelopsError as error:
        log.warning("drift log without the images' features: %s", error.message)
    text = "Rows of the drift log: written, failed (disk) or dropped (it fell behind)"
    counter = result_counter(
        "modelops_drift_rows", text, registry, "written", "failed", "dropped"
    )  # fmt: skip
    segments = SegmentLog(
        settings.drift_log, prefix=PREFIX, max_bytes=settings.drift_log_mb * 1_000_000,
        what="drift log", writers=settings.workers, counter=counter,
    )  # fmt: skip
    return DriftLog(
        segments=segments,
        identity={"release": release_sha256, "model": model_sha256},
        filters=filters,
        sample=settings.drift_sample,
        extractor=extractor,
        results=counter,
    )


def _tag(purpose: str, text: str) -> str:
    """Return 16 hex digits that only this process can make again."""
    data = f"{purpose}\x1f{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=8, key=_KEY).hexdigest()


def evaluation_cadence(release_dir: str | Path, settings: NodeSettings) -> float:
    """Return the days after which an evaluation is overdue: the node's setting, else the released
    policy's, else 30.

    Raises:
        ConfigError: the released policy's `monitoring:` section is not valid.
    """
    if settings.evaluate_every_days > 0:
        return settings.evaluate_every_days
    policy = released_monitoring(release_dir)
    return policy.evaluate_every_days if policy else DEFAULT_EVALUATE_EVERY_DAYS
