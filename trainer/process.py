"""The trainer as a process: signals that end it, and the lock that keeps it alone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modelops.base.locks import output_lock

from .stats import event

WAIT_S = 30.0


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


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run's lock; the kernel gives it back however this process ends.

    Raises:
        InUseError: another process has it and does not end within half a minute.
    """

    def say() -> None:
        event("note", text="waiting for another process of this run to end")

    with output_lock(run_dir, inside=True, wait_s=WAIT_S, on_wait=say):
        yield
