"""Review of quarantine entries: decisions by people, and their evidence on the filter's threshold.

Decisions are appended to a file beside the entries and outlive them. Each line holds the scores it
was about and the digest of the line before, so that a changed or removed line shows in the next.
This protects against accidents only. A change or loss of the last line does not show, nor does a
change by someone who can write to the folder and computes the digests again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import canonical_json, sha256_bytes, write_bytes
from modelops.serving.moderation.entry import Entry
from modelops.serving.moderation.store import PAGE, EntryFile, list_files, read_entry
from modelops.serving.provenance.receipts import Digest, utc_now

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

DECISIONS = "decisions.jsonl"
Answer = Literal["upheld", "overturned"]
_FIRST = "0" * 64
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Decision(BaseModel):
    """Reviewer's answer on an entry: `upheld` (rightly blocked) or `overturned` (a false alarm).

    `score` is the highest of the entry's images. `previous` is the sha256 of the line before.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["decision"] = "decision"
    schema_version: Literal[1] = 1
    entry: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    decision: Answer
    reviewer: Annotated[str, Field(min_length=1, max_length=200)]
    reason: Annotated[str, Field(min_length=1, max_length=2000)]
    decided: str
    entry_created: str
    stage: Literal["prompt", "image"]
    filter: str
    filter_sha256: Digest
    threshold: float | None = None
    score: float | None = None
    release_sha256: Digest
    previous: Digest


@dataclass(frozen=True, slots=True)
class Listed:
    """File of the quarantine; `entry` if it could be read, else `problem` with the reason."""

    file: EntryFile
    entry: Entry | None
    problem: str | None = None
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Decisions about one filter.

    Attributes:
        upheld, overturned: entries, each by its last decision.
        scores: (score, answer) of each entry with images.
    """

    stage: str
    filter: str
    filter_sha256: str
    threshold: float | None
    upheld: int
    overturned: int
    scores: tuple[tuple[float, Answer], ...]

    @property
    def decided(self) -> int:
        """Number of entries that were decided."""
        return self.upheld + self.overturned

    def at_thresholds(self) -> list[dict[str, float | int]]:
        """Count the blocks, right and wrong ones, that would stay at higher thresholds.

        Ends at the first threshold at which none would stay.
        """
        own = self.threshold or 0.0
        highest = self.scores[-1][0] if self.scores else -1.0
        above = [level for level in _THRESHOLDS if level > own]
        levels = [level for level, last in zip(above, [-1.0, *above], strict=False)
                  if last <= highest]  # fmt: skip
        return [
            {
                "threshold": level,
                "upheld_still_blocked": self._at(level, "upheld"),
                "overturned_still_blocked": self._at(level, "overturned"),
            }
            for level in levels
        ]

    def _at(self, level: float, answer: Answer) -> int:
        return sum(score >= level and said == answer for score, said in self.scores)


def list_entries(folder: str | Path, key: X25519PrivateKey | None = None) -> list[Listed]:
    """List all entries, oldest first, with their last decision; unreadable ones with the reason.

    Raises:
        UsageError: no such folder.
        IntegrityError: the file of decisions was changed.
    """
    last = last_decisions(read_decisions(folder))
    listed = []
    for file in list_files(folder):
        try:
            entry, problem = read_entry(file, key), None
        except ModelopsError as error:
            entry, problem = None, error.message
        listed.append(Listed(file, entry, problem, last.get(file.id)))
    return listed


def find_entry(folder: str | Path, start: str, key: X25519PrivateKey | None = None) -> Listed:
    """Return the entry whose id begins with `start`.

    Raises:
        UsageError: none or several match, or the entry is encrypted and no key is given.
        IntegrityError: the entry cannot be read.
    """
    found = [file for file in list_files(folder) if start and file.id.startswith(start.lower())]
    if len(found) != 1:
        raise UsageError(
            f"{folder}: {'no entry' if not found else f'{len(found)} entries'} whose id begins "
            f"with {start!r}",
            hint=f"modelops serve review {folder} lists them",
        )
    last = last_decisions(read_decisions(folder))
    return Listed(found[0], read_entry(found[0], key), None, last.get(found[0].id))


def read_decisions(folder: str | Path) -> list[Decision]:
    """Read all decisions in order; an incomplete last line was never acknowledged.

    Raises:
        IntegrityError: a line before the last was changed, inserted or removed.
        UsageError: the file cannot be read.
    """
    path = Path(folder) / DECISIONS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return _parse(path, data)


def decide(
    folder: str | Path,
    answers: Mapping[str, Answer],
    *,
    reviewer: str,
    reason: str,
    key: X25519PrivateKey | None = None,
) -> list[Decision]:
    """Append a decision on each entry, by id or its first digits; all of them or none.

    Raises:
        UsageError: an entry is missing or named twice, or there is no reviewer or reason.
        IntegrityError: the file of decisions was changed.
        ModelopsError: the file cannot be written.
    """
    found = [(find_entry(folder, start, key), answer) for start, answer in answers.items()]
    if len({listed.file.id for listed, _ in found}) != len(found):
        raise UsageError("an entry is named twice")
    path = Path(folder) / DECISIONS
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ModelopsError(f"{path}: cannot write: {error.strerror or error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with open(handle, "rb", closefd=False) as stream:
            before = stream.read()
        whole = before[: before.rfind(b"\n") + 1]
        _parse(path, whole)
        lines = whole.splitlines(keepends=True)
        previous = sha256_bytes(lines[-1]) if lines else _FIRST
        made, out = [], b""
        for listed, answer in found:
            decision = _decision(listed.entry, answer, reviewer.strip(), reason.strip(), previous)
            line = canonical_json(decision.model_dump(exclude_none=True)).encode() + b"\n"
            previous, out = sha256_bytes(line), out + line
            made.append(decision)
        _append(handle, len(whole), out)
    except OSError as error:
        raise ModelopsError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        os.close(handle)
    return made


def last_decisions(decisions: Iterable[Decision]) -> dict[str, Decision]:
    """Return {entry: its valid decision}: the last one, whoever made it."""
    return {decision.entry: decision for decision in decisions}


def weigh(decisions: Sequence[Decision]) -> list[Evidence]:
    """Count the valid decisions of each filter, most decided first.

    A filter with another threshold, other weights or other lists is another filter.
    """
    groups: dict[tuple[str, str, str], list[Decision]] = {}
    for decision in last_decisions(decisions).values():
        groups.setdefault((decision.stage, decision.filter, decision.filter_sha256), []).append(
            decision
        )
    evidence = [
        Evidence(
            stage=stage,
            filter=name,
            filter_sha256=digest,
            threshold=group[-1].threshold,
            upheld=sum(one.decision == "upheld" for one in group),
            overturned=sum(one.decision == "overturned" for one in group),
            scores=tuple(
                sorted((one.score, one.decision) for one in group if one.score is not None)
            ),
        )
        for (stage, name, digest), group in groups.items()
    ]
    return sorted(evidence, key=lambda one: -one.decided)


def write_page(
    folder: str | Path, listed: Sequence[Listed], summary: Sequence[Mapping[str, Any]]
) -> Path:
    """Write DIR/review.html, a page of all entries with blurred images, readable by its owner only.

    It holds the images, also of encrypted entries, and is deleted with the first of them.

    Args:
        summary: rows of `filter`, `stage`, `text`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("review.html.j2").render(
        folder=str(folder), made=utc_now(), entries=list(reversed(listed)), summary=summary
    )
    path = Path(folder) / PAGE
    write_bytes(path, page.encode(), private=True)
    return path


