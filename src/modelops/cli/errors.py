"""One place from exception to message and exit code.

0  done                                2  usage: an option, config key, file or row
1  a known failure                     3  a gate says no
130  interrupted                       4  a gate cannot decide
"""

from __future__ import annotations

import json
import sys
import traceback

import click

from modelops.base.errors import ModelopsError, first_line, printable
from modelops.base.extras import missing_package


def report_error(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Print one line on stderr (and a JSON object on stdout with --json); return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    code, kind, message, hint = _explain(error)
    if debug:
        traceback.print_exception(error)
    line = f"error: {message}" + (f"\n  try: {hint}" if hint else "")
    print(printable(line), file=sys.stderr)  # names and answers of others
    if as_json:
        print(json.dumps({"status": "failed", "error": kind, "message": message, "hint": hint}))
    return code


def _explain(error: BaseException) -> tuple[int, str, str, str | None]:
    if isinstance(error, ModelopsError):
        return error.exit_code, type(error).__name__, error.message, error.hint
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "modelops"
        return 2, "UsageError", error.format_message(), f"{command} --help"
    if isinstance(error, click.ClickException):
        return error.exit_code, type(error).__name__, error.format_message(), None
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return 130, "Interrupted", "interrupted; what was finished is kept", None
    if isinstance(error, BrokenPipeError):
        return 1, "BrokenPipe", "the reader of this output went away", None
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return 1, type(error).__name__, f"{name}{error.strerror or error}", None
    if isinstance(error, ImportError):
        return _explain(missing_package(error, needed_for="this command"))
    if isinstance(error, MemoryError):
        return 1, "MemoryError", "out of memory", "use a smaller batch or resolution"
    return (
        1,
        type(error).__name__,
        f"unexpected {type(error).__name__}: {first_line(error)}",
        "run the same command with --debug and report the traceback",
    )
