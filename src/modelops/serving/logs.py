"""Log records to JSON lines, written by a thread that never holds up a request.

A full disk, a closed pipe or a reader that stands still loses lines, which are counted; it never
blocks or fails a request. Prompts are left out unless they are asked for.
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
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from modelops.errors import UsageError

PROMPTS_VARIABLE = "MODELOPS_LOG_PROMPTS"
FILE_VARIABLE = "MODELOPS_LOG_FILE"
FORMAT_VARIABLE = "MODELOPS_LOG_FORMAT"
MAX_WAITING = 10_000  # lines; about 5 MB
_YES = ("1", "true", "yes")
_NO = ("", "0", "false", "no")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the record's fields, the exception.

    Args:
        prompts: also write the prompts; otherwise they are taken out of exceptions too, which may
            quote them.
        quoted: the prompts of the requests in hand, for that.
    """

    def __init__(
        self, *, prompts: bool = False, quoted: Callable[[], list[str]] | None = None
    ) -> None:
        super().__init__()
        self._prompts = prompts
        self._quoted = quoted or (lambda: [])

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
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
        """The traceback, without prompts unless they are asked for."""
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return text if self._prompts else redact(text, self._quoted())


class PlainLines(JsonLines):
    """The same for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it."""
        moment = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        text = f"{moment} {record.levelname.lower()} {record.getMessage()}"
        if name := getattr(record, "fields", {}).get("request_id"):
            text += f"  {name}"
        if self._prompts and getattr(record, "prompts", None):
            text += f"  {json.dumps(record.prompts, ensure_ascii=False)}"  # type: ignore[attr-defined]
        return f"{text}\n{self.exception(record)}" if record.exc_info else text


class LineWriter(logging.Handler):
    """Hands lines to a thread that writes them to a file descriptor.

    Args:
        descriptor: written with os.write; closed by `close` if `own`.
        on_lost: called with the number of lines that were lost, by any thread.
        max_waiting: lines that may wait to be written.
    """

    def __init__(
        self,
        descriptor: int,
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
        """Wait until what waits is written, for `timeout_s` seconds at most."""
        deadline = time.monotonic() + timeout_s
        while (
            self._lines.unfinished_tasks and self._thread.is_alive() and time.monotonic() < deadline
        ):
            time.sleep(0.005)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, for `timeout_s` seconds at most, and end the thread."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)
        if self._own and not self._thread.is_alive() and self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1
        super().close()

    def _lose(self) -> None:
        self.lost += 1
        with contextlib.suppress(Exception):
            self.on_lost(1)

    def _run(self) -> None:
        torn = False  # the last write stopped within a line
        while (line := self._lines.get()) is not None:
            data = b"\n" + line if torn else line
            left = data
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
                torn = False
            except OSError:
                torn = torn if left is data else True
                self._lose()
            finally:
                self._lines.task_done()


class Prompts:
    """The prompts of the requests in hand, so that they can be taken out of exceptions."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}

    @contextlib.contextmanager
    def in_hand(self, *texts: str | None) -> Any:
        """Take these texts out of whatever is logged meanwhile."""
        key = id(token := object())
        self._texts[key] = [text for text in texts if text]
        try:
            yield token
        finally:
            del self._texts[key]

    def texts(self) -> list[str]:
        """All of them, longest first."""
        return sorted({text for texts in list(self._texts.values()) for text in texts},
                      key=len, reverse=True)  # fmt: skip


PROMPTS = Prompts()


def redact(text: str, prompts: list[str]) -> str:
    """The text with every prompt of three or more characters, plain or escaped, taken out."""
    for prompt in prompts:
        if len(prompt) < 3:
            continue
        for form in (prompt, repr(prompt)[1:-1], json.dumps(prompt)[1:-1]):
            text = text.replace(form, "[prompt]")
    return text


def log_prompts(environment: Mapping[str, str]) -> bool:
    """Whether prompts are to be logged.

    Raises:
        UsageError: the variable says neither yes nor no.
    """
    value = environment.get(PROMPTS_VARIABLE, "").strip().lower()
    if value not in _YES + _NO:
        raise UsageError(f"{PROMPTS_VARIABLE}={value!r}: neither yes nor no", hint="use 1 or 0")
    return value in _YES


def configure_logging(
    environment: Mapping[str, str], *, on_lost: Callable[[int], Any] | None = None
) -> LineWriter:
    """Send modelops' log records to stderr or MODELOPS_LOG_FILE, as JSON or for a terminal.

    MODELOPS_LOG_FORMAT is `json`, `text` or `auto` (text on a terminal). Replaces an earlier
    configuration. A file is appended to and never rotated here.

    Raises:
        UsageError: a variable has an unknown value, or the file cannot be opened.
    """
    prompts = log_prompts(environment)
    kind = environment.get(FORMAT_VARIABLE, "auto").strip().lower()
    if kind not in ("auto", "json", "text"):
        raise UsageError(f"{FORMAT_VARIABLE}={kind!r}: unknown", hint="json, text or auto")
    path = environment.get(FILE_VARIABLE, "")
    descriptor = 2
    if path:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise UsageError(f"{FILE_VARIABLE}={path}: {error.strerror or error}") from error
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
