"""One place for what commands print: results on stdout, progress on stderr, `--json`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelops.base.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

F = TypeVar("F", bound=Callable[..., Any])
_JSON = "modelops.json"  # in the context's meta
DRAWN_AFTER = 2.0  # seconds until a progress bar appears
LINE_EVERY = 60.0  # seconds between lines of progress where there is no terminal


def json_option(command: F) -> F:
    """`--json`: stdout carries one JSON object and nothing else, also on failure."""
    return click.option(
        "--json", is_flag=True, expose_value=False, callback=_note_json,
        help="Print one JSON object on stdout and nothing else.",
    )(command)  # fmt: skip


def _note_json(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    context.meta[_JSON] = asked or context.meta.get(_JSON, False)


def is_json() -> bool:
    """Return whether the command that runs was asked for `--json`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_JSON))


def stderr_console() -> Console:
    """The console for progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A remark for a person, on stderr."""
    print(printable(text), file=sys.stderr)


def show(text: str) -> None:
    """Print a line of a result on stdout; control characters of others' texts are made visible."""
    print(printable(text))


def emit(result: dict[str, Any], *, text: str | None = None) -> None:
    """Print a command's result on stdout: one JSON object, or `text` for a person."""
    if is_json():
        show(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str))
    elif text is not None:
        show(text)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None
) -> None:
    """Print a table on stdout, in a pipe or a file as wide as it needs to be: no cell is broken."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        view.add_row(
            *(Text(printable(cell)) for cell in row)
        )  # plain: a name may hold square brackets
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
        console.width = max(120, console.measure(view).maximum)
    if title is not None:  # Table's own would be broken to the table's width
        console.print(Text(printable(title), style="italic"), soft_wrap=True)
    console.print(view)


class Progress:
    """Progress of a command: call it with (done, total), and `stage` when something else begins.

    Its text is where the command is: "3/8 searching: 5 of 16".
    """

    def __init__(self, bar: RichProgress | None, description: str) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self.stage(description)

    def __call__(self, done: int, total: int) -> None:
        self._count = f": {done} of {total}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def __str__(self) -> str:
        return self._label + self._count

    def line(self, text: str) -> None:
        """A remark for a person on stderr, above the bar if there is one."""
        if self._bar is None:
            say(text)
        else:
            self._bar.console.print(printable(text), markup=False, soft_wrap=True)

    def stage(self, name: str, number: int = 0, stages: int = 0) -> None:
        """Start stage `number` of `stages`, which has its own count and its own time left."""
        self._label = f"{number}/{stages} {name}" if stages else name
        self._count = ""
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(self._label, total=None)


@contextmanager
def progress(description: str) -> Iterator[Progress]:
    """A progress bar on stderr with the time left; call what it yields with (done, total).

    It appears after two seconds. Without a terminal it is a line a minute, which tells the log of a
    pipeline that something is still going on. With `--json` there is nothing.
    """
    console = stderr_console()
    if is_json():
        yield Progress(None, description)
        return
    if not console.is_terminal:
        shown = Progress(None, description)
        with _lines_of(shown):
            yield shown
        return
    from threading import Timer

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left, after"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    timer = Timer(DRAWN_AFTER, bar.start)  # a thread: a stage may report nothing for a long time
    timer.daemon = True
    timer.start()
    try:
        yield Progress(bar, description)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextmanager
def _lines_of(shown: Progress) -> Iterator[None]:
    """Print on stderr every minute the progress of a command and its minutes so far."""
    from threading import Event, Thread

    ended = Event()
    started = time.monotonic()

    def lines() -> None:
        while not ended.wait(LINE_EVERY):
            say(f"{shown}, {(time.monotonic() - started) / 60:.0f} min so far")

    thread = Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
