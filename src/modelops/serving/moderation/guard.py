"""Safety filters behind a guard that fails closed.

A filter that is missing, raises, is slow, or answers nonsense never lets an image through:
`check_*` raises FilterError and the guard stays red until a probe of the same filter succeeds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.safety.image import SafetyFilterError
from modelops.safety.probe import require_discerning
from modelops.serving.failures import FilterError
from modelops.serving.telemetry.logs import PROMPTS, redact

log = logging.getLogger("modelops.serving")


class FilterGuard:
    """Guard that loads one filter and calls it in its own thread with a time limit.

    Args:
        name: "prompt" or "image", for messages.
        load: returns the filter; called in the guard's thread.
        timeout_s: a call that takes longer counts as a failure.
        load_timeout_s: the same for `load`.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Any],
        *,
        timeout_s: float = 10.0,
        load_timeout_s: float = 120.0,
    ) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self._load = load
        self._filter: Any = None
        self._reason: str | None = "not loaded yet"
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"modelops-{name}-filter")
        self._stuck: Future[Any] | None = None
        self._load_timeout_s = load_timeout_s
        self._last_probe = 0.0

    @property
    def reason(self) -> str | None:
        """Reason why the filter is red, or None."""
        return self._reason

    @property
    def info(self) -> dict[str, Any]:
        """Filter's own description (name, digests, threshold); {} when it gives none."""
        try:
            return dict(self._filter.info)
        except Exception:
            return {}

    def load(self) -> None:
        """Load the filter.

        Raises:
            FilterError: it cannot be loaded.
        """

        def make() -> None:
            self._filter = self._load()

        self._call(make, self._load_timeout_s)

    def probe(self, check: Callable[[], None], *, every_s: float = 0.0) -> bool:
        """Load if necessary and run `check`, at most every `every_s` seconds; green on success."""
        with self._lock:
            now = time.monotonic()
            if every_s and now - self._last_probe < every_s:
                return self._reason is None
            self._last_probe = now
        try:
            if self._filter is None:
                self.load()
            check()
        except FilterError:
            return False
        self._reason = None
        return True

    def check_prompt(self, text: str) -> tuple[bool, list[str]]:
        """Return (blocked, reasons) of a prompt.

        Raises:
            FilterError: no answer; the prompt must not be used.
        """

        def check() -> tuple[Any, list[str]]:
            result = self._required().check(text)
            return result.blocked, [str(reason) for reason in getattr(result, "reasons", [])]

        blocked, reasons = self._call(check, self.timeout_s)
        if not isinstance(blocked, (bool, np.bool_)):
            raise self.broken("gave no verdict")
        return bool(blocked), reasons

    def check_images(
        self, images: Sequence[npt.NDArray[np.uint8]]
    ) -> tuple[list[float], list[bool]]:
        """Return (scores in [0, 1], blocked) of images [H, W, 3].

        Raises:
            FilterError: no answer; the images must not be shown.
        """

        def check() -> list[tuple[float, Any]]:
            # Read here, where there is a time limit: a filter may answer with a generator.
            verdicts = self._required().check(list(images))
            return [(float(verdict.score), verdict.blocked) for verdict in verdicts]

        verdicts = self._call(check, self.timeout_s)
        if len(verdicts) != len(images):
            raise self.broken(f"gave {len(verdicts)} verdicts for {len(images)} images")
        for score, blocked in verdicts:
            if not 0.0 <= score <= 1.0:  # NaN too
                raise self.broken(f"gave a score of {score}")
            if not isinstance(blocked, (bool, np.bool_)):
                raise self.broken("gave no verdict")
        return [score for score, _ in verdicts], [bool(blocked) for _, blocked in verdicts]

    def require_discerning(self, scores: Sequence[float]) -> None:
        """Refuse an image filter whose answers do not depend on the image.

        Args:
            scores: that it gave to different images.

        Raises:
            FilterError: they are all the same, or its own probe failed.
        """

        def check() -> None:
            try:
                require_discerning(self._required(), scores)
            except SafetyFilterError as error:
                raise FilterError(error.message) from error

        self._call(check, self.timeout_s)

    def close(self) -> None:
        """Let the thread end; a hung filter is left behind."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _required(self) -> Any:
        if self._filter is None:
            raise FilterError("not loaded")
        return self._filter

    def _call(self, function: Callable[[], Any], timeout_s: float) -> Any:
        stuck = self._stuck
        if stuck is not None and not stuck.done():
            raise self.broken("still hangs in an earlier call")
        try:
            future = self._worker.submit(function)
        except RuntimeError as error:  # from a request that outlived its node's drain
            raise self.broken("is closed") from error
        try:
            return future.result(timeout_s)
        except FutureTimeoutError as error:
            # A call that had not begun did not hang: it waited behind others, and is cancelled.
            if not future.cancel() and not future.done():
                self._stuck = future
            raise self.broken(f"gave no answer in {timeout_s:g} s") from error
        except FilterError as error:
            raise self.broken(error.message) from error
        except Exception as error:
            log.exception("%s filter failed", self.name)
            # The reason shows in /readyz, and an exception may quote the prompt.
            said = redact(str(error), PROMPTS.texts())
            raise self.broken(f"failed ({type(error).__name__}: {said})") from error

    def broken(self, what: str) -> FilterError:
        """Turn the guard red; return the error to raise."""
        self._reason = what
        return FilterError(f"the {self.name} filter {what}")
