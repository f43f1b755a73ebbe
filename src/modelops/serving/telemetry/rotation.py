"""Log file that several processes append to, rotated at a size and reopened when it was moved.

No signal is needed after a logrotate from outside, by renaming or by copying and truncating: before
each line the file at the path is compared with the one that is open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

_PATIENCE_S = 1.0  # another process needs microseconds to rotate


class RotatingFile:
    """Append-only file PATH, with older ones PATH.1 (the newest) to PATH.<keep>.

    No line is lost between processes. Only one process rotates, under a lock on the file itself. A
    process that still has the old file open writes its line there, where it stays until `keep`
    further rotations. Each process may exceed the size by one line.

    Args:
        path: made when it is missing; a pipe or a device is written to and never rotated.
        max_bytes: a line that would go beyond starts a new file; 0 rotates nothing.
        keep: older files that are kept, 1 or more.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, max_bytes: int, keep: int) -> None:
        self.path = Path(path)
        self._max_bytes, self._keep = max_bytes, keep
        self._descriptor = -1
        self._open()
        self._regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)

    def descriptor(self, size: int) -> int:
        """Return the descriptor for a line of `size` bytes, valid until the next call.

        Only one thread may call this.

        Raises:
            OSError: the file is full and cannot be rotated, or is gone and cannot be made.
        """
        if self._descriptor < 0:
            raise OSError("the file is closed")
        if not self._regular:
            return self._descriptor
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            there = self._stat()
            mine = os.fstat(self._descriptor)
            if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
                self._open()
            elif not self._max_bytes or not there.st_size + size > self._max_bytes:
                break
            elif not there.st_size:
                break  # a line longer than a file may be
            elif not self._rotate():
                if time.monotonic() > deadline:
                    break  # another program holds the lock: better a large file than no log
                time.sleep(0.001)
        return self._descriptor

    def close(self) -> None:
        """Close it; lines can no longer be written."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        opened = os.open(self.path, flags, 0o640)
        with contextlib.suppress(OSError):
            self.close()
        self._descriptor = opened

    def _stat(self) -> os.stat_result | None:
        try:
            return self.path.stat()
        except FileNotFoundError:
            return None

    def _rotate(self) -> bool:
        """Rename the files; return False if another process is doing so."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            there, mine = self._stat(), os.fstat(self._descriptor)
            if there is None or there.st_ino != mine.st_ino:
                return True  # another process was faster
            for number in range(self._keep - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    self._older(number).replace(self._older(number + 1))
            self.path.replace(self._older(1))  # last: until then nobody makes a new one
            return True
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
