"""Active release: a folder of releases, and the file in it that a restart reads.

RELEASES/
  pilot-1/  pilot-2/  ...   releases
  serving.json              the one that was promoted last; written atomically

A release is named by its path below the folder. Names that climb out, absolute ones and symbolic
links that lead out are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import read_text, safe_join, sha256_file, write_text
from modelops.releases.verify import RECORD_FILE
from modelops.serving.settings import NodeSettings

STATE_FILE = "serving.json"

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ActiveRelease(BaseModel):
    """serving.json. `release` is a path below the folder, `sha256` that of its release.json."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["serving"] = "serving"
    schema_version: Literal[1] = 1
    release: str
    name: str
    version: str
    sha256: _Digest
    promoted: str
    by: str
    instead_of_sha256: _Digest | None = None


def release_below(folder: str | Path, name: str) -> Path:
    """Return the directory of the release `name` (a relative path), with links resolved.

    Raises:
        UsageError: the path leads out of the folder, or is not a release.
    """
    path = safe_join(folder, name).resolve()
    if path == Path(folder).resolve() or not (path / RECORD_FILE).is_file():
        raise UsageError(f"{name}: no release of this name", hint="see the folder of releases")
    if not (path / RECORD_FILE).resolve().is_relative_to(path):
        raise UsageError(f"{name}: its {RECORD_FILE} is a link that leads out")
    return path


def write_active_release(folder: str | Path, standing: ActiveRelease) -> None:
    """Write which release a restart serves.

    Raises:
        ModelopsError: the folder cannot be written.
    """
    write_text(Path(folder) / STATE_FILE, standing.model_dump_json(indent=2) + "\n")


def read_active_release(folder: str | Path) -> ActiveRelease | None:
    """Read serving.json; None when there is none.

    Raises:
        UsageError: the file cannot be read or is something else.
    """
    path = Path(folder) / STATE_FILE
    if not path.exists():
        return None
    try:
        return ActiveRelease.model_validate_json(read_text(path))
    except ValidationError as error:
        raise UsageError(
            f"{path}: not what a promotion writes",
            hint="remove it and name the release to serve",
        ) from error


def release_to_serve(path: str | Path) -> Path:
    """Return the release at a path: the directory itself, or the active one of several in it.

    A folder without serving.json is unambiguous when one release lies in it.

    Raises:
        UsageError: several releases and none of them is active.
        IntegrityError: the active release was replaced by another one.
    """
    folder = Path(path)
    if (folder / RECORD_FILE).is_file() or not folder.is_dir():
        return folder  # anything but a release is refused when it is verified
    standing = read_active_release(folder)
    if standing is not None:
        found = release_below(folder, standing.release)
        if sha256_file(found / RECORD_FILE) != standing.sha256:
            raise IntegrityError(
                f"{found}: not the release that was promoted (see {folder / STATE_FILE})",
                hint="put that release back, or remove the file and name the release to serve",
            )
        return found
    inside = sorted(entry.parent.name for entry in folder.glob(f"*/{RECORD_FILE}"))
    if len(inside) == 1:
        return release_below(folder, inside[0])
    if not inside:
        return folder
    raise UsageError(
        f"{folder}: holds several releases and no {STATE_FILE} that says which one is active",
        hint=f"name one: {folder / inside[0]}",
    )


def release_from_settings(settings: NodeSettings) -> Path:
    """Return the settings' release, else the active one of their folder of releases.

    Raises:
        UsageError: neither is set, or see `release_to_serve`.
        IntegrityError: see `release_to_serve`.
    """
    path = settings.release or settings.releases
    if not path:
        raise UsageError("MODELOPS_RELEASE is not set", hint="export it, or use `modelops serve`")
    return release_to_serve(path)
