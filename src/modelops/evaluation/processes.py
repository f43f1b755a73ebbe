"""Images made by several processes: workers of our own, or the ranks of a launcher.

Every process makes a share of the images that are not in the sample cache yet and writes them
there. An image depends on its prompt and seed alone, and the cache is named by content and written
atomically; so nothing is lost when a process is killed, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelops.errors import EvaluationError, UsageError
from modelops.models.sources import ImageRequest, ModelSource
from modelops.records import SourceInfo


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make: its place in the plan, what it is made from, and where it goes."""

    place: int
    request: ImageRequest
    path: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job; `failure` says why there is no image."""

    place: int
    failure: str | None = None
    blocked: bool = False


OnOutcome = Callable[[Outcome], None]


class Crew(Protocol):
    """How the images of one evaluation are divided among processes."""

    def divide(self, find: Callable[[], list[Job]], report: OnOutcome) -> list[Job]:
        """This process's share of the jobs that `find` finds; other shares are started.

        Args:
            report: called with each outcome of another process, from any thread.
        """

    def check(self) -> None:
        """Raises EvaluationError if another process died."""

    def collect(self, own: Sequence[Outcome]) -> list[Outcome]:
        """Wait for the others; the outcomes of all. Does not return where the evaluation is not
        to go on (the ranks after the first)."""

    def close(self) -> None:
        """End whatever still runs."""


class SharedSource:
    """A source whose images are made by a crew. Its own calls stay in this process."""

    def __init__(self, inner: ModelSource, crew: Crew) -> None:
        if inner.info.kind in ("folder", "endpoint"):
            raise UsageError(
                f"a {inner.info.kind} is not divided among processes",
                hint="use several processes for a checkpoint or an artifact",
            )
        self.inner, self.crew = inner, crew

    @property
    def info(self) -> SourceInfo:
        return self.inner.info

    @property
    def scheduler_name(self) -> str:
        return self.inner.scheduler_name

    @property
    def defaults(self) -> ImageRequest:
        return self.inner.defaults

    @property
    def batch_size(self) -> int:
        return int(getattr(self.inner, "batch_size", 4))

    def generate(self, requests: Sequence[ImageRequest]) -> list[npt.NDArray[np.uint8]]:
        return self.inner.generate(requests)


def open_shared(opening: Mapping[str, Any], processes: int) -> SharedSource | None:
    """The source of a `modelops eval` with several processes; None where there is one only.

    Args:
        opening: keyword arguments of `open_source`.
        processes: what --processes says. Under a launcher it must be 1.

    Raises:
        UsageError: --processes under a launcher, or a source that is not divided.
    """
    from modelops.evaluation.sources import open_source

    launched = launched_ranks()
    if launched is None and processes == 1:
        return None
    if launched is None:
        here = {**opening, "device": device_of(opening["device"], 0)}
        return SharedSource(open_source(**here), Workers(processes, opening))
    if processes > 1:
        raise UsageError(
            f"--processes {processes} within a launcher's {launched[1]} processes",
            hint="leave --processes out, or run the command without a launcher",
        )
    rank, world, local = launched
    here = {**opening, "device": device_of(opening["device"], local)}
    return SharedSource(open_source(**here), LaunchedRanks(rank, world))


class Workers:
    """`processes` processes on this machine: this one, and workers that it starts.

    A worker ends with this process, however that ends: its standard input closes.

    Args:
        opening: keyword arguments of `open_source`, with "uri", that open the source again. On
            device "cuda" each process takes the next GPU; see `device_of`.
    """

    def __init__(self, processes: int, opening: Mapping[str, Any]) -> None:
        if processes < 2:
            raise UsageError(f"--processes {processes}: should be at least 2 here")
        self.processes, self.opening = processes, dict(opening)
        self._running: list[_Worker] = []

    def divide(self, find: Callable[[], list[Job]], report: OnOutcome) -> list[Job]:
        jobs = find()
        count = min(self.processes, len(jobs)) or 1
        shares = [jobs[rank::count] for rank in range(count)]
        for rank, share in enumerate(shares[1:], start=1):
            opening = self.opening | {"device": device_of(self.opening.get("device", "cpu"), rank)}
            self._running.append(_Worker(rank, count, opening, share, report))
        return shares[0]

    def check(self) -> None:
        for worker in self._running:
            worker.check()

    def collect(self, own: Sequence[Outcome]) -> list[Outcome]:
        outcomes = list(own)
        for worker in self._running:
            outcomes += worker.wait()
        self._running.clear()
        return outcomes

    def close(self) -> None:
        """End workers that still run, because this process is not to wait for them."""
        for worker in self._running:
            worker.end()
        self._running.clear()


def device_of(device: str, rank: int) -> str:
    """The device of a process: on "cuda", the next GPU for each, round and round."""
    if device != "cuda":
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{rank % count}" if count > 1 else device


class _Worker:
    def __init__(
        self, rank: int, count: int, opening: Mapping[str, Any], jobs: Sequence[Job],
        report: OnOutcome,
    ) -> None:  # fmt: skip
        self.rank, self.count, self.planned = rank, count, len(jobs)
        self.outcomes: list[Outcome] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "modelops.evaluation.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads_of(count))},
            start_new_session=True,  # a Ctrl-C ends it through us
        )  # fmt: skip
        assert self._child.stdin is not None
        task = {"opening": dict(opening), "jobs": [_job_to_json(job) for job in jobs]}
        with contextlib.suppress(BrokenPipeError):  # it died; `check` says so
            self._child.stdin.write(json.dumps(task) + "\n")
            self._child.stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(report,), daemon=True)
        self._reader.start()

    def _read(self, report: OnOutcome) -> None:
        for line in self._child.stdout or ():
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError):
                continue  # not ours: some library printed to standard output
            self.outcomes.append(outcome)
            report(outcome)

    def check(self) -> None:
        code = self._child.poll()
        if code not in (None, 0):
            self._died(code or 0)

    def wait(self) -> list[Outcome]:
        self._reader.join()
        code = self._child.wait()
        if code != 0 or len(self.outcomes) != self.planned:
            self._died(code)
        self.end()
        return self.outcomes

    def end(self) -> None:
        with contextlib.suppress(OSError):
            if self._child.stdin:
                self._child.stdin.close()
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(10)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._reader.join()
        if self._child.stdout:
            self._child.stdout.close()
        self._errors.close()

    def _died(self, code: int) -> None:
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        why = f": {said[-1].removeprefix('error: ')}" if said and code > 0 else ""
        raise EvaluationError(
            f"process {self.rank + 1} of {self.count} {how} after {len(self.outcomes)} of its "
            f"{self.planned} images{why}",
            hint="the images are kept: run the same command again, with fewer --processes if "
            "memory was short",
        )


class LaunchedRanks:
    """The processes that `accelerate launch` or `torchrun` started, each running the same command.

    The first one finds out what is missing and tells the others; they end when all have made their
    share, and only the first goes on to measure and writes the record.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def divide(self, find: Callable[[], list[Job]], report: OnOutcome) -> list[Job]:
        from datetime import timedelta

        import torch.distributed as dist

        if not dist.is_initialized():  # waits as long as the slowest share takes
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        found = [_job_to_json(job) for job in find()] if self.rank == 0 else []
        jobs = [_job_from_json(entry) for entry in self._gather(found)[0]]
        return jobs[self.rank :: self.world]

    def check(self) -> None:
        """Nothing: the launcher ends all processes when one of them dies."""

    def close(self) -> None:
        """Nothing to end."""

    def collect(self, own: Sequence[Outcome]) -> list[Outcome]:
        import torch.distributed as dist

        parts = self._gather([asdict(outcome) for outcome in own])
        dist.destroy_process_group()
        if self.rank != 0:
            raise SystemExit(0)
        return [Outcome(**entry) for part in parts for entry in part]

    def _gather(self, value: list[Any]) -> list[list[Any]]:
        """Everybody's value, as JSON: torch's own gathering of objects would read pickles."""
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = max(int(size) for size in sizes)
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(data)] = data
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
            dist.all_gather(parts, mine)
        except RuntimeError as error:
            raise EvaluationError(
                f"another of the {self.world} processes is gone: {str(error).splitlines()[0]}",
                hint="the images are kept: run the same command again",
            ) from error
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]


def launched_ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int] | None:
    """(rank, processes, rank on this machine) if a launcher started several; else None."""
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", rank))
    except (KeyError, ValueError):
        return None
    return (rank, world, local) if world > 1 and "MASTER_ADDR" in environment else None


def threads_of(processes: int) -> int:
    """CPU threads for each of so many processes on this machine, 1 or more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    limit = int(wanted) if wanted.isdigit() and int(wanted) > 0 else (cores or 1)
    return max(1, min(limit, (cores or 1) // processes))


@contextlib.contextmanager
def fewer_threads(processes: int) -> Iterator[None]:
    """While several processes share the cores, this one's torch uses its part of them only."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads_of(processes)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _job_to_json(job: Job) -> dict[str, Any]:
    return {"place": job.place, "path": str(job.path), "request": asdict(job.request)}


def _job_from_json(entry: Mapping[str, Any]) -> Job:
    return Job(entry["place"], ImageRequest(**entry["request"]), Path(entry["path"]))


def read_task(text: str) -> tuple[dict[str, Any], list[Job]]:
    """(arguments of `open_source`, jobs) of the line that a worker gets."""
    task = json.loads(text)
    return task["opening"], [_job_from_json(entry) for entry in task["jobs"]]
