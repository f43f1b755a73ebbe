"""API keys by name, kept as digests, read again whenever their file changes.

A key is `mo-` and 256 random bits, made here and shown once; the file holds its sha256. A slow hash
(scrypt) protects passwords that people choose. It adds nothing to a secret that cannot be guessed,
costs every request tens of milliseconds, and would let anybody without a key burn the node's cores.

Rotation without a restart: create a second key, hand it out, revoke the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import atomic_path, read_text

log = logging.getLogger("modelops.serving")

PREFIX = "mo-"
KEY_BYTES = 32

_Rate = Annotated[int, Field(ge=1, le=1_000_000)]


class StoredKey(BaseModel):
    """Entry of the file for one key, without the key. Rates are per minute; None: the default."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: str
    revoked: str | None = None
    requests_per_minute: _Rate | None = None
    images_per_minute: _Rate | None = None
    role: Literal["user", "admin"] = "user"

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the usual role: a node of an older version refuses a file with an unknown
        field, and with it every request."""
        values: dict[str, Any] = handler(self)
        if values.get("role") == "user":
            del values["role"]
        return values


class KeyFile(BaseModel):
    """The file of keys."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["api_keys"] = "api_keys"
    schema_version: Literal[1] = 1
    keys: list[StoredKey] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Caller: the key's name, its rates per minute (None: the node's default), and whether it may
    swap releases.
    """

    name: str
    requests_per_minute: int | None = None
    images_per_minute: int | None = None
    admin: bool = False


ANONYMOUS = Caller(name="anonymous")


class UnknownKeyError(ModelopsError):
    """No valid key."""


class KeysUnavailableError(ModelopsError):
    """The file of keys cannot be read, so every request is refused."""


class KeyRing:
    """The keys that are valid now. Thread-safe.

    Args:
        digests: hex sha256 of further keys, without names or limits.
        path: a file of keys; looked at for each request, read when it has changed.

    Raises:
        UsageError: the file is missing or is no file of keys.
    """

    def __init__(self, *, digests: tuple[str, ...] = (), path: str | Path | None = None) -> None:
        self._fixed = tuple(
            (bytes.fromhex(digest), Caller(name=f"key-{number}"))
            for number, digest in enumerate(digests, start=1)
        )
        self._path = Path(path) if path else None
        self._lock = threading.Lock()
        self._read: tuple[tuple[bytes, Caller], ...] = ()
        self._state: tuple[int, int, int] | None = None
        self._broken = False
        if self._path is not None:
            self._read = _callers(read_keys(self._path))
            self._state = _state(self._path)

    @property
    def required(self) -> bool:
        """Return whether a key is asked for. A file without a valid key lets nobody in."""
        return bool(self._fixed) or self._path is not None

    def identify(self, authorization: str) -> Caller:
        """Return the owner of an Authorization header's key; ANONYMOUS when no key is asked for.

        Raises:
            UnknownKeyError: the key is unknown.
            KeysUnavailableError: the file cannot be read any more.
        """
        if not self.required:
            return ANONYMOUS
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found: Caller | None = None
        # Every digest is compared, so that the time says nothing about which one matched.
        for digest, caller in (*self._fixed, *self._current()):
            if hmac.compare_digest(given, digest):
                found = caller
        # The digest of nothing is what a script lists when its variable is not set.
        if scheme.lower() != "bearer" or not key.strip() or found is None:
            raise UnknownKeyError("a valid API key is needed")
        return found

    def _current(self) -> tuple[tuple[bytes, Caller], ...]:
        if self._path is None:
            return ()
        with self._lock:
            try:
                state = _state(self._path)
                if state != self._state:
                    self._read = _callers(read_keys(self._path))
                    self._state = state
                    log.info("API keys read again: %d valid", len(self._read))
                self._broken = False
            except UsageError as error:
                # A key that was to be revoked must not live on because of a typing error.
                self._state = None
                if not self._broken:
                    log.error("nobody is let in: %s", error.message)
                self._broken = True
                raise KeysUnavailableError("the API keys cannot be read") from error
            return self._read


def read_keys(path: str | Path) -> list[StoredKey]:
    """Read the keys of a file, revoked ones too.

    Raises:
        UsageError: the file is missing, unreadable or not a file of keys.
    """
    try:
        return KeyFile.model_validate_json(read_text(path)).keys
    except ValidationError as error:  # without its input, which may be a pasted key
        where = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
        raise UsageError(
            f"{path}: not a file of API keys{f' ({where})' if where else ''}",
            hint="make one with `modelops serve key create`",
        ) from error


def create_key(
    path: str | Path,
    name: str,
    *,
    requests_per_minute: int | None = None,
    images_per_minute: int | None = None,
    admin: bool = False,
) -> str:
    """Add a key to a file (made with mode 0600 when missing) and return it; it is kept nowhere.

    Raises:
        UsageError: the name is not allowed, or a valid key has it.
    """
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    try:
        stored = StoredKey(
            name=name,
            sha256=hashlib.sha256(key.encode()).hexdigest(),
            created=_now(),
            requests_per_minute=requests_per_minute,
            images_per_minute=images_per_minute,
            role="admin" if admin else "user",
        )
    except ValidationError as error:
        what = error.errors()[0]["loc"][0]
        raise UsageError(
            f"{what}: letters, digits, dots, dashes" if what == "name" else f"{what}: out of range"
        ) from error
    with _edited(Path(path), new=True) as keys:
        if any(other.name == name and other.revoked is None for other in keys):
            raise UsageError(
                f"{path}: there is a key {name!r}", hint="choose another name, or revoke it first"
            )
        keys.append(stored)
    return key


def revoke_key(path: str | Path, name: str) -> StoredKey:
    """Revoke the valid key of a name; a running node refuses it from its next request on.

    Raises:
        UsageError: there is none.
    """
    with _edited(Path(path), new=False) as keys:
        for key in keys:
            if key.name == name and key.revoked is None:
                key.revoked = _now()
                return key
        raise UsageError(f"{path}: no valid key {name!r}", hint="see `modelops serve key list`")


@contextlib.contextmanager
def _edited(path: Path, *, new: bool) -> Iterator[list[StoredKey]]:
    """Yield the keys of a file and write them back atomically; two editors wait for each other.

    Raises:
        UsageError: it is no file of keys, or is not there and not `new`.
        ModelopsError: it cannot be written.
    """
    if not new or path.exists():
        read_keys(path)  # a clear error before a lock file appears
    lock = path.with_name(f".{path.name}.lock")
    try:
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ModelopsError(f"{path}: cannot write: {error.strerror or error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        keys = read_keys(path) if path.exists() else []
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        yield keys
        with atomic_path(path, private=mode & 0o077 == 0) as temporary:
            temporary.write_text(KeyFile(keys=keys).model_dump_json(indent=2) + "\n", "utf-8")
        path.chmod(mode)
    finally:
        os.close(handle)


def _callers(keys: list[StoredKey]) -> tuple[tuple[bytes, Caller], ...]:
    return tuple(
        (
            bytes.fromhex(key.sha256),
            Caller(
                name=key.name,
                requests_per_minute=key.requests_per_minute,
                images_per_minute=key.images_per_minute,
                admin=key.role == "admin",
            ),
        )
        for key in keys
        if key.revoked is None
    )


def _state(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
