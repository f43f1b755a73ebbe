"""Sink of lines: files in a folder that never grows beyond a limit.

Each line is one write: a killed process loses none, a power cut may lose the last ones, and a full
disk leaves no half line before the next. Every log writes its own files, so that several processes
may share a folder; the oldest files are deleted first. A new file's name sorts behind those that
are there, so that a clock that was set back makes no new line the oldest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from modelops.base.errors import ModelopsError, UsageError
from modelops.serving.telemetry.outage import Outage
from modelops.serving.telemetry.stamps import next_stamp, stamp_to_ns

SEGMENTS = 32  # a full folder loses a 32nd of its oldest lines at once
LONGEST = 8192  # bytes of a usual line, at most; a file is to hold one
LOGS = 2  # of a process: a canary writes beside the release that it is to follow


class SegmentLog:
    """Log of lines in segment files. Thread-safe.

    Args:
        folder: made when it is missing.
        prefix: of the files' names; files that no log of this prefix wrote are left alone.
        max_bytes: of all these files together. A line longer than a file may exceed it.
        what: name of the content, for messages.
        writers: processes that share the folder; each may fill the files it writes.
        counter: labelled `result`, written or failed.
        clock: nanoseconds since 1970, for the files' names.

    Raises:
        UsageError: the limit is too small.
        ModelopsError: the folder cannot be made or written to.
    """

    def __init__(
        self, folder: str | Path, *, prefix: str, max_bytes: int, what: str, writers: int = 1,
        counter: Counter | None = None, clock: Callable[[], int] = time.time_ns,
    ) -> None:  # fmt: skip
        if max_bytes < SEGMENTS * LONGEST * writers:
            raise UsageError(
                f"{what}: {max_bytes} bytes are too few", hint=f"use {writers} MB or more"
            )
        self.folder = Path(folder)
        self.segment_bytes = max_bytes // (SEGMENTS * writers)
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._writers = writers
        self._lock = threading.Lock()
        self._file: int | None = None
        self._written = 0
        self._outage = Outage(what)
        self._counter = counter
        self._clock = clock
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # No file before there is a line: a node that is started over and over would fill the
            # folder with empty ones, which no limit of bytes takes away.
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ModelopsError(
                f"{self.folder}: {what} cannot be kept here: {error.strerror or error}",
                hint=f"choose another folder for {what}, or leave it out",
            ) from error

    def write_line(self, line: bytes) -> bool:
        """Append one line without its end; return False if it could not be written, which is
        counted and logged at a limited rate."""
        try:
            with self._lock:
                self._append(line + b"\n")
        except OSError as error:
            self._count("failed")
            self._outage.failed(error.strerror or str(error))
            return False
        self._outage.worked()
        self._count("written")
        return True

    @property
    def failing(self) -> bool:
        """Return whether the last line could not be kept."""
        return self._outage.failing

    def close(self) -> None:
        """Close the file; a later write opens another."""
        with self._lock:
            self._close()

    def _count(self, result: str) -> None:
        if self._counter is not None:
            self._counter.labels(result).inc()

    def _append(self, line: bytes) -> None:
        full = self._written and self._written + len(line) > self.segment_bytes
        # An idle worker may find its file deleted: it was the oldest when a busy one made room.
        if self._file is None or full or os.fstat(self._file).st_nlink == 0:
            self._close()
            self._open()
        assert self._file is not None
        done = os.write(self._file, line)
        if done != len(line):
            try:
                os.ftruncate(self._file, self._written)  # no half line stays before the next one
            except OSError:
                self._close()  # it stays at the end of this file, where readers expect one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._written += done

    def _open(self) -> None:
        self._make_room()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        while self._file is None:
            stamp = next_stamp(self._clock(), (stamp for stamp, _ in self._files()))
            path = self.folder / f"{self._prefix}{stamp}-{os.getpid()}.jsonl"
            with contextlib.suppress(FileExistsError):  # another log of this process took the name
                self._file = os.open(path, flags, 0o600)
        self._written = 0

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield (stamp, path) of the files that logs of this prefix wrote."""
        for path in self.folder.glob(f"{self._prefix}*.jsonl"):
            stamp, _, process = path.stem.removeprefix(self._prefix).rpartition("-")
            if process.isdigit() and stamp_to_ns(stamp) is not None:
                yield stamp, path

    def _make_room(self) -> None:
        """Delete the oldest files until there is room for all open ones when they are full."""
        needed = LOGS * self._writers * self.segment_bytes
        sizes = {}
        for _, path in sorted(self._files()):
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total + needed <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def result_counter(
    name: str, text: str, registry: CollectorRegistry | None, *results: str
) -> Counter:
    """Make a counter labelled `result`, whose series start at 0."""
    counter = Counter(name, text, ["result"], registry=registry)
    for result in results:
        counter.labels(result)
    return counter
