"""What a filter blocked, kept for people who say whether it was right; off without a folder.

Without it a blocked picture is forgotten and only counted. With it each blocked request becomes one
file in a folder that nobody else can read; `modelops serve review` lists, shows and decides them.
The prompt is left out unless it is asked for too, and nothing is ever sent anywhere. The folder is
bounded by bytes and by age. Whatever goes wrong in here is counted and logged: the request was
blocked, and stays so.

With a reviewer's public key the files are encrypted, by HPKE (RFC 9180: X25519, HKDF-SHA256,
AES-256-GCM), so that the node itself cannot read them again.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelops import __version__
from modelops.errors import IntegrityError, MissingExtraError, ModelopsError, UsageError
from modelops.files import canonical_json, check_writable, sha256_bytes, sha256_json, write_bytes
from modelops.serving.golden import pixels_sha256
from modelops.serving.provenance.receipts import Digest, ReceiptRelease, text_digest, utc_now

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    from modelops.models.sources import ImageRequest
    from modelops.serving.provenance.seal import Origin
    from modelops.serving.settings import NodeSettings

log = logging.getLogger("modelops.serving")

Withheld = tuple[npt.NDArray[np.uint8], "ImageRequest", Sequence[int]]
PAGE = "review.html"
RESULTS = ("written", "failed", "expired", "displaced")
_NAME = "entry-"
_SEALED = ".sealed"
_INFO = b"modelops quarantine 1"
_LEFTOVER_S = 3600.0  # a temporary file this old is nobody's any more
_MAX_BYTES = 256 * 1024 * 1024


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class BlockedRequest(_Part):
    """What was asked for. The texts are there only where MODELOPS_QUARANTINE_PROMPTS=text."""

    prompt: str | None = None
    prompt_sha256: Digest
    negative_prompt: str | None = None
    negative_prompt_sha256: Digest
    steps: int | None = None
    guidance: float | None = None
    size: str | None = None


class BlockedPicture(_Part):
    """A picture of a blocked request; `png` (base64) only of those that the filter blocked."""

    index: int
    seed: int
    score: float
    blocked: bool
    pixels_sha256: Digest
    batch_rows: list[int] = []
    png: str | None = None


class BlockingFilter(_Part):
    """The filter that blocked it: `sha256` is the digest of `info`, what it says of itself."""

    name: str
    sha256: Digest
    threshold: float | None = None
    info: dict[str, Any] = {}


class Entry(_Part):
    """One blocked request, with what it takes to make its pictures again."""

    kind: Literal["quarantine"] = "quarantine"
    schema_version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    created: str
    modelops: str
    stage: Literal["prompt", "image"]
    request_id: str
    request: BlockedRequest
    release: ReceiptRelease
    model_sha256: Digest
    runtime: str
    precision: str
    filter: BlockingFilter
    reasons: list[str] = []
    partial: int | None = None
    pictures: list[BlockedPicture] = []

    @property
    def score(self) -> float | None:
        """The highest score of its pictures; None for a blocked prompt."""
        return max((picture.score for picture in self.pictures), default=None)


@dataclass(frozen=True, slots=True)
class EntryFile:
    """A file of the folder by its name: when it was written, its entry's id, its size in bytes."""

    path: Path
    id: str
    written: float
    size: int

    @property
    def sealed(self) -> bool:
        """Whether it is encrypted to a reviewer."""
        return self.path.suffix == _SEALED


