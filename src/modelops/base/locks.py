"""Guards of outputs: one process at a time writes one, and files of others are not replaced."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from modelops.base.errors import InUseError, ModelopsError, UsageError

SUFFIX = ".modelops-lock"
_POLL_S = 0.5


@contextlib.contextmanager
def output_lock(
    path: str | os.PathLike[str],
    *,
    inside: bool = False,
    wait_s: float = 0.0,
    on_wait: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Hold the lock of an output while its writer runs; the kernel gives it back however that ends.

    The lock is a file `.NAME.modelops-lock` beside the output, which is removed afterwards. On a
    file system without locks nothing is held.

    Args:
        path: a file, or a folder that is replaced as a whole.
        inside: the output is what lies in the folder `path`, which need not be there yet and is
            not replaced itself: the lock is `.modelops-lock` in it.
        wait_s: seconds to wait for another process.
        on_wait: called once when there is something to wait for.

    Raises:
        InUseError: another process holds it; the message names the process.
        ModelopsError: the folder cannot be written.
    """
    target = Path(path).resolve()
    lock = target / SUFFIX if inside else target.parent / f".{target.name}{SUFFIX}"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _take(lock, path, wait_s, on_wait)
    except OSError as error:
        raise ModelopsError(
            f"{os.fspath(path)}: cannot write: {error.strerror or error}",
            hint="check permissions and what lies there",
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(handle)


def refuse_foreign(folder: str | os.PathLike[str], ours: re.Pattern[str]) -> None:
    """Make sure that a folder that is to be replaced holds nothing but what `ours` names.

    Raises:
        UsageError: it holds something else, or there is a file of its name.
    """
    top = Path(folder)
    entries = sorted(top.iterdir()) if top.is_dir() else [top] if top.exists() else []
    for entry in entries:
        if not ours.fullmatch(entry.name) or entry.is_dir():
            raise UsageError(
                f"{entry}: {top} would be replaced, and holds files that are not from here",
                hint="choose an empty directory, so that nothing of yours is lost",
            )


def _take(
    lock: Path,
    path: str | os.PathLike[str],
    wait_s: float,
    on_wait: Callable[[], None] | None,
) -> int:
    """Lock the file and write this process's number into it; returns its open handle."""
    end, waited = time.monotonic() + wait_s, False
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
            os.close(handle)
            if time.monotonic() >= end:
                raise InUseError(
                    f"{os.fspath(path)}: in use by process {owner or 'unknown'}",
                    hint="wait until it has ended, or write to another place",
                ) from None
            if on_wait and not waited:
                on_wait()
            waited = True
            time.sleep(_POLL_S)
            continue
        except OSError:  # no locks on this file system
            return handle
        if _is_at(lock, handle):
            with contextlib.suppress(OSError):  # a full disk: it is held all the same
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            return handle
        os.close(handle)  # its holder removed it between the two calls


def _is_at(lock: Path, handle: int) -> bool:
    try:
        found = lock.stat()
    except OSError:
        return False
    mine = os.fstat(handle)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
