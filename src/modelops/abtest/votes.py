"""Votes in votes.jsonl: one line a vote, append-only, on disk before the rater gets an answer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelops.base.errors import IntegrityError, ModelopsError, ServingError, UsageError

Choice = Literal["left", "right", "equal"]
MAX_NAME = 64  # characters of a rater's name
MAX_LATENCY_MS = 86_400_000


class Vote(BaseModel):
    """A line of votes.jsonl: a vote, or the taking back of the rater's last one.

    Attributes:
        study: sha256 of study.json.
        left, right: names of the images as they were shown.
        latency_ms: from both images being on the screen to the choice, as the page measured it.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["vote", "undo"]
    study: str
    rater: str
    trial: str
    left: str
    right: str
    choice: Choice | None = None
    latency_ms: float = Field(default=0.0, ge=0, le=MAX_LATENCY_MS)
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @model_validator(mode="after")
    def _vote_has_a_choice(self) -> Self:
        if (self.choice is None) == (self.kind == "vote"):
            raise ValueError("a vote has a choice and an undo has none")
        return self


def clean_rater(name: str) -> str:
    """A rater's name with single spaces and composed characters.

    Raises:
        UsageError: it is empty, too long or has control or invisible characters.
    """
    cleaned = " ".join(unicodedata.normalize("NFC", name).split())
    if not cleaned:
        raise UsageError("the name is empty", hint="give your name or initials")
    if len(cleaned) > MAX_NAME:
        raise UsageError(f"the name is longer than {MAX_NAME} characters")
    if any(unicodedata.category(character)[0] == "C" for character in cleaned):
        raise UsageError("the name has control or invisible characters")
    return cleaned


def parse_votes(
    data: bytes, study_sha256: str, *, name: str = "votes.jsonl"
) -> tuple[list[Vote], int]:
    """Parse the votes of a file; return them with the number of bytes of a torn last line.

    A line without its newline was cut short by a kill before its rater got an answer: it is left
    out.

    Raises:
        IntegrityError: another line is damaged, or belongs to another study.
    """
    end = data.rfind(b"\n") + 1
    votes = []
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            vote = Vote.model_validate_json(line)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise IntegrityError(
                f"{name}: line {number} is damaged: {reason}", hint="restore the file from a copy"
            ) from error
        if vote.study != study_sha256:
            raise IntegrityError(
                f"{name}: line {number} is a vote on another study, or study.json was changed"
            )
        votes.append(vote)
    return votes, len(data) - end


def read_votes(path: str | Path, study_sha256: str) -> tuple[list[Vote], int]:
    """`parse_votes` of a file; nothing if there is none.

    Raises:
        IntegrityError: as in `parse_votes`.
        UsageError: the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return parse_votes(data, study_sha256, name=str(path))


def standing_votes(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    """Votes that were not taken back, {rater: in their order}.

    Raises:
        IntegrityError: a trial has two valid votes of one rater, or an undo takes back nothing.
    """
    found: dict[str, list[Vote]] = {}
    for vote in votes:
        mine = found.setdefault(vote.rater, [])
        if vote.kind == "undo":
            if not mine or mine[-1].trial != vote.trial:
                raise IntegrityError(f"{vote.rater}: an undo of {vote.trial} takes nothing back")
            mine.pop()
        elif any(earlier.trial == vote.trial for earlier in mine):
            raise IntegrityError(f"{vote.rater}: two votes on {vote.trial}")
        else:
            mine.append(vote)
    return {rater: mine for rater, mine in found.items() if mine}


class VoteLog:
    """votes.jsonl, open for appending by one process at a time.

    Raises:
        ServingError: another process has it open.
        IntegrityError: it is damaged or of another study.
        ModelopsError: it cannot be written.
    """

    def __init__(self, path: str | Path, study_sha256: str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ModelopsError(f"{path}: cannot write: {error.strerror or error}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = self.path.read_bytes()
            votes, self.torn_bytes = parse_votes(data, study_sha256, name=str(path))
            self.standing = standing_votes(votes)
            self._end = len(data) - self.torn_bytes
            os.ftruncate(self._handle, self._end)  # no rater was told that a torn line counts
        except BlockingIOError as error:
            os.close(self._handle)
            raise ServingError(
                f"{self.path.parent}: this study is already being served", hint="stop that server"
            ) from error
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, vote: Vote) -> None:
        """Write one line; it is on disk when this returns, and in `standing`.

        Raises:
            ModelopsError: the disk is full or gone; the file is as it was before.
        """
        line = vote.model_dump_json(exclude_none=True).encode() + b"\n"
        with self._lock:
            try:
                written = os.pwrite(self._handle, line, self._end)
                if written != len(line):
                    raise OSError("only part of the line could be written")
                os.fsync(self._handle)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, self._end)
                raise ModelopsError(f"{self.path}: {error.strerror or error}") from error
            self._end += len(line)
            mine = self.standing.setdefault(vote.rater, [])
            if vote.kind == "undo":
                mine.pop()
            else:
                mine.append(vote)

    def close(self) -> None:
        """Let another process have the file."""
        with self._lock:
            handle, self._handle = self._handle, -1  # a late vote must not hit another file
            os.close(handle)
