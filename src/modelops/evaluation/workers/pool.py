"""Processes on this machine that this one starts, each for a share of the work."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelops.base.errors import ProcessDiedError, UsageError
from modelops.base.private import PrivateFolder
from modelops.evaluation.workers.tasks import (
    Failure,
    Job,
    OnOutcome,
    Outcome,
    Share,
    job_to_json,
    share_to_json,
)
from modelops.evaluation.workers.threads import device_of, fewer_threads, threads_of


class WorkerPool:
    """Pool of `processes` processes on this machine: this one, and workers that it starts.

    A worker ends when this process ends in any way, because its standard input closes.

    Args:
        opening: keyword arguments of `open_source`, with "uri", that open the source again. On
            device "cuda" each process takes the next GPU; see `device_of`.

    Attributes:
        opening: these, and where the processes share one copy of the model. Its "sha256" is the
            model's digest, once that is known.
    """

    rank = 0
    share_cores = True

    def __init__(self, processes: int, opening: Mapping[str, Any]) -> None:
        if processes < 2:
            raise UsageError(f"--processes {processes}: should be at least 2 here")
        self._shared = PrivateFolder.make("modelops-run-")
        self.processes, self.opening = processes, {**opening, "store": str(self._shared.path)}
        self._running: dict[int, _Worker] = {}

    def divide(self, find: Callable[[], list[Job]], report: OnOutcome) -> list[Job]:
        jobs = find()
        count = min(self.processes, len(jobs)) or 1
        shares = [jobs[rank::count] for rank in range(count)]
        for rank, share in enumerate(shares[1:], start=1):
            opening = self.opening | {"device": device_of(self.opening.get("device", "cpu"), rank)}
            self._worker(rank).make(opening, share, report)
        return shares[0]

    def check(self) -> None:
        for worker in self._running.values():
            worker.check()

    def collect(self, own: Sequence[Outcome]) -> list[Outcome]:
        return [*own, *(one for worker in self._running.values() for one in worker.outcomes())]

    def read(self, shares: Sequence[Share], own: Callable[[Share], Failure | None]) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(fewer_threads(self.processes))
            stack.callback(self._end_busy)  # those whose answer is no longer needed
            for rank, share in enumerate(shares[1:], start=1):
                self._worker(rank).read(_on_device(share, rank))
            failures = [own(shares[0])]
            failures += [self._running[rank].answer() for rank in range(1, len(shares))]
        for failure in failures:
            if failure is not None:
                raise failure.error

    def close(self) -> None:
        """End the workers, whether or not they still have work."""
        for worker in self._running.values():
            worker.end()
        self._running.clear()
        self._shared.close()

    def _worker(self, rank: int) -> _Worker:
        if rank not in self._running:
            self._running[rank] = _Worker(rank, self.processes)
        return self._running[rank]

    def _end_busy(self) -> None:
        for rank in [rank for rank, worker in self._running.items() if worker.busy]:
            self._running.pop(rank).end()


def _on_device(share: Share, rank: int) -> Share:
    """Return the share for a process: on "cuda" it takes the next GPU."""
    if "device" not in share.reader:
        return share
    device = device_of(share.reader["device"], rank)
    return Share({**share.reader, "device": device}, share.paths, share.out)


class _Worker:
    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._planned = self._done = 0  # images to make; 0 while it reads
        self._expected = 0  # answers that are still to come
        self._report: OnOutcome | None = None
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "modelops.evaluation.workers.process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads_of(count))},
            start_new_session=True,  # a Ctrl-C ends it through us
        )  # fmt: skip
        self._reader = threading.Thread(target=self._hear, daemon=True)
        self._reader.start()

    @property
    def busy(self) -> bool:
        """Return whether an answer is still to come."""
        return self._expected > 0

    def make(self, opening: Mapping[str, Any], jobs: Sequence[Job], report: OnOutcome) -> None:
        """Have it make images; `outcomes` returns the results."""
        self._planned, self._done, self._report = len(jobs), 0, report
        plain = [job_to_json(job) for job in jobs]
        self._tell({"opening": dict(opening), "jobs": plain}, len(jobs))

    def read(self, share: Share) -> None:
        """Have it read images; `answer` returns the result."""
        self._planned = 0
        self._tell({"share": share_to_json(share)}, 1)

    def outcomes(self) -> list[Outcome]:
        """Wait for the images that it makes, if it does.

        Raises:
            ProcessDiedError: it died.
        """
        return [Outcome(**self._next()) for _ in range(self._expected)]

    def answer(self) -> Failure | None:
        """Wait until it has read its share; return its failure, or None.

        Raises:
            ProcessDiedError: it died.
        """
        failure = self._next()["failure"]
        return Failure(**failure) if failure else None

    def check(self) -> None:
        """Raise ProcessDiedError if it died."""
        code = self._child.poll()
        if code is not None:
            self._died(code)

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

    def _tell(self, task: Mapping[str, Any], answers: int) -> None:
        assert self._child.stdin is not None
        self._expected = answers
        with contextlib.suppress(BrokenPipeError):  # it died; `check` says so
            self._child.stdin.write(json.dumps(task) + "\n")
            self._child.stdin.flush()

    def _hear(self) -> None:
        for line in self._child.stdout or ():
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # cut off: it was killed while it wrote
            if "place" in answer:
                self._done += 1
                with contextlib.suppress(Exception):  # a failing listener must not lose the answer
                    if self._report:
                        self._report(Outcome(**answer))
            self._answers.put(answer)
        self._answers.put(None)

    def _next(self) -> dict[str, Any]:
        answer = self._answers.get()
        if answer is None:
            self._died(self._child.wait())
        assert answer is not None
        self._expected -= 1
        return answer

    def _died(self, code: int) -> None:
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        why = f": {said[-1].removeprefix('error: ')}" if said and code > 0 else ""
        when = f"after {self._done} of its {self._planned} images" if self._planned else (
            "while it read images"
        )  # fmt: skip
        raise ProcessDiedError(
            f"process {self.rank + 1} of {self.count} {how} {when}{why}",
            hint="what was made is kept: run the same command again, with fewer --processes if "
            "memory was short",
        )
