"""`modelops serve swap`: a new release beside the one that is served, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from modelops.cli.options import FILE
from modelops.cli.output import emit, json_option, progress

F = TypeVar("F", bound=Callable[..., Any])

KEY_VARIABLE = "MODELOPS_ADMIN_KEY"


def _server(command: F) -> F:
    """The server's address, and the file with the admin key."""
    option = click.option(
        "--key-file", metavar="FILE", type=FILE,
        help="File that holds the admin key alone and that only its owner can read.  "
        f"[default: variable {KEY_VARIABLE}]",
    )  # fmt: skip
    return click.argument("url")(option(command))


@click.group()
def swap() -> None:
    """Load a release beside the stable one, send it a share of the requests, promote or roll back.

    The server needs a folder of releases (`modelops serve --releases DIR`) and a key of `modelops
    serve key create NAME --admin`. Exit code 3: the verdict says worse, or the canary waited for
    was rolled back; 4: undecided.

    \b
    Examples:
      modelops serve swap canary http://127.0.0.1:3000 pilot-2 --share 0.1 --wait
      modelops serve swap status http://127.0.0.1:3000
      modelops serve swap promote http://127.0.0.1:3000
    """


@swap.command()
@_server
@json_option
def status(url: str, key_file: Path | None) -> None:
    """Say what is served, what is on trial, and what has been measured of it.

    The verdict is that of the last look. A look is made when the canary's requests have doubled, so
    that frequent questions do not find a difference by chance.

    \b
    Example:
      modelops serve swap status http://127.0.0.1:3000 --key-file admin.key
    """
    from modelops.serving.rollout.client import SwapClient, exit_code

    found = SwapClient(url, _key(key_file)).status()
    _finish(found, exit_code(found))


@swap.command()
@_server
@click.argument("release")
@click.option(
    "--share",
    default=0.1,
    show_default=True,
    help="Share of the requests that the canary gets, above 0 and up to 1.",
)
@click.option(
    "--sticky", type=click.Choice(["request", "key"]), default="request", show_default=True,
    help="Draw for each request, or for each API key, whose requests then all go the same way.",
)  # fmt: skip
@click.option(
    "--named",
    is_flag=True,
    help="Also deal out requests that name the model, if both releases have that name.",
)
@click.option(
    "--auto",
    is_flag=True,
    help="Promote the canary when it is no worse; roll it back when it is worse.",
)
@click.option(
    "--requests",
    default=400,
    show_default=True,
    help="Number of requests that the canary needs before it can be found no worse.",
)
@click.option(
    "--seconds",
    default=120.0,
    show_default=True,
    help="Seconds of traffic that the canary needs before it can be found no worse.",
)
@click.option(
    "--error-margin",
    type=float,
    help="Increase of the error rate (absolute) that still counts as no worse.  [default: 0.01]",
)
@click.option(
    "--filter-margin",
    type=float,
    help="Increase of each filter's block rate (absolute) that still counts as no worse.  "
    "[default: 0.02]",
)
@click.option(
    "--latency-margin",
    type=float,
    help="Ratio of seconds per network evaluation that still counts as no worse.  [default: 1.1]",
)
@click.option(
    "--wait", is_flag=True,
    help="Wait until the canary takes requests; with --auto, until it is promoted or rolled back.",
)  # fmt: skip
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds to wait at most.")
@json_option
def canary(
    url: str,
    key_file: Path | None,
    release: str,
    share: float,
    sticky: str,
    named: bool,
    auto: bool,
    requests: int,
    seconds: float,
    error_margin: float | None,
    filter_margin: float | None,
    latency_margin: float | None,
    wait: bool,
    timeout: float,
) -> None:
    """Load RELEASE, a path below the server's folder of releases, and send it requests.

    It is verified, opened, must make its golden image and pass the filters' checks before it takes
    any. One that fails leaves the stable release as it is.

    \b
    Example:
      modelops serve swap canary http://127.0.0.1:3000 pilot-2 --share 0.2 --auto --wait
    """
    from modelops.serving.rollout.client import SwapClient, trial_exit_code

    order = {
        "release": release, "share": share, "sticky": sticky, "named": named, "auto": auto,
        "requests": requests, "seconds": seconds, "error_margin": error_margin,
        "filter_margin": filter_margin, "latency_margin": latency_margin,
    }  # fmt: skip
    client = SwapClient(url, _key(key_file))
    ordered = client.post("canary", {k: v for k, v in order.items() if v is not None})
    if not wait:
        emit(ordered, text=f"{release} is being loaded; see `swap status`")
        return
    if not auto:
        with progress(f"loading {release}"):
            found = client.wait(lambda now: now["loading"] is None, timeout)
    else:
        with progress("requests of the canary") as bar:

            def decided(now: dict[str, Any]) -> bool:
                measured = now["canary"]["measured"] if now["canary"] else 0
                bar(min(requests, measured), requests)
                return now["state"] == "stable only"

            found = client.wait(decided, timeout, what="decided")
    _finish(found, trial_exit_code(ordered, found))


@swap.command()
@_server
@click.option("--force", is_flag=True, help="Promote although the verdict is worse or undecided.")
@click.option("--wait", is_flag=True, help="Wait until the former release has finished its work.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait at most.")
@json_option
def promote(url: str, key_file: Path | None, force: bool, wait: bool, timeout: float) -> None:
    """Serve the canary in place of the stable release, now and after a restart.

    Without --force its verdict must say that it is no worse; exit code 3: worse, 4: undecided.

    \b
    Example:
      modelops serve swap promote http://127.0.0.1:3000
    """
    _change(url, key_file, "promote", {"force": force}, wait, timeout)


@swap.command()
@_server
@click.option("--reason", default="", help="Reason to write into the log.")
@click.option("--wait", is_flag=True, help="Wait until the canary has finished its work.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait at most.")
@json_option
def rollback(url: str, key_file: Path | None, reason: str, wait: bool, timeout: float) -> None:
    """Send the canary no more requests and let it go; the stable release makes them all.

    \b
    Example:
      modelops serve swap rollback http://127.0.0.1:3000 --reason "colours are off"
    """
    _change(url, key_file, "rollback", {"reason": reason}, wait, timeout)


def _change(
    url: str, key_file: Path | None, action: str, order: dict[str, Any], wait: bool,
    timeout: float,
) -> None:  # fmt: skip
    from modelops.serving.rollout.client import SwapClient

    client = SwapClient(url, _key(key_file))
    found = client.post(action, order)
    if wait:
        with progress("requests in hand"):
            found = client.wait(lambda now: not now["draining"], timeout, what="finished")
    _finish(found)


def _key(path: Path | None) -> str:
    import os

    from modelops.base.errors import UsageError
    from modelops.base.files import read_text
    from modelops.base.private import require_private

    key = (read_text(path) if path else os.environ.get(KEY_VARIABLE, "")).strip()
    if path:
        require_private(path)
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{path or KEY_VARIABLE}: holds no key",
            hint="one of `modelops serve key create NAME --admin`, alone",
        )
    return key


def _finish(found: dict[str, Any], code: int = 0) -> None:
    """Print a status, and end with an exit code."""
    from modelops.serving.rollout.client import describe_status

    emit(found, text=describe_status(found))
    if code:
        raise click.exceptions.Exit(code)
