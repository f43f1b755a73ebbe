"""Options and types that several commands have, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# A command says in its own words what is missing; `EXISTING` ones leave that to click.
PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


def seed_option(help_text: str) -> Callable[[F], F]:
    """`--seed`, 0 or more, 0 by default; `help_text` says what is drawn from it."""
    return click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help=help_text
    )


def dry_run_option(command: F) -> F:
    """`--dry-run`: say what would be done, and do nothing."""
    return click.option("--dry-run", is_flag=True, help="Say what would be done; do nothing.")(
        command
    )


def input_images_option(command: F) -> F:
    """`--input-images`: the folder of what an image-to-image pipeline changes."""
    return click.option(
        "--input-images", type=DIRECTORY, metavar="DIR",
        help="Images that an image-to-image or inpainting pipeline changes: one for each prompt, "
        "in natural order of their names (2.png before 10.png), or one prompt for all of them. The "
        "mask of NAME.png is NAME_mask.png, white where it is painted anew, or what is "
        "transparent.",
    )(command)  # fmt: skip


def read_guidance(
    _context: click.Context, _option: click.Parameter, value: float | None
) -> float | None:
    """Check a guidance scale before anything is opened; a click callback."""
    from modelops.base.guidance import guidance_scale

    try:
        return None if value is None else guidance_scale(value)
    except ValueError as error:
        raise click.BadParameter(f"{value:g}: {error}") from error


def trust_code_option(command: F) -> F:
    """`--trust-code`: open TorchScript and .pt2 programs, which run code."""
    return click.option(
        "--trust-code", is_flag=True, expose_value=False, callback=_trust_code,
        help="Open an artifact of TorchScript or .pt2 programs, which runs code from it. Only for "
        "artifacts whose maker you trust.",
    )(command)  # fmt: skip


def _trust_code(_context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        from modelops.base.trust import trust_code

        trust_code()
