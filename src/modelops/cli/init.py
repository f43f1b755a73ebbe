"""`modelops init`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.options import PATH, dry_run_option
from modelops.cli.output import emit, json_option


@click.command()
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--force", is_flag=True, help="Replace files whose content differs.")
@dry_run_option
@json_option
def init(directory: Path, force: bool, dry_run: bool) -> None:
    """Write charter.md, pilot_config.yaml, policy.yaml and .gitignore for a new project.

    Files that are there already are not overwritten without --force.

    \b
    Example:
      modelops init my-model
    """
    from modelops.training import new_project as scaffold

    if dry_run:
        states = {str(path): state for path, state in scaffold.project_files(directory).items()}
        words = {
            "new": "would be written",
            "same": "is there already",
            "different": "would be replaced" if force else "says something else: needs --force",
        }
        lines = [f"{path}: {words[state]}" for path, state in states.items()]
        emit({"status": "ok", "files": states}, text="\n".join(lines))
        return
    written = [str(path) for path in scaffold.init_project(directory, force=force)]
    next_step = f"next: read {directory / 'charter.md'}, then modelops data --help"
    text = "\n".join([*(f"written: {path}" for path in written), next_step])
    emit({"status": "ok", "written": written}, text=text)
