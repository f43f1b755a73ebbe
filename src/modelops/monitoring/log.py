"""A drift log to its rows; what does not belong to the release is counted and left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from modelops.base.errors import UsageError
from modelops.base.files import sha256_bytes, sha256_json
from modelops.monitoring.rows import PREFIX, ImageRow, RequestRow, row_of
from modelops.records.base import InputRef


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time [start, end) in Unix seconds; None leaves that end open."""

    start: float | None = None
    end: float | None = None

    def holds(self, moment: float) -> bool:
        """Return whether a moment is in it."""
        return (self.start is None or moment >= self.start) and (
            self.end is None or moment < self.end
        )

    def overlaps(self, other: Span) -> bool:
        """Return whether a moment can be in both."""
        starts = [one.start for one in (self, other) if one.start is not None]
        ends = [one.end for one in (self, other) if one.end is not None]
        return not starts or not ends or max(starts) < min(ends)

    def __str__(self) -> str:
        return f"{_utc(self.start)}..{_utc(self.end)}"


@dataclass(slots=True)
class DriftRows:
    """Rows of one release in order of time.

    Attributes:
        refused: number of lines that were left out, by reason.
        ref: the log's files as one input, by digest.
    """

    requests: list[RequestRow] = field(default_factory=list)
    images: list[ImageRow] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    ref: InputRef = field(default_factory=lambda: InputRef(path="", sha256=""))

    def within(self, span: Span) -> DriftRows:
        """The rows of a stretch of time."""
        return DriftRows(
            [row for row in self.requests if span.holds(row.time)],
            [row for row in self.images if span.holds(row.time)],
            self.refused, self.ref,
        )  # fmt: skip


def parse_span(text: str) -> Span:
    """`FROM..TO` to a span: ISO dates or times, UTC unless they say otherwise; either may be left
    out. A date alone is its midnight.

    Raises:
        UsageError: it is something else, or ends before it begins.
    """
    first, dots, last = text.partition("..")
    if not dots:
        raise UsageError(f"{text!r}: not FROM..TO", hint="such as 2026-11-01..2026-11-08")
    span = Span(_moment(first, text), _moment(last, text))
    if span.start is not None and span.end is not None and span.start >= span.end:
        raise UsageError(f"{text!r}: ends before it begins")
    return span


def read_log(path: str | Path, *, release_sha256: str, model_sha256: str) -> DriftRows:
    """Read the rows of a release in a drift log: a folder, or one of its files.

    An incomplete last line is being written, or was left by a killed process; it is left out
    without being counted.

    Raises:
        UsageError: the log does not exist.
    """
    source = Path(path)
    files = sorted(source.glob(f"{PREFIX}*.jsonl")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UsageError(
            f"{source}: no drift log here",
            hint="start the node with --drift-log DIR, or MODELOPS_DRIFT_LOG",
        )
    found = DriftRows()
    digests: dict[str, str] = {}
    for file in files:
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            continue  # the node has made room meanwhile
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror or error}") from error
        digests[file.name] = sha256_bytes(data)
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            _take(line, found, release_sha256, model_sha256)
    found.requests.sort(key=lambda row: row.time)
    found.images.sort(key=lambda row: row.time)
    found.ref = InputRef(path=str(source), sha256=sha256_json(digests))
    return found


def _take(line: bytes, found: DriftRows, release_sha256: str, model_sha256: str) -> None:
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("no object")
        row = row_of(values)
    except (ValueError, RecursionError):
        found.refused["damaged"] += 1
        return
    if row.model != model_sha256:
        found.refused[f"of another model ({row.model[:12]})"] += 1
    elif row.release != release_sha256:
        found.refused[f"of another release ({row.release[:12]})"] += 1
    elif isinstance(row, RequestRow):
        found.requests.append(row)
    else:
        found.images.append(row)


def _moment(text: str, whole: str) -> float | None:
    if not text.strip():
        return None
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise UsageError(
            f"{whole!r}: {text!r} is no ISO date or time", hint="such as 2026-11-01T12:00"
        ) from error
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _utc(moment: float | None) -> str:
    if moment is None:
        return ""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
