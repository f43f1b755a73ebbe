"""The command reference, written from the commands' own help and the settings' own meaning.

python -m modelops.cli.reference          writes REFERENCE.md
python -m modelops.cli.reference --check  exits 1 if it is stale
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import click

from modelops.base.files import write_text
from modelops.cli.main import cli
from modelops.serving.settings import OF_COMMANDS, NodeSettings

REFERENCE = Path(__file__).with_name("REFERENCE.md")


def render() -> str:
    """The reference as Markdown: one section per command, each with its help text."""
    sections = [
        "# Command reference\n",
        "Written by `python -m modelops.cli.reference` from `--help`; do not edit.\n",
    ]
    for path, command in _walk(cli, ["modelops"]):
        context = click.Context(
            command, info_name=" ".join(path), terminal_width=88, **cli.context_settings
        )
        command._help_option = None  # click keeps the one of the first context, which may lack -h
        sections.append(f"## {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join([*sections, _settings()])


def _settings() -> str:
    """The section on environment variables."""
    lines = [
        "## Settings of a node\n",
        "Environment variables that `modelops serve` and `bentoml serve` read; `modelops serve "
        "settings` shows their values.\n",
        "| variable | default | meaning |\n|---|---|---|",
    ]
    for row in NodeSettings().table():
        default = f"`{row['default']}`" if row["default"] else ""
        lines.append(f"| `{row['variable']}` | {default} | {row['about']} |")
    lines += ["\n## Variables of commands and clients\n", "| variable | meaning |\n|---|---|"]
    lines += [f"| `{name}` | {about} |" for name, about in OF_COMMANDS.items()]
    return "\n".join(lines) + "\n"


def _walk(command: click.Command, path: list[str]) -> list[tuple[list[str], click.Command]]:
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                found += _walk(inner, [*path, name])
    return found


def main(arguments: list[str]) -> int:
    """Write REFERENCE.md, or with --check say whether it is up to date (exit code 1 if not)."""
    text = render()
    if "--check" not in arguments:
        write_text(REFERENCE, text)
        return 0
    written = REFERENCE.read_text("utf-8") if REFERENCE.is_file() else ""
    if written == text:
        return 0
    pairs = itertools.zip_longest(written.splitlines(), text.splitlines(), fillvalue="")
    there, wanted = next((a, b) for a, b in pairs if a != b)
    print(
        f"error: REFERENCE.md is stale: it has {there!r} where {wanted!r} belongs\n"
        "  try: python -m modelops.cli.reference",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
