"""Queue of requests that wait for a place in the running batch, and the choice of the next ones.

Pure bookkeeping, without a model, a thread or a lock: `engine.StepEngine` guards it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

from modelops.serving.engine.batch_profile import BatchProfile
from modelops.serving.engine.jobs import Job

MAX_OVERTAKEN = 4


class JobQueue:
    """Bounded queue, first in first out.

    Args:
        limit: jobs that may wait; an empty queue takes a longer list too.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def add(self, jobs: Sequence[Job]) -> bool:
        """Append jobs, all of them or none; return whether there was room."""
        if self._jobs and len(self._jobs) + len(jobs) > self.limit:
            return False
        self._jobs.extend(jobs)
        return True

    def oldest_wait(self) -> float:
        """Return the seconds that the first job has waited; 0 without one."""
        return time.monotonic() - self._jobs[0].submitted if self._jobs else 0.0

    def take_stopped(self) -> list[Job]:
        """Remove and return jobs that were cancelled or whose deadline has passed."""
        stopped = [job for job in self._jobs if job.reason_to_stop()]
        for job in stopped:
            self._jobs.remove(job)
        return stopped

    def clear(self) -> None:
        """Forget all jobs."""
        self._jobs.clear()

    def admit(self, running_rows: int, profile: BatchProfile) -> list[Job]:
        """Remove and return the jobs that join the batch now.

        First in, first out. But a single free row that the first job cannot use may go to a later
        job. No job is overtaken more than `MAX_OVERTAKEN` times.

        Args:
            running_rows: rows of the running batch.
            profile: widths that pay.
        """
        if not profile.pays and running_rows:
            return []
        used = running_rows
        cap = self._cap(used, profile) if profile.pays else 0
        joining: list[Job] = []
        while (
            self._jobs
            and (not joining or profile.pays)
            and (used + self._jobs[0].rows <= cap or not (used or joining))
        ):
            joining.append(self._jobs.popleft())
            used += joining[-1].rows
        if profile.pays and used == cap - 1 and self._jobs:
            head = self._jobs[0]  # needs two rows
            narrow = next((job for job in self._jobs if job.rows == 1), None)
            if narrow is not None and head.overtaken < MAX_OVERTAKEN:
                head.overtaken += 1
                self._jobs.remove(narrow)
                joining.append(narrow)
        for job in joining:
            job.admitted = time.monotonic()
        return joining

    def _cap(self, used: int, profile: BatchProfile) -> int:
        """Return the rows that may run now: the wide cap only if the queue fills it."""
        queued = used
        for job in self._jobs:
            queued += job.rows
            if queued >= profile.wide:
                return profile.wide
        return profile.narrow