class Quarantine:
    """Writes entries to a bounded folder; may be called by any thread, and never raises later on.

    Several processes may share the folder; together they may go over the bound by one entry each.

    Args:
        folder: made, for its owner only, when it is missing.
        origin: which release and runtime, see `seal.Origin`.
        max_bytes: of all entries together; the oldest go first.
        max_age_s: an entry is deleted when it is this old, whether or not requests come in.
        texts: also keep prompts, and the words for which a prompt was blocked.
        reader: a reviewer's public key; entries are encrypted to it.
        registry: where the counter `modelops_quarantine_total` is registered.

    Raises:
        ModelopsError: the folder cannot be made or written to.
        UsageError: others can read the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        origin: Origin,
        *,
        max_bytes: int,
        max_age_s: float,
        texts: bool = False,
        reader: X25519PublicKey | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._origin = origin
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._texts, self._reader = texts, reader
        self._lock = threading.Lock()
        self._failing = False
        self._counter = Counter(
            "modelops_quarantine", "Quarantine entries by what became of them", ["result"],
            registry=registry,
        )  # fmt: skip
        for result in RESULTS:
            self._counter.labels(result)
        _make_private(self.folder)
        if reader is not None:
            _hpke()
        self._stop = threading.Event()
        self._tidy()
        self._thread = threading.Thread(
            target=self._tidy_now_and_then, name="modelops-quarantine", daemon=True
        )
        self._thread.start()

    def keep_pictures(
        self,
        request_id: str,
        images: Sequence[Withheld],
        scores: Sequence[float],
        blocked: Sequence[bool],
        filter_name: str,
        filter_info: Mapping[str, Any],
        *,
        partial: int | None = None,
    ) -> bool:
        """Write an entry of a request whose pictures were withheld; False when it is lost.

        Args:
            images: (pixels [H, W, 3] uint8 RGB, request, batch_rows) of each.
            scores, blocked: what the filter said of each.
            partial: the number of the partial image, where the work was not finished.
        """

        def make() -> Entry:
            return self._entry(
                "image", request_id, images[0][1], filter_name, filter_info,
                partial=partial,
                pictures=[
                    BlockedPicture(
                        index=index,
                        seed=request.seed,
                        score=round(float(score), 6),
                        blocked=bool(stopped),
                        pixels_sha256=pixels_sha256(pixels),
                        batch_rows=list(batch_rows),
                        png=_to_png(pixels) if stopped else None,
                    )
                    for index, ((pixels, request, batch_rows), score, stopped) in enumerate(
                        zip(images, scores, blocked, strict=True)
                    )
                ],
            )  # fmt: skip

        return self._write(make)

    def keep_prompt(
        self,
        request_id: str,
        prompt: str,
        negative_prompt: str,
        reasons: Sequence[str],
        filter_name: str,
        filter_info: Mapping[str, Any],
    ) -> bool:
        """Write an entry of a prompt that was refused; False when it is lost."""
        from modelops.models.sources import ImageRequest

        def make() -> Entry:
            request = ImageRequest(prompt=prompt, seed=0, negative_prompt=negative_prompt)
            return self._entry(
                "prompt", request_id, request, filter_name, filter_info,
                # A word list's reasons quote the prompt.
                reasons=list(reasons) if self._texts else [],
            )  # fmt: skip

        return self._write(make)

    def close(self) -> None:
        """End the thread that deletes what is too old."""
        self._stop.set()
        self._thread.join(5)

    def _entry(
        self,
        stage: Literal["prompt", "image"],
        request_id: str,
        request: ImageRequest,
        name: str,
        info: Mapping[str, Any],
        **more: Any,
    ) -> Entry:
        origin = self._origin
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}
        size = f"{request.width}x{request.height}" if request.width and request.height else None
        threshold = info.get("threshold")
        return Entry(
            id=uuid.uuid4().hex,
            created=utc_now(),
            modelops=__version__,
            stage=stage,
            request_id=request_id,
            request=BlockedRequest(
                **(texts if self._texts else {}),
                prompt_sha256=text_digest(texts["prompt"]),
                negative_prompt_sha256=text_digest(texts["negative_prompt"]),
                steps=request.steps, guidance=request.guidance, size=size,
            ),
            release=ReceiptRelease(
                name=origin.release.name, version=origin.release.version,
                sha256=origin.release_sha256,
            ),
            model_sha256=origin.release.model_sha256,
            runtime=origin.source.runtime,
            precision=origin.source.precision,
            filter=BlockingFilter(
                name=name,
                sha256=sha256_json(dict(info)),
                threshold=threshold if isinstance(threshold, float | int) else None,
                info=dict(info),
            ),
            **more,
        )  # fmt: skip

    def _write(self, make: Any) -> bool:
        try:
            entry: Entry = make()
            data = canonical_json(entry.model_dump(exclude_none=True)).encode()
            suffix = ".json"
            if self._reader is not None:
                data, suffix = seal_entry(data, entry, self._reader), _SEALED
            with self._lock:
                self._tidy(len(data))
                if len(data) > self._max_bytes:
                    raise ModelopsError(f"an entry of {len(data)} bytes is over the bound")
                write_bytes(self.folder / _file_name(entry.id, suffix), data, private=True)
        except Exception as error:  # whatever it is, the request stays blocked
            self._counter.labels("failed").inc()
            if not self._failing:  # once, not for each request while the disk is full
                said = error.message if isinstance(error, ModelopsError) else type(error).__name__
                log.error("quarantine: an entry cannot be kept: %s", said)
            self._failing = True
            return False
        if self._failing:
            log.warning("quarantine: entries can be kept again")
        self._failing = False
        self._counter.labels("written").inc()
        return True

    def _tidy_now_and_then(self) -> None:
        while not self._stop.wait(min(3600.0, max(1.0, self._max_age_s / 10))):
            with self._lock, contextlib.suppress(OSError):
                self._tidy()

    def _tidy(self, room: int = 0) -> None:
        """Delete what is too old, and the oldest entries until `room` bytes fit."""
        expired, displaced = tidy_folder(
            self.folder, max_age_s=self._max_age_s, max_bytes=self._max_bytes - room
        )
        self._counter.labels("expired").inc(expired)
        self._counter.labels("displaced").inc(displaced)


def open_quarantine(
    settings: NodeSettings, origin: Origin, registry: CollectorRegistry | None = None
) -> Quarantine | None:
    """The quarantine that the settings ask for, or None.

    Raises:
        UsageError: as `check_quarantine`.
        ModelopsError: the folder cannot be written to.
    """
    reader = check_quarantine(settings)
    if not settings.quarantine:
        return None
    return Quarantine(
        settings.quarantine,
        origin,
        max_bytes=settings.quarantine_mb * 1_000_000,
        max_age_s=settings.quarantine_days * 86400,
        texts=settings.quarantine_prompts == "text",
        reader=reader,
        registry=registry,
    )


def check_quarantine(settings: NodeSettings) -> X25519PublicKey | None:
    """The reviewer's key that the settings name, if any; writes nothing.

    Raises:
        UsageError: a setting that makes no sense, or the reviewer's key cannot be read.
    """
    for name, value, choices in (
        ("quarantine_prompts", settings.quarantine_prompts, ("digest", "text")),
        ("quarantine_stages", settings.quarantine_stages, ("images", "all")),
    ):
        if value not in choices:
            raise UsageError(f"MODELOPS_{name.upper()}={value!r}: must be {' or '.join(choices)}")
    return read_public_key(settings.quarantine_key) if settings.quarantine_key else None


def list_files(folder: str | Path) -> list[EntryFile]:
    """The entries of a folder, oldest first; nothing is opened.

    Raises:
        UsageError: there is no such folder, or it cannot be read.
    """
    try:
        return sorted(_entry_files(Path(folder)), key=lambda file: file.path.name)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}") from error


def tidy_folder(folder: Path, *, max_age_s: float, max_bytes: int | None = None) -> tuple[int, int]:
    """Delete entries over the bounds, oldest first; (how many too old, how many for room).

    A page built from entries goes with the first of them: it holds their pictures.
    """
    files, now = list_files(folder), time.time()
    old = [file for file in files if now - file.written >= max_age_s]
    kept = files[len(old) :]
    total, over = sum(file.size for file in kept), []
    for file in kept:
        if max_bytes is None or total <= max_bytes:
            break
        over.append(file)
        total -= file.size
    gone = [sum(_delete(file.path) for file in some) for some in (old, over)]
    if any(gone):
        (folder / PAGE).unlink(missing_ok=True)
    for path in folder.glob(f".{_NAME}*.tmp"):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > _LEFTOVER_S:
                path.unlink()
    return gone[0], gone[1]


def read_entry(file: EntryFile, key: X25519PrivateKey | None = None) -> Entry:
    """The entry in a file.

    Args:
        key: the reviewer's private key, for an encrypted one.

    Raises:
        UsageError: encrypted and no key given, or it cannot be read.
        IntegrityError: not an entry, or encrypted to somebody else.
    """
    try:
        if file.size > _MAX_BYTES:
            raise UsageError(f"{file.path}: over {_MAX_BYTES >> 20} MiB")
        data = file.path.read_bytes()
    except OSError as error:
        raise UsageError(f"{file.path}: {error.strerror or error}") from error
    if file.sealed:
        data = _unseal(data, file, key)
    try:
        entry = Entry.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise IntegrityError(f"{file.path}: not a quarantine entry") from error
    if entry.id != file.id:
        raise IntegrityError(f"{file.path}: holds entry {entry.id}, not the one of its name")
    return entry


def seal_entry(data: bytes, entry: Entry, reader: X25519PublicKey) -> bytes:
    """An entry's JSON encrypted to a reviewer: a line that says to whom, then HPKE's output.

    The id is bound to the ciphertext, so that one entry cannot be passed off as another.
    """
    head = {"kind": "quarantine-sealed", "schema_version": 1, "key_id": key_id(reader)}
    info = _INFO + bytes.fromhex(entry.id)
    return json.dumps(head).encode() + b"\n" + _hpke().encrypt(data, reader, info=info)


def _unseal(data: bytes, file: EntryFile, key: X25519PrivateKey | None) -> bytes:
    from cryptography.exceptions import InvalidTag

    head, _, body = data.partition(b"\n")
    try:
        reader = str(json.loads(head)["key_id"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{file.path}: not a quarantine entry") from error
    if key is None:
        raise UsageError(
            f"{file.path.name} is encrypted to key {reader[:12]}",
            hint="give the reviewer's private key with --key",
        )
    if key_id(key.public_key()) != reader:
        raise IntegrityError(
            f"{file.path.name} is encrypted to key {reader[:12]}, not to the one given"
        )
    try:
        plain: bytes = _hpke().decrypt(body, key, info=_INFO + bytes.fromhex(file.id))
    except (InvalidTag, ValueError) as error:
        raise IntegrityError(f"{file.path}: was changed, it does not decrypt") from error
    return plain


def read_public_key(path: str | Path) -> X25519PublicKey:
    """A reviewer's X25519 public key (PEM).

    Raises:
        UsageError: there is none in the file.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _read_key(path, load_pem_public_key, X25519PublicKey, "public")