def _decision(
    entry: Entry | None, answer: Answer, reviewer: str, reason: str, previous: str
) -> Decision:
    assert entry is not None
    try:
        return Decision(
            entry=entry.id,
            decision=answer,
            reviewer=reviewer,
            reason=reason,
            decided=utc_now(),
            entry_created=entry.created,
            stage=entry.stage,
            filter=entry.filter.name,
            filter_sha256=entry.filter.sha256,
            threshold=entry.filter.threshold,
            score=entry.score,
            release_sha256=entry.release.sha256,
            previous=previous,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UsageError(f"{first['loc'][0]}: {first['msg']}") from error


def _parse(path: Path, data: bytes) -> list[Decision]:
    previous, decisions = _FIRST, []
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            decision = Decision.model_validate(json.loads(line))
        except (ValueError, ValidationError, RecursionError) as error:
            raise IntegrityError(f"{path}: line {number} is no decision") from error
        if decision.previous != previous:
            raise IntegrityError(
                f"{path}: line {number - 1 or 1} was changed, or a line before {number} was put in "
                "or taken out",
                hint="restore the file from a backup; decisions are only ever appended",
            )
        previous = sha256_bytes(line)
        decisions.append(decision)
    return decisions


def _append(handle: int, end: int, data: bytes) -> None:
    """Write `data` to the disk after the first `end` bytes, or leave the file unchanged."""
    try:
        os.ftruncate(handle, end)
        os.lseek(handle, end, os.SEEK_SET)
        left = data
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, end)
        raise
