"""Rate-limited logging for a sink that fails: at the start, at the end, and once a minute."""

from __future__ import annotations

import logging
import threading
import time

log = logging.getLogger("modelops.serving")

EVERY_S = 60.0  # a disk that is nearly full takes one line and refuses the next


class Outage:
    """Counter of the lines that a sink lost, with rate-limited log lines. Thread-safe.

    Logs at most once in `EVERY_S` seconds, however often the sink fails and recovers.

    Args:
        what: name of the sink, for messages.
    """

    def __init__(self, what: str) -> None:
        self.failing = False
        self._what = what
        self._lock = threading.Lock()
        self._lost = 0  # since the last log line
        self._said: float | None = None
        self._open = False  # the last log line said that the sink fails

    def failed(self, reason: str) -> None:
        """Count one line that could not be written."""
        with self._lock:
            self.failing = True
            self._lost += 1
            now = time.monotonic()
            if self._said is not None and now - self._said < EVERY_S:
                return
            self._said, self._open = now, True
            lost, self._lost = self._lost, 0
        log.error("%s cannot be written: %s (%d lost)", self._what, reason, lost)

    def worked(self) -> None:
        """Note that a line was written."""
        if not self.failing:  # the usual way; a value that is a moment old does no harm
            return
        with self._lock:
            self.failing = False
            if not self._open:
                return
            self._open = False
            lost, self._lost = self._lost, 0
        log.warning("%s can be written again (%d more were lost)", self._what, lost)
