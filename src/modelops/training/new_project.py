"""The files that a new project starts with."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from modelops.base.errors import UsageError
from modelops.base.files import check_writable, read_text, write_text

# file in the project -> template
FILES = {
    "charter.md": "charter.md",
    "pilot_config.yaml": "pilot_config.yaml",
    "policy.yaml": "policy.yaml",
    ".gitignore": "gitignore",
}
State = Literal["new", "same", "different"]


def template(name: str) -> str:
    """The text of a template that the package carries."""
    return (resources.files("modelops") / "cli" / "templates" / name).read_text("utf-8")


def project_files(directory: str | Path) -> dict[Path, State]:
    """Return the files of a project, and whether each is there already.

    Raises:
        UsageError: the directory is a file, or a file in it cannot be read.
    """
    top = Path(directory)
    if top.exists() and not top.is_dir():
        raise UsageError(f"{directory}: not a directory", hint="name a new or empty directory")
    return {top / name: _state(top / name, template(source)) for name, source in FILES.items()}


def _state(path: Path, text: str) -> State:
    if not path.exists():
        return "new"
    return "same" if path.is_file() and read_text(path) == text else "different"


def init_project(directory: str | Path, *, force: bool = False) -> list[Path]:
    """Write charter.md, pilot_config.yaml, policy.yaml and .gitignore.

    Files that already say the same are left alone.

    Args:
        directory: made if it is not there.
        force: replace files whose content differs.

    Returns:
        The files that were written.

    Raises:
        UsageError: a file differs and `force` is not given; then nothing is written.
        ModelopsError: the directory cannot be written.
    """
    states = project_files(directory)
    different = [path for path, state in states.items() if state == "different"]
    if different and not force:
        names = ", ".join(path.name for path in different)
        raise UsageError(
            f"{directory}: {names} would be overwritten",
            hint="move what you want to keep, or use --force",
        )
    unusable = [path for path in different if not path.is_file()]
    if unusable:
        raise UsageError(f"{unusable[0]}: not a file", hint="move it away")
    check_writable(directory)
    written = [path for path, state in states.items() if state != "same"]
    for path in written:
        write_text(path, template(FILES[path.name]))
    return written
