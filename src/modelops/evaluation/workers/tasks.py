"""Tasks for worker processes: images to make, and images to read.

Processes exchange JSON. An image depends on its prompt and seed alone, and its features on the
image alone. Both are written atomically under names made from these. So nothing is lost when a
process is killed, and the same command continues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from modelops.base.errors import (
    EvaluationError,
    ImageError,
    IntegrityError,
    MissingExtraError,
    MissingWeightsError,
    ModelopsError,
    UsageError,
)
from modelops.models.request import ImageRequest, InputImage

_KINDS: dict[str, type[ModelopsError]] = {
    kind.__name__: kind
    for kind in (EvaluationError, ImageError, IntegrityError, MissingExtraError,
                 MissingWeightsError, UsageError)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """Image to make: its place in the plan, its request, and its path."""

    place: int
    request: ImageRequest
    path: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a job; `failure` is the reason if there is no image."""

    place: int
    failure: str | None = None
    blocked: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """Images to read with one reader, and the file that the answer goes to.

    Attributes:
        reader: arguments of `reading.open_reader`.
        paths: images, in order.
        out: written atomically; see `reading.read_share`.
    """

    reader: Mapping[str, Any]
    paths: tuple[Path, ...]
    out: Path


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason why a share could not be read.

    Attributes:
        kind: name of the exception's class, if it is one of `_KINDS`.
    """

    message: str
    kind: str = ""
    hint: str | None = None

    @classmethod
    def of(cls, error: ModelopsError) -> Failure:
        """Describe an exception for another process."""
        kinds = (each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS)
        return cls(error.message, next(kinds, ""), error.hint)

    @property
    def error(self) -> ModelopsError:
        """Return it as an exception for the process that asked for the share."""
        return _KINDS.get(self.kind, ModelopsError)(self.message, hint=self.hint)


OnOutcome = Callable[[Outcome], None]
OnRead = Callable[[int], None]  # images read by this process so far


class Workers(Protocol):
    """Processes that share the work of one evaluation.

    Attributes:
        rank: this process's; the first one's is 0.
        share_cores: whether they run on this machine's cores without a launcher that divides them.
    """

    rank: int
    share_cores: bool

    @property
    def processes(self) -> int:
        """Number of processes, with this one."""

    def divide(self, find: Callable[[], list[Job]], report: OnOutcome) -> list[Job]:
        """Return this process's share of the jobs that `find` finds; start the other shares.

        Args:
            report: called with each outcome of another process, from any thread.
        """

    def check(self) -> None:
        """Raise ProcessDiedError if another process died."""

    def collect(self, own: Sequence[Outcome]) -> list[Outcome]:
        """Wait for the other ranks and return all outcomes.

        It returns in the first rank only. The other ranks then read the shares that the first
        one hands out, and end when it ends.
        """

    def read(self, shares: Sequence[Share], own: Callable[[Share], Failure | None]) -> None:
        """Have each share read by a process of its own, the first by this one.

        Args:
            own: reads this process's share; returns its failure, or None.

        Raises:
            EvaluationError: a single process could not have measured it either.
            ModelopsError: a share could not be read.
            ProcessDiedError: another process died.
        """

    def close(self) -> None:
        """End all processes that still run."""


def job_to_json(job: Job) -> dict[str, Any]:
    """Convert a job to plain values."""
    return {"place": job.place, "path": str(job.path), "request": asdict(job.request)}


def job_from_json(entry: Mapping[str, Any]) -> Job:
    """Read the result of `job_to_json`."""
    fields = dict(entry["request"])
    if fields["image"] is not None:
        fields["image"] = InputImage(**fields["image"])
    return Job(entry["place"], ImageRequest(**fields), Path(entry["path"]))


def share_to_json(share: Share) -> dict[str, Any]:
    """Convert a share to plain values."""
    return {"reader": dict(share.reader), "paths": [str(path) for path in share.paths],
            "out": str(share.out)}  # fmt: skip


def share_from_json(entry: Mapping[str, Any]) -> Share:
    """Read the result of `share_to_json`."""
    return Share(entry["reader"], tuple(map(Path, entry["paths"])), Path(entry["out"]))