def read_private_key(path: str | Path) -> X25519PrivateKey:
    """A reviewer's X25519 private key (PEM, without a passphrase).

    Raises:
        UsageError: there is none in the file.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _read_key(
        path, lambda data: load_pem_private_key(data, None), X25519PrivateKey, "private"
    )


def key_id(key: X25519PublicKey) -> str:
    """Hex sha256 of the raw public key."""
    return sha256_bytes(key.public_bytes_raw())


def _read_key(path: str | Path, load: Any, kind: type, what: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = load(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path}: no {what} key in PEM without a passphrase") from error
    if not isinstance(key, kind):
        made = "openssl genpkey -algorithm X25519 -out reviewer.pem"
        public = "openssl pkey -in reviewer.pem -pubout -out reviewer.pub"
        raise UsageError(
            f"{path}: not an X25519 {what} key", hint=made if what == "private" else public
        )
    return key


def _hpke() -> Any:
    try:
        from cryptography.hazmat.primitives import hpke
    except ImportError as error:
        raise MissingExtraError(
            "encrypting the quarantine needs a newer cryptography",
            hint="pip install 'cryptography>=47'",
        ) from error
    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def _make_private(folder: Path) -> None:
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
    """Whether it was still there: of several processes only one counts it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _file_name(identity: str, suffix: str) -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    return f"{_NAME}{stamp}-{nanoseconds:09d}-{identity}{suffix}"


def _entry_files(folder: Path) -> Iterator[EntryFile]:
    import calendar

    for path in folder.iterdir():
        parts = path.stem.split("-")
        if len(parts) != 4 or f"{parts[0]}-" != _NAME or path.suffix not in (".json", _SEALED):
            continue
        with contextlib.suppress(ValueError, FileNotFoundError):  # not ours, or just deleted
            # By the name: copying a folder does not make its entries young again.
            written = calendar.timegm(time.strptime(parts[1], "%Y%m%dT%H%M%S"))
            bytes.fromhex(parts[3])
            yield EntryFile(path, parts[3], written + int(parts[2]) / 1e9, path.stat().st_size)


def _to_png(pixels: Any) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
