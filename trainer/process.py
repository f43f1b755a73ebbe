"""The trainer as a process: signals that end it, and the lock that keeps it alone."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modelops.base.errors import TrainingError

from .stats import event

PATIENCE = 60  # half seconds


class Interrupted(Exception):  # noqa: N818  not an error
    """SIGINT or SIGTERM; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """SIGINT and SIGTERM of this process.

    Attributes:
        wait: a signal only sets `number`, and the step that is running is finished; a second SIGINT
            raises Interrupted as every signal does before.
        number: of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.wait = False
        self.number = 0

    @contextlib.contextmanager
    def caught(self, say: Callable[[str], None]) -> Iterator[None]:
        """Catch them; `say` gets a line about one that waits."""

        def on_signal(signum: int, _frame: Any) -> None:
            if not self.wait or self.number == signum == signal.SIGINT:
                raise Interrupted(signum)
            self.number = signum
            say(f"{signal.Signals(signum).name}: saving a checkpoint after this step")

        old = {name: signal.signal(name, on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in old.items():
                signal.signal(name, handler)


class LockedError(TrainingError):
    """Another process is at work on the run; its files are not touched."""


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run's lock; the kernel gives it back however this process ends.

    Raises:
        LockedError: another process has it and does not end within half a minute.
    """
    with (run_dir / ".lock").open("a") as lock:
        for attempt in range(PATIENCE):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 0:
                    event("note", text="waiting for another process of this run to end")
                time.sleep(0.5)
        else:
            raise LockedError(
                f"{run_dir}: another process is training this run",
                hint="end it first, or begin another run with --run-name",
            )
        yield
