"""Folder of the quarantine: its files, their bounds and their content."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import check_writable, is_leftover
from modelops.serving.moderation.clock import FolderClock
from modelops.serving.moderation.encryption import decrypt_entry
from modelops.serving.moderation.entry import Entry
from modelops.serving.telemetry.stamps import next_stamp, stamp_to_ns

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

PAGE = "review.html"
SEALED = ".sealed"
_NAME = "entry-"
_MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class EntryFile:
    """File of the folder, by its name: time of writing, id of the entry, size in bytes."""

    path: Path
    id: str
    written: float
    size: int

    @property
    def sealed(self) -> bool:
        """Return whether it is encrypted to a reviewer."""
        return self.path.suffix == SEALED


def list_files(folder: str | Path) -> list[EntryFile]:
    """List the entries of a folder, oldest first; nothing is opened.

    Raises:
        UsageError: there is no such folder, or it cannot be read.
    """
    try:
        return sorted(_entry_files(Path(folder)), key=lambda file: file.path.name)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}") from error


def tidy_folder(
    folder: Path, *, max_age_s: float, max_bytes: int | None = None, now: float | None = None
) -> tuple[int, int]:
    """Delete entries over the bounds, oldest first; return (number too old, number for room).

    A page built from entries is deleted with the first of them, as it holds their images. A page
    that was finished after its last entry was deleted is deleted now.

    Args:
        max_age_s: seconds; an entry that is as old is deleted, and with 0 every one.
        max_bytes: of all entries together; None deletes none for room.
        now: seconds since 1970 of the folder's clock, which is read when this is not given.

    Raises:
        UsageError: there is no such folder, or it cannot be read.
        OSError: an entry cannot be deleted.
    """
    files = list_files(folder)
    if now is None:
        now = FolderClock(folder, lambda: newest_written(folder)).now()
    old = [file for file in files if not max_age_s or now - file.written >= max_age_s]
    kept = files[len(old) :]
    total, over = sum(file.size for file in kept), []
    for file in kept:
        if max_bytes is None or total <= max_bytes:
            break
        over.append(file)
        total -= file.size
    gone = [sum(_delete(file.path) for file in some) for some in (old, over)]
    if any(gone) or not files:
        (folder / PAGE).unlink(missing_ok=True)
    for path in folder.glob(f".{_NAME}*"):
        with contextlib.suppress(OSError):
            if is_leftover(path):
                path.unlink()
    return gone[0], gone[1]


def read_entry(file: EntryFile, key: X25519PrivateKey | None = None) -> Entry:
    """Read the entry in a file.

    Args:
        key: the reviewer's private key, for an encrypted entry.

    Raises:
        UsageError: the entry is encrypted and no key is given, or the file cannot be read.
        IntegrityError: the file is not an entry, or is encrypted to another key.
    """
    try:
        if file.size > _MAX_BYTES:
            raise UsageError(f"{file.path}: over {_MAX_BYTES >> 20} MiB")
        data = file.path.read_bytes()
    except OSError as error:
        raise UsageError(f"{file.path}: {error.strerror or error}") from error
    if file.sealed:
        data = decrypt_entry(data, file.id, file.path, key)
    try:
        entry = Entry.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise IntegrityError(f"{file.path}: not a quarantine entry") from error
    if entry.id != file.id:
        raise IntegrityError(f"{file.path}: holds entry {entry.id}, not the one of its name")
    return entry


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter.

    Raises:
        ModelopsError: the folder cannot be made or written to.
        UsageError: the folder exists, and others can enter it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        open_to_others = folder.stat().st_mode & 0o077
    except OSError as error:
        raise ModelopsError(
            f"{folder}: no quarantine can be kept here: {error.strerror or error}",
            hint="choose another folder for the quarantine, or leave it out",
        ) from error
    if open_to_others:
        raise UsageError(
            f"{folder}: others can enter this folder, so no quarantine is kept in it",
            hint=f"chmod 700 {folder}",
        )
    check_writable(folder)


def _delete(path: Path) -> bool:
    """Delete a file; return whether it was still there, so that only one process counts it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def newest_written(folder: Path) -> float | None:
    """Return the newest entry's time in seconds since 1970; None in an empty folder."""
    return max((file.written for file in _entry_files(folder)), default=None)


def entry_name(folder: Path, identity: str, suffix: str, now: float) -> str:
    """Return the name of a new entry's file: it holds the time of writing, and sorts last.

    Args:
        now: seconds since 1970.
    """
    stamp = next_stamp(int(now * 1e9), (_stamp(path) for path in folder.glob(f"{_NAME}*")))
    return f"{_NAME}{stamp}-{identity}{suffix}"


def _stamp(path: Path) -> str:
    return path.stem.removeprefix(_NAME).rpartition("-")[0]


def _entry_files(folder: Path) -> Iterator[EntryFile]:
    for path in folder.iterdir():
        if not path.name.startswith(_NAME):
            continue
        written, identity = stamp_to_ns(_stamp(path)), path.stem.rpartition("-")[2]
        if written is None or path.suffix not in (".json", SEALED):
            continue
        with contextlib.suppress(ValueError, FileNotFoundError):  # not ours, or just deleted
            bytes.fromhex(identity)
            # By the name: copying a folder does not make its entries young again.
            yield EntryFile(path, identity, written / 1e9, path.stat().st_size)
