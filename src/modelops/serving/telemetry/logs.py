"""JSON lines of log records, written by a thread that never delays a request.

A full disk, a closed pipe or a reader that hangs loses lines, which are counted; it never
blocks or fails a request. Prompts are left out unless the settings ask for them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelops.base.errors import UsageError
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.rotation import RotatingFile

LOG_MB = 100.0  # where nothing else is said
MAX_WAITING = 10_000  # lines; about 5 MB


class JsonLines(logging.Formatter):
    """Formatter of JSON lines: time, level, logger, message, the record's fields, the exception.

    Args:
        prompts: also write the prompts; otherwise they are removed from exceptions too, which may
            quote them.
        quoted: the prompts of the requests in progress, to remove from exceptions.
    """

    def __init__(
        self, *, prompts: bool = False, quoted: Callable[[], list[str]] | None = None
    ) -> None:
        super().__init__()
        self._prompts = prompts
        self._quoted = quoted or (lambda: [])

    def format(self, record: logging.LogRecord) -> str:
        """Format the line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if self._prompts:
            line |= getattr(record, "prompts", {})
        if record.exc_info:
            line["exception"] = self.exception(record)
        return json.dumps(line, default=str)  # ASCII: no character in it can end a line

    def exception(self, record: logging.LogRecord) -> str:
        """Format the traceback, without prompts unless they are asked for."""
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return text if self._prompts else redact(text, self._quoted())


class PlainLines(JsonLines):
    """Formatter of the same lines for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the line, and a traceback below it."""
        moment = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        text = f"{moment} {record.levelname.lower()} {record.getMessage()}"
        if name := getattr(record, "fields", {}).get("request_id"):
            text += f"  {name}"
        if self._prompts and getattr(record, "prompts", None):
            text += f"  {json.dumps(record.prompts, ensure_ascii=False)}"  # type: ignore[attr-defined]
        return f"{text}\n{self.exception(record)}" if record.exc_info else text


class LineWriter(logging.Handler):
    """Sink that passes lines to a thread, which writes them to a descriptor or a RotatingFile.

    Args:
        descriptor: written with os.write; closed by `close` if `own`.
        on_lost: called with the number of lines that were lost, by any thread.
        max_waiting: lines that may wait to be written.
    """

    def __init__(
        self,
        descriptor: int | RotatingFile,
        *,
        own: bool = False,
        on_lost: Callable[[int], Any] | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._own = own
        self.on_lost = on_lost or (lambda lines: None)
        self.lost = 0
        self._lines: queue.Queue[bytes | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="modelops-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; never blocks and never raises."""
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            self._lines.put_nowait(line)
        except Exception:
            self._lose()

    def flush(self, timeout_s: float = 2.0) -> None:
        """Wait until all queued lines are written, for `timeout_s` seconds at most."""
        deadline = time.monotonic() + timeout_s
        while (
            self._lines.unfinished_tasks and self._thread.is_alive() and time.monotonic() < deadline
        ):
            time.sleep(0.005)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write the queued lines, for `timeout_s` seconds at most, and end the thread."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)
        if self._own and not self._thread.is_alive():
            with contextlib.suppress(OSError):
                if isinstance(self._descriptor, RotatingFile):
                    self._descriptor.close()
                elif self._descriptor >= 0:
                    os.close(self._descriptor)
            self._descriptor = -1
        super().close()

    def _lose(self) -> None:
        self.lost += 1
        with contextlib.suppress(Exception):
            self.on_lost(1)

    def _run(self) -> None:
        torn: int | None = None  # the descriptor whose last write stopped within a line
        while (line := self._lines.get()) is not None:
            left = data = line
            target = -1
            try:
                target = self._target(len(line) + 1)
                left = data = b"\n" + line if torn == target else line
                while left:
                    left = left[os.write(target, left) :]
                torn = None
            except OSError:
                torn = torn if left is data else target
                self._lose()
            finally:
                self._lines.task_done()

    def _target(self, size: int) -> int:
        target = self._descriptor
        return target.descriptor(size) if isinstance(target, RotatingFile) else target


class Prompts:
    """Prompts of the requests in progress, so that they can be removed from exceptions."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}

    @contextlib.contextmanager
    def in_hand(self, *texts: str | None) -> Any:
        """Within the block, remove these texts from everything that is logged."""
        key = id(token := object())
        self._texts[key] = [text for text in texts if text]
        try:
            yield token
        finally:
            del self._texts[key]

    def texts(self) -> list[str]:
        """Return all of them, longest first."""
        return sorted({text for texts in list(self._texts.values()) for text in texts},
                      key=len, reverse=True)  # fmt: skip


PROMPTS = Prompts()


def redact(text: str, prompts: list[str]) -> str:
    """Remove every prompt of three or more characters, plain or escaped, from the text."""
    for prompt in prompts:
        if len(prompt) < 3:
            continue
        for form in (prompt, repr(prompt)[1:-1], json.dumps(prompt)[1:-1]):
            text = text.replace(form, "[prompt]")
    return text


def _open_file(settings: NodeSettings) -> RotatingFile:
    path, keep = settings.log_file, settings.log_keep
    # Where only an operator's own logrotate may rename files, a default must not stop the server.
    own = os.access(Path(path).parent, os.W_OK | os.X_OK)
    if not own and settings.log_mb:
        raise UsageError(
            f"MODELOPS_LOG_FILE={path}: cannot be rotated, its folder is not writable",
            hint="MODELOPS_LOG_MB=0, and rotate it from outside",
        )
    megabytes = LOG_MB if settings.log_mb is None else settings.log_mb
    limit = int(megabytes * 1e6 / (keep + 1)) if own else 0
    if 0 < limit < 4096:
        raise UsageError(f"MODELOPS_LOG_MB={megabytes:g}: too little for {keep + 1} files")
    try:
        return RotatingFile(path, max_bytes=limit, keep=keep)
    except OSError as error:
        raise UsageError(f"MODELOPS_LOG_FILE={path}: {error.strerror or error}") from error


def check_logging(settings: NodeSettings) -> None:
    """Check that the log file can be opened, and leave the process's logging as it is.

    Raises:
        UsageError: see `configure_logging`.
    """
    if settings.log_file:
        _open_file(settings).close()


def configure_logging(
    settings: NodeSettings, *, on_lost: Callable[[int], Any] | None = None
) -> LineWriter:
    """Send modelops' log records to stderr or to the settings' log file, as JSON or text.

    A file is rotated so that it and its older ones take `log_mb` megabytes at most, see
    RotatingFile; 0 rotates nothing. Replaces an earlier configuration.

    Raises:
        UsageError: the file cannot be opened or rotated.
    """
    kind, prompts, path = settings.log_format, settings.log_prompts, settings.log_file
    descriptor: int | RotatingFile = _open_file(settings) if path else 2
    if kind == "auto":
        kind = "text" if not path and sys.stderr.isatty() else "json"
    lines = PlainLines if kind == "text" else JsonLines
    handler = LineWriter(descriptor, own=bool(path), on_lost=on_lost)
    handler.setFormatter(lines(prompts=prompts, quoted=PROMPTS.texts))
    logger = logging.getLogger("modelops")
    for earlier in [entry for entry in logger.handlers if isinstance(entry, LineWriter)]:
        logger.removeHandler(earlier)
        earlier.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return handler
