"""Clock of a folder whose entries expire: it never goes back, and a jump moves it by a day at most.

A machine's clock may start in 1970, or be set forty days ahead for a moment. Entries are dated and
expire by this clock instead, which all processes of the folder share in a small file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("modelops.serving")

DAY_S = 86400.0
CATCH_UP_S = 3600.0  # a node that was off for long catches up by a day each hour
_NOTE_S = 60.0
_FILE = ".clock"


class FolderClock:
    """Clock of one folder. Any process may read it at any time.

    It follows the machine's clock while that moves on by less than a day between two readings.
    While the machine's clock is behind it, it stands still. When the machine's clock is further
    ahead than a day, because it jumped or because nobody wrote here meanwhile, this one moves on by
    a day at once and by another after each hour.

    Args:
        folder: holds the file in which the clock is kept.
        newest: seconds since 1970 of the newest entry, for a folder without that file.
        wall: the machine's clock, in seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        newest: Callable[[], float | None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = folder / _FILE
        self._newest = newest
        self._wall = wall
        self._seen = float("-inf")
        self._caught_up: float | None = None  # by time.monotonic()

    def now(self) -> float:
        """Return the time in seconds since 1970."""
        wall = self._wall()
        kept = self._read()
        if kept is None:
            newest = self._newest()
            kept = (wall if newest is None else min(newest, wall), float("-inf"))
            self._write(*kept)
        time_s, noted_s = max(kept[0], self._seen), kept[1]
        if wall <= time_s + DAY_S:
            if wall > kept[0] + _NOTE_S:
                self._write(wall, wall)
            time_s = max(wall, time_s)
        elif self._may_catch_up(wall - noted_s):
            log.warning(
                "%s: the clock is %.1f days ahead of the time last seen here; entries expire by a "
                "day now and another each hour until it is reached",
                self._path.parent, (wall - time_s) / DAY_S,
            )  # fmt: skip
            time_s += DAY_S
            self._write(time_s, wall)
        self._seen = time_s
        return time_s

    def _may_catch_up(self, since_s: float) -> bool:
        """Return whether an hour has passed, by this process's own count and by the last note."""
        now = time.monotonic()
        if self._caught_up is not None and now - self._caught_up < CATCH_UP_S:
            return False
        if 0 <= since_s < CATCH_UP_S:
            return False
        self._caught_up = now
        return True

    def _read(self) -> tuple[float, float] | None:
        try:
            first, second = self._path.read_text("ascii").split()
            return float(first), float(second)
        except (OSError, ValueError):
            return None

    def _write(self, time_s: float, noted_s: float) -> None:
        """Overwrite in place, which a full disk allows."""
        with contextlib.suppress(OSError):
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, f"{time_s:>20.6f} {noted_s:>20.6f}\n".encode(), 0)
            finally:
                os.close(file)
