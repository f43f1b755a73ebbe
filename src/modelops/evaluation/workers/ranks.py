"""Ranks: processes that a launcher started, `accelerate launch` or `torchrun`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from modelops.base.errors import ProcessDiedError
from modelops.evaluation.workers.reading import failure_of
from modelops.evaluation.workers.tasks import (
    Failure,
    Job,
    OnOutcome,
    Outcome,
    Share,
    job_from_json,
    job_to_json,
    share_from_json,
    share_to_json,
)
from modelops.evaluation.workers.threads import device_of


class LaunchedRanks:
    """Processes that `accelerate launch` or `torchrun` started, each running the same command.

    The first rank finds the missing images and tells the others. When the images are made it
    measures and writes the record; the others read the shares that it hands out, and end with it.
    Files must be in a place that all of them see.
    """

    share_cores = False

    def __init__(self, rank: int, world: int, local: int | None = None) -> None:
        self.rank, self.processes = rank, world
        self._local = rank if local is None else local
        self._waiting = False  # whether the others wait for something to read

    def divide(self, find: Callable[[], list[Job]], report: OnOutcome) -> list[Job]:
        from datetime import timedelta

        import torch.distributed as dist

        if not dist.is_initialized():  # waits as long as the slowest share takes
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        found = [job_to_json(job) for job in find()] if self.rank == 0 else []
        jobs = [job_from_json(entry) for entry in self._gather(found)[0]]
        return jobs[self.rank :: self.processes]

    def check(self) -> None:
        """Do nothing: the launcher ends all processes when one of them dies."""

    def collect(self, own: Sequence[Outcome]) -> list[Outcome]:
        parts = self._gather([asdict(outcome) for outcome in own])
        if self.rank != 0:
            self._serve()
        self._waiting = True
        return [Outcome(**entry) for part in parts for entry in part]

    def read(self, shares: Sequence[Share], own: Callable[[Share], Failure | None]) -> None:
        self._gather([share_to_json(share) for share in shares])
        try:
            mine = _plain(own(shares[0]))
        except Exception:
            self._gather([])  # the others wait for the next share, not for this error
            raise
        for failures in self._gather(mine):
            if failures:
                raise Failure(**failures[0]).error

    def close(self) -> None:
        """Let the others end. While they make images, the launcher ends them when this process
        ends."""
        if self._waiting:
            import torch.distributed as dist

            self._waiting = False
            with contextlib.suppress(ProcessDiedError):  # it is no longer needed
                self._gather([])
            dist.destroy_process_group()

    def _serve(self) -> None:
        """Read the shares of the first rank until there are no more; then end the process."""
        import torch.distributed as dist

        while shares := [share_from_json(entry) for entry in self._gather([])[0]]:
            self._gather(self._read_own(shares))
        dist.destroy_process_group()
        raise SystemExit(0)

    def _read_own(self, shares: Sequence[Share]) -> list[dict[str, Any]]:
        """Read this rank's share, if there is one; return its failure, or None."""
        if self.rank >= len(shares):
            return []
        share = shares[self.rank]
        try:
            if "device" in share.reader:
                device = device_of(share.reader["device"], self._local)
                share = Share({**share.reader, "device": device}, share.paths, share.out)
            return _plain(failure_of(share))
        except Exception as error:  # all ranks must gather, whatever happens
            why = str(error).splitlines()[0] if str(error) else "no reason"
            return _plain(Failure(f"process {self.rank + 1}: {type(error).__name__}: {why}"))

    def _gather(self, value: list[Any]) -> list[list[Any]]:
        """Gather all ranks' values as JSON: torch's own gathering of objects would read pickles."""
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.processes)]
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = max(int(size) for size in sizes)
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(data)] = data
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.processes)]
            dist.all_gather(parts, mine)
        except RuntimeError as error:
            raise ProcessDiedError(
                f"another of the {self.processes} processes is gone: {str(error).splitlines()[0]}",
                hint="what was made is kept: run the same command again",
            ) from error
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]


def _plain(failure: Failure | None) -> list[dict[str, Any]]:
    return [] if failure is None else [asdict(failure)]


def launched_ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int] | None:
    """Return (rank, processes, rank on this machine) if a launcher started several; else None."""
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", rank))
    except (KeyError, ValueError):
        return None
    return (rank, world, local) if world > 1 and "MASTER_ADDR" in environment else None
