"""`modelops serve key`: who may use a served release."""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.options import FILE, PATH
from modelops.cli.output import emit, is_json, json_option, table

DEFAULT_FILE = "api_keys.json"

_file_option = click.option(
    "--file", "path", default=DEFAULT_FILE, show_default=True, type=PATH,
    help="File of keys, which `modelops serve --keys` reads.",
)  # fmt: skip


@click.group()
def key() -> None:
    """Make, list and revoke API keys; a running server follows without a restart.

    The file holds names, limits and digests, never a key.

    \b
    Examples:
      modelops serve key create alice --requests-per-minute 60
      modelops serve key list
      modelops serve key revoke alice
    """


@key.command()
@click.argument("name")
@_file_option
@click.option(
    "--requests-per-minute",
    type=click.IntRange(1, 1_000_000),
    help="Rate limit of this key, in requests per minute.",
)
@click.option(
    "--images-per-minute",
    type=click.IntRange(1, 1_000_000),
    help="Rate limit of this key, in images of the release's own steps per minute; one with twice "
    "the steps counts twice.",
)
@click.option(
    "--admin", is_flag=True, help="Allow this key to swap releases with `modelops serve swap`."
)
@click.option(
    "--out",
    metavar="FILE",
    type=FILE,
    help="New file for the key, which only its owner can read; without, the key is printed.",
)
@json_option
def create(
    name: str,
    path: Path,
    requests_per_minute: int | None,
    images_per_minute: int | None,
    admin: bool,
    out: Path | None,
) -> None:
    """Make a key called NAME and print it, only this once: it cannot be read later.

    \b
    Examples:
      modelops serve key create alice --images-per-minute 30
      modelops serve key create ops --admin --out admin.key
    """
    from modelops.base.errors import UsageError
    from modelops.base.files import atomic_path
    from modelops.serving.http.keys import create_key

    def make() -> str:
        return create_key(
            path,
            name,
            requests_per_minute=requests_per_minute,
            images_per_minute=images_per_minute,
            admin=admin,
        )

    if out is None:
        made = make()
        emit({"status": "ok", "name": name, "key": made, "file": str(path)}, text=made)
        return
    if out.exists():
        raise UsageError(f"{out}: exists already", hint="name a new file")
    with atomic_path(out, private=True) as temporary:
        temporary.write_text(make() + "\n", "ascii")
    emit({"status": "ok", "name": name, "out": str(out), "file": str(path)}, text=str(out))


@key.command("list")
@_file_option
@json_option
def list_keys(path: Path) -> None:
    """Show names, limits and dates.

    \b
    Example:
      modelops serve key list
    """
    from modelops.serving.http.keys import read_keys

    keys = read_keys(path)
    emit({"keys": [entry.model_dump(exclude={"sha256"}) for entry in keys]})
    if not is_json():
        table(
            ["name", "role", "created", "revoked", "requests/min", "images/min"],
            [
                [
                    entry.name,
                    entry.role,
                    entry.created,
                    entry.revoked or "",
                    str(entry.requests_per_minute or ""),
                    str(entry.images_per_minute or ""),
                ]
                for entry in keys
            ],
        )


@key.command()
@click.argument("name")
@_file_option
@json_option
def revoke(name: str, path: Path) -> None:
    """Refuse the key called NAME from the next request on.

    \b
    Example:
      modelops serve key revoke alice
    """
    from modelops.serving.http.keys import revoke_key

    revoked = revoke_key(path, name).revoked
    emit(
        {"status": "ok", "name": name, "revoked": revoked, "file": str(path)},
        text=f"{path}: {name} revoked",
    )  # fmt: skip
