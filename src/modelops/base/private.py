"""Private folders of a process, and private copies of models.

Weights stay mapped to their files for as long as they are used, so whoever writes into a model's
files changes the model that is running. What is loaded is therefore a copy that no other program
knows, and a digest is taken of the copy. Processes that share a store share one copy, and with it
the memory of its mapped weights. A copy is deleted once nothing needs its names; mapped files live
on without one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import sha256_file, sha256_json, tree_files

_COPIES = "modelops-model-"
_LOCK = "lock"
_PIECE = 1 << 30
_FRESH_S = 60.0  # a folder this young may not have its lock yet


class PrivateFolder:
    """Folder (mode 0700) that lives as long as a process holds its lock.

    Args:
        path: an existing folder of this user.

    Raises:
        OSError: it is being removed, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._process = path, os.getpid()
        self._handle = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise

    @classmethod
    def make(cls, prefix: str, parent: Path | None = None) -> PrivateFolder:
        """Make a new one in `parent`, or in the folder for temporary files.

        What killed processes left there under this prefix is deleted first.

        Raises:
            ModelopsError: it cannot be made.
        """
        place = parent or Path(tempfile.gettempdir())
        remove_abandoned(prefix, place)
        try:
            return cls(Path(tempfile.mkdtemp(prefix=prefix, dir=place)))
        except OSError as error:
            raise ModelopsError(
                f"{place}: cannot write: {error.strerror or error}",
                hint="set TMPDIR to a folder that can be written to",
            ) from error

    def rename(self, path: Path) -> None:
        """Give the folder another name.

        Raises:
            OSError: there is something of that name.
        """
        self.path.rename(path)
        self.path = path

    def close(self) -> None:
        """Let go of the folder, and delete it if no other process holds it."""
        if self._handle < 0 or os.getpid() != self._process:  # a fork of it shares its lock
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.path, ignore_errors=True)
        except OSError:
            pass  # another process holds it
        finally:
            os.close(self._handle)
            self._handle = -1


def remove_abandoned(prefix: str, parent: Path) -> None:
    """Delete this user's folders whose name begins so and whose processes have all ended."""
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            about = path.lstat()
            old = time.time() - about.st_mtime > _FRESH_S
            if old and about.st_uid == os.getuid() and (path / _LOCK).is_file():
                PrivateFolder(path).close()


_kept: list[weakref.finalize[..., Any]] = []  # copies of models that are in use


def close_copies() -> None:
    """Let go of every copy that is kept for a model; for a process that a signal will end."""
    while _kept:
        _kept.pop()()


class PrivateCopy:
    """Private copy of a directory.

    Attributes:
        files: posix path relative to it, to the file's sha256, of the copied bytes.
        sha256: digest of the whole, as `files.sha256_tree` gives it.
    """

    def __init__(self, folder: PrivateFolder) -> None:
        self._folder = folder
        self._name = next(entry.name for entry in folder.path.iterdir() if entry.is_dir())
        self.files = {name: sha256_file(path) for name, path in tree_files(self.path).items()}
        self.sha256 = sha256_json(self.files)

    @property
    def path(self) -> Path:
        """Its directory, which has the name of the original."""
        return self._folder.path / self._name

    def offer(self, store: Path) -> None:
        """Let the processes that use a store find the copy there, unless they have one."""
        with contextlib.suppress(OSError):
            self._folder.rename(_place(store, self.sha256))

    def keep_for(self, owner: object) -> None:
        """Keep the copy until `owner` is collected, for other processes of its store."""
        _kept[:] = [one for one in _kept if one.alive]
        _kept.append(weakref.finalize(owner, PrivateFolder(self._folder.path).close))

    def close(self) -> None:
        """Let go of the copy; what is mapped from it stays."""
        self._folder.close()


@contextlib.contextmanager
def private_copy(
    directory: str | os.PathLike[str],
    *,
    exclude: Iterable[str] = (),
    sha256: str | None = None,
    store: Path | None = None,
) -> Iterator[PrivateCopy]:
    """Copy a directory to where no other program changes it, and yield the copy to load it from.

    Errors of the block that name the copy are made to name the original.

    Args:
        directory: regular files, or a hub snapshot's links to them; see `files.tree_files`.
        exclude: top-level entries to leave out.
        sha256: digest that the copy must have.
        store: a private folder of several processes, which then share one copy; see
            `PrivateCopy.keep_for`.

    Raises:
        IntegrityError: the copy's digest is another, or there is a symbolic link.
        ModelopsError: there is no room for the copy.
    """
    origin = Path(directory)
    copy = _shared_copy(origin, exclude, sha256, store) if store else _copied(origin, exclude)
    try:
        if sha256 not in (None, copy.sha256):
            raise IntegrityError(
                f"{origin}: changed: its sha256 is {copy.sha256}, not {sha256}",
                hint="copy it again, or name the one that was meant",
            )
        yield copy
    except ModelopsError as error:
        error.message = error.message.replace(str(copy.path), str(origin))
        error.hint = error.hint and error.hint.replace(str(copy.path), str(origin))
        raise
    finally:
        copy.close()


def _shared_copy(
    origin: Path, exclude: Iterable[str], sha256: str | None, store: Path
) -> PrivateCopy:
    """Take the store's copy, or make one; a process at a time, so that only one is made."""
    with (store / "copies.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if sha256 is not None:
            with contextlib.suppress(OSError):  # there is none, or it is being removed
                return PrivateCopy(PrivateFolder(_place(store, sha256)))
        copy = _copied(origin, exclude, store)
        copy.offer(store)
        return copy


def _place(store: Path, sha256: str) -> Path:
    return store / f"{_COPIES}{sha256}"


def _copied(origin: Path, exclude: Iterable[str], parent: Path | None = None) -> PrivateCopy:
    files = tree_files(origin, exclude=exclude)
    folder = PrivateFolder.make(_COPIES, parent)
    try:
        root = folder.path / (origin.resolve().name or "model")
        root.mkdir()
        for name, path in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            _copy_file(path, root / name)
    except OSError as error:
        folder.close()
        size = sum(path.stat().st_size for path in files.values() if path.is_file())
        raise ModelopsError(
            f"{origin}: no private copy of its {size / 1e6:,.0f} MB in {folder.path.parent}: "
            f"{error.strerror or error}",
            hint="free some space, or set TMPDIR to a folder that has it",
        ) from error
    return PrivateCopy(folder)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes; file systems that can do so share the blocks until one side changes."""
    with source.open("rb") as reader, target.open("xb") as writer:
        with contextlib.suppress(OSError):  # not between these two; go on where it stopped
            while os.copy_file_range(reader.fileno(), writer.fileno(), _PIECE):
                pass
        shutil.copyfileobj(reader, writer, 1 << 20)


def require_private(path: str | os.PathLike[str]) -> None:
    """Refuse a file with a secret that other users of this machine can read or change.

    Raises:
        UsageError: its mode lets them.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{path}: others can read this key", hint=f"chmod 600 {path}")
