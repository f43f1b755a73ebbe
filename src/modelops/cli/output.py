"""One place for what commands print: results on stdout, progress on stderr, `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])
ProgressCallback = Callable[[int, int], None]  # (done, total)


def json_option(command: F) -> F:
    """`--json`: stdout carries one JSON object and nothing else, also on failure."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."
    )(command)


def dry_run_option(command: F) -> F:
    """`--dry-run`: say what would be done, and do nothing."""
    return click.option("--dry-run", is_flag=True, help="Say what would be done; do nothing.")(
        command
    )


def stderr_console() -> Console:
    """The console for progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A remark for a person, on stderr."""
    print(text, file=sys.stderr)


def emit(result: dict[str, Any], *, as_json: bool, text: str | None = None) -> None:
    """Print a command's result on stdout: one JSON object, or `text` for a person."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str))
    elif text is not None:
        print(text)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None
) -> None:
    """Print a table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(*columns, title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for row in rows:
        view.add_row(*(Text(cell) for cell in row))  # plain: a name may hold square brackets
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(view)


@contextmanager
def progress(description: str, *, quiet: bool = False) -> Iterator[ProgressCallback]:
    """A progress bar on stderr with time left; call the yielded function with (done, total).

    Without a terminal, or with `quiet`, nothing is drawn.
    """
    console = stderr_console()
    if quiet or not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
