"""Atomic writes, digests and safe paths. Every file modelops writes goes through here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modelops.base.errors import ConfigError, IntegrityError, ModelopsError, UsageError

_CHUNK = 1 << 20
_TEMPORARY, _OLD = ".modelops-tmp", ".modelops-old"
_MADE_BY = re.compile(
    rf"\.(?P<machine>[0-9a-f]{{8}})-(?P<pid>[0-9]+)-[^.]+{re.escape(_TEMPORARY)}$"
)
_FOREIGN_S = 24 * 3600.0


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB pieces.

    Raises:
        UsageError: the file is missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as handle:
            while piece := handle.read(_CHUNK):
                digest.update(piece)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values have equal text; NaN is refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256_json(value: Any) -> str:
    """Hex sha256 of `canonical_json(value)`."""
    return sha256_bytes(canonical_json(value).encode())


def tree_files(
    root: str | os.PathLike[str], *, exclude: Iterable[str] = (), empty_folders: bool = True
) -> dict[str, Path]:
    """Return every file below `root` as {posix path relative to root: path}, sorted.

    Links of a hub snapshot into its repository's blobs are taken for the files they lead to, and
    these are returned.

    Args:
        root: a directory; one that does not exist has no files.
        exclude: names of top-level entries to leave out.
        empty_folders: allow folders without a file, which no digest of the tree speaks of.

    Raises:
        IntegrityError: there is something that a digest cannot speak of: another symbolic link, a
            pipe, socket or device, or a folder that cannot be listed or entered.
    """
    top, skipped = Path(root), set(exclude)
    files: dict[str, Path] = {}

    def refuse(error: OSError) -> None:
        raise IntegrityError(f"{error.filename}: {error.strerror}", hint="check its permissions")

    try:
        for folder, folders, names in os.walk(top, onerror=refuse) if top.is_dir() else ():
            place = Path(folder)
            kept = [name for name in (*folders, *names) if place != top or name not in skipped]
            folders[:] = [name for name in folders if name in kept]
            if not (kept or empty_folders or place == top):
                raise IntegrityError(f"{place}: an empty folder", hint="remove it")
            for path in (place / name for name in kept):
                if path.is_symlink():
                    files[path.relative_to(top).as_posix()] = _linked_file(top, path)
                elif path.is_file():
                    files[path.relative_to(top).as_posix()] = path
                elif not path.is_dir():
                    raise IntegrityError(f"{path}: neither a file nor a folder", hint="remove it")
    except OSError as error:
        refuse(error)
    return dict(sorted(files.items(), key=lambda item: item[0].split("/")))


def _linked_file(top: Path, path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if not is_hub_blob(top, target):
        raise IntegrityError(
            f"{path}: symbolic links are not allowed here", hint="copy the file instead"
        )
    if not target.is_file():
        raise IntegrityError(
            f"{path}: a link to {target.name}, which the hub's cache lacks",
            hint="download the repository again",
        )
    return target


def is_hub_blob(root: str | os.PathLike[str], target: Path) -> bool:
    """Return whether a path is where a hub snapshot's links may lead: its repository's blobs.

    The Hugging Face cache keeps REPOSITORY/snapshots/REVISION/FILE as links to REPOSITORY/blobs/.

    Args:
        root: directory in a snapshot.
        target: path without links.
    """
    place = Path(os.path.realpath(root))
    for folder in (place, *place.parents):
        if folder.parent.name == "snapshots":
            return target.parent == folder.parent.parent / "blobs"
    return False


def sha256_tree(root: str | os.PathLike[str], *, exclude: Iterable[str] = ()) -> str:
    """Digest of a directory: the sha256 of {relative path: sha256 of its bytes}."""
    if not Path(root).is_dir():
        raise UsageError(f"{root}: no such directory")
    return sha256_json(
        {name: sha256_file(path) for name, path in tree_files(root, exclude=exclude).items()}
    )


def sha256_path(path: str | os.PathLike[str], *, exclude: Iterable[str] = ()) -> str:
    """`sha256_file` of a file or `sha256_tree` of a directory."""
    return sha256_tree(path, exclude=exclude) if Path(path).is_dir() else sha256_file(path)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success fsync it and rename it there.

    A process killed at any moment leaves either the old file or the new one. A `private` file is
    never readable by others.

    Raises:
        ModelopsError: the disk is full or the folder cannot be written.
    """
    target = Path(path)
    temporary = _unique_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except Exception as error:
        _raise_write_error(target, error)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], data: bytes, *, private: bool = False) -> None:
    """Atomically write `data` to `path`; `private`: for its owner's eyes only."""
    with atomic_path(path, private=private) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Atomically write `text` to `path` as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Atomically write `value` as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8 text.

    Raises:
        UsageError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # some editors begin with a mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON.

    Raises:
        UsageError: the file is missing, unreadable, not UTF-8 or not JSON, has a key twice, NaN, a
            number of thousands of digits, or is nested too deeply.
    """
    return parse_json(read_text(path), source=str(path))


def parse_json(text: str, *, source: str) -> Any:
    """Parse JSON that somebody else may have written; see `read_json`.

    Args:
        text: JSON.
        source: its name, for messages.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{source}: the key {twice!r} is there twice")
        return found

    def constant(name: str) -> Any:
        raise UsageError(f"{source}: {name} is not a finite number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UsageError(f"{source}: not JSON: line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise UsageError(f"{source}: nested too deeply") from error
    except ValueError as error:  # Python refuses to read numbers of more than 4,300 digits
        raise UsageError(f"{source}: {error}") from error


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping. A key that occurs twice is refused (YAML would keep the last).

    Raises:
        UsageError: the file is missing, unreadable or not UTF-8.
        ConfigError: not YAML, not a mapping, or a key twice; the message names the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = []
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is there twice", key_node.start_mark
                    )
                seen.append(key)
            return super().construct_mapping(node, deep=deep)

    text = read_text(path)
    try:
        data = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or number
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        said = str(error) if isinstance(error, ValueError) else "not YAML"
        problem = getattr(error, "problem", None) or said
        raise ConfigError(f"{path}:{where} {problem}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: should be a mapping of keys to values")
    return data


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it takes the place of `path`.

    An existing directory at `path` is moved aside, replaced and then deleted, so a killed process
    leaves the old directory, the new one, or (between two renames) the old one under a name that
    starts with a dot and ends in `.modelops-old`.

    Raises:
        ModelopsError: the disk is full or the folder cannot be written.
    """
    target = Path(path)
    temporary = _unique_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        entries = (entry for entry in temporary.rglob("*") if entry.is_file() or entry.is_dir())
        with ThreadPoolExecutor(16) as pool:  # waiting together is 20 times faster for small files
            list(pool.map(_sync, (temporary, *entries)))
        old = target.parent / f".{target.name}{_OLD}"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        _raise_write_error(target, error)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(name: str) -> tuple[str, str]:
    """Return (prefix, suffix) of a temporary file or directory that will become `name`.

    They say that modelops made it, and which process of which machine.
    """
    return f".{name}.{_machine()}-{os.getpid()}-", _TEMPORARY


def remove_leftovers(directory: str | os.PathLike[str]) -> int:
    """Delete what killed processes of modelops left in `directory`, and nothing else.

    What a running process is writing stays, and so do temporary files of other programs.
    Directories moved aside are put back when their target is missing.

    Returns:
        The number of entries removed.
    """
    top = Path(directory)
    removed = 0
    for entry in top.iterdir() if top.is_dir() else ():
        if entry.name.startswith(".") and entry.name.endswith(_OLD):
            target = top / entry.name[1 : -len(_OLD)]
            if target.exists():
                shutil.rmtree(entry, ignore_errors=True)
                removed += 1
            else:
                entry.rename(target)
        elif is_leftover(entry):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
            removed += 1
    return removed


def is_leftover(path: Path) -> bool:
    """Return whether a temporary file or directory was left by a process that has ended.

    One of another machine, on a disk that several share, counts as left after a day.
    """
    found = _MADE_BY.search(path.name)
    if found is None or not path.name.startswith("."):
        return False
    if found["machine"] != _machine():
        return time.time() - path.lstat().st_mtime > _FOREIGN_S
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _machine() -> str:
    """Eight characters that tell machines, and containers on one, apart."""
    return hashlib.sha256(f"{socket.gethostname()}".encode()).hexdigest()[:8]


def safe_join(root: str | os.PathLike[str], relative: str) -> Path:
    """Join a path that came from a file to `root`, refusing to leave it.

    Raises:
        UsageError: the path is empty, absolute, holds a null byte, climbs out of root, or a
            symbolic link on the way leads out of root (those of a hub snapshot may; see
            `tree_files`).
    """
    top = Path(root)
    if not relative or "\0" in relative or "\\" in relative:
        raise UsageError(f"{relative!r}: not a usable relative path")
    path = top / relative
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise UsageError(f"{relative}: leads outside {top}", hint="use paths below the root")
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(top)) and not is_hub_blob(top, target):
        raise UsageError(f"{relative}: a symbolic link leads outside {top}", hint="copy the file")
    return path


def cache_directory(name: str) -> Path:
    """A folder for what can be made again: $MODELOPS_CACHE, or modelops below the user's caches.

    It need not exist: whatever writes into it makes it.
    """
    root = os.environ.get("MODELOPS_CACHE")
    if root:
        return Path(root).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modelops" / name


def check_writable(directory: str | os.PathLike[str], *, need_bytes: int = 0) -> None:
    """Make sure that `directory` can be made, written to, and has `need_bytes` free.

    Raises:
        ModelopsError: it cannot.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as handle:
            handle.write(b"modelops")
            handle.flush()
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise ModelopsError(
            f"{path}: cannot write here: {error.strerror or error}",
            hint="choose another directory or free some space",
        ) from error
    if free < need_bytes:
        raise ModelopsError(
            f"{path}: {free / 1e6:,.0f} MB free, {need_bytes / 1e6:,.0f} MB needed",
            hint="free some space or choose another directory",
        )


def _raise_write_error(target: Path, error: Exception) -> None:
    """Raise a known error if that is what one says: OSError, or safetensors' own for the same."""
    ours = type(error).__module__.startswith("safetensors") and "I/O error" in str(error)
    if isinstance(error, OSError) or ours:
        raise ModelopsError(
            f"{target}: cannot write: {getattr(error, 'strerror', None) or error}",
            hint="check free space and permissions",
        ) from error


def _unique_sibling(target: Path) -> Path:
    """A name for a temporary file or directory that will become `target`."""
    prefix, suffix = temporary_name(target.name)
    return target.parent / f"{prefix}{secrets.token_hex(6)}{suffix}"


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
