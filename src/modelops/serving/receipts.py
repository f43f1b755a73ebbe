"""What a picture was made of, signed: one receipt per image, and a bounded folder to keep them in.

The signature covers everything but itself and the two prompt texts, which it binds by their
digests. So the same receipt can go to the client with the prompt and be kept without it, and either
copy verifies. (The digest of a short prompt can be guessed: it hides a prompt from a reader, not
from somebody who tries likely prompts.)
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelops.errors import IntegrityError, ModelopsError, UsageError
from modelops.files import read_text, sha256_bytes
from modelops.serving.signing import ALGORITHM, SigningKey, VerifyingKey

log = logging.getLogger("modelops.serving")

PAYLOAD_TYPE = "application/vnd.modelops.receipt+json"
TEXTS = ("prompt", "negative_prompt")
SEGMENTS = 16  # a full folder loses a sixteenth of its oldest receipts at once
_NAME = "receipts-"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ReceiptRequest(_Part):
    """What was asked for, with every default filled in. The texts may have been left out."""

    prompt: str | None = None
    prompt_sha256: Digest
    negative_prompt: str | None = None
    negative_prompt_sha256: Digest
    seed: int
    steps: int
    guidance: float
    size: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
    output_format: Literal["png", "webp", "jpeg"]


class ReceiptRelease(_Part):
    """The release; `sha256` is that of its release.json."""

    name: str
    version: str
    sha256: Digest


class ReceiptFilters(_Part):
    """Which filters let it pass, and the image filter's score in [0, 1]."""

    prompt: str
    image: str
    image_score: float


class ReceiptSignature(_Part):
    """Base64 ECDSA over DSSE's encoding of the receipt; `key_id` is the public key's sha256."""

    algorithm: Literal["ecdsa-p256-sha256"]
    key_id: Digest
    value: str


class Receipt(_Part):
    """One image's receipt; `x_modelops` of a response, a line of a receipts file.

    `batch_rows` holds the rows of the forward pass at each step: with whom it was batched.
    `output_sha256` is of the file as sent, manifest included; `pixels_sha256` of the pixels before
    they were encoded. `development` when a development key signed it.
    """

    kind: Literal["receipt"]
    schema_version: Literal[1]
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    created: str
    modelops: str
    development: bool
    request: ReceiptRequest
    release: ReceiptRelease
    model_sha256: Digest
    runtime: str
    precision: str
    batch_rows: list[int]
    mean_rows: float
    filters: ReceiptFilters
    pixels_sha256: Digest
    output_sha256: Digest
    output_bytes: int
    queue_s: float
    denoise_s: float
    signature: ReceiptSignature


def new_receipt_id() -> str:
    """32 random hex digits: the name by which a picture's manifest points to its receipt."""
    return uuid.uuid4().hex


def utc_now() -> str:
    """The time, to the millisecond, as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def text_digest(text: str) -> str:
    """Hex sha256 of a prompt's UTF-8."""
    return sha256_bytes(text.encode())


def sign_receipt(content: Mapping[str, Any], key: SigningKey) -> dict[str, Any]:
    """A receipt: `content` is a `Receipt` without `development` and `signature`."""
    content = {**content, "development": key.development}
    value = key.sign(PAYLOAD_TYPE, signed_bytes(content))
    return {
        **content,
        "signature": {"algorithm": ALGORITHM, "key_id": key.key_id, "value": value},
    }


def verify_receipt(receipt: Any, key: VerifyingKey) -> Receipt:
    """A receipt that `key` signed and whose prompt texts, if any, have the signed digests.

    Raises:
        IntegrityError: it is no receipt, was changed, or somebody else signed it.
    """
    if not isinstance(receipt, dict):
        raise IntegrityError("not a receipt: no JSON object")
    try:
        checked = Receipt.model_validate(receipt)
    except (ValidationError, RecursionError) as error:
        where = (
            ".".join(map(str, error.errors()[0]["loc"]))
            if isinstance(error, ValidationError)
            else "it"
        )
        raise IntegrityError(f"not a receipt: {where} is missing or not what it should be") from (
            error
        )
    if checked.signature.key_id != key.key_id:
        raise IntegrityError(
            f"the receipt is signed by key {checked.signature.key_id[:12]}, "
            f"not by the trusted key {key.key_id[:12]}",
            hint="name the node's certificate or public key with --key",
        )
    try:
        key.verify(PAYLOAD_TYPE, signed_bytes(receipt), checked.signature.value)
    except IntegrityError as error:
        raise IntegrityError("the receipt was changed: its signature does not match") from error
    for name in TEXTS:
        text = getattr(checked.request, name)
        if text is not None and text_digest(text) != getattr(checked.request, f"{name}_sha256"):
            raise IntegrityError(f"the receipt was changed: {name} is not the one that was signed")
    return checked


def without_texts(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """The receipt without prompt texts; the signature still holds."""
    kept = dict(copy.copy(receipt))
    kept["request"] = {k: v for k, v in receipt["request"].items() if k not in TEXTS}
    return kept


def signed_bytes(receipt: Mapping[str, Any]) -> bytes:
    """What the signature covers, in canonical form."""
    content = without_texts(receipt)
    content.pop("signature", None)
    return canonical_bytes(content)


def canonical_bytes(value: Any) -> bytes:
    """JSON in the form of RFC 8785, so that another language's reader signs the same bytes.

    Raises:
        ValueError: NaN, infinity or text that is no Unicode.
    """
    return _canonical(value).encode()


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be"))
        return "{" + ",".join(f"{_canonical(k)}:{_canonical(v)}" for k, v in items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, float):
        return _ecmascript_number(value)
    return json.dumps(value, ensure_ascii=False)


def _ecmascript_number(value: float) -> str:
    """ECMAScript's Number::toString, which RFC 8785 asks for."""
    if not math.isfinite(value):
        raise ValueError("NaN and infinity have no JSON form")
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    text, point = "".join(map(str, digits)), len(digits) + exponent
    if len(text) <= point <= 21:
        number = text + "0" * (point - len(text))
    elif 0 < point <= 21:
        number = f"{text[:point]}.{text[point:]}"
    elif -6 < point <= 0:
        number = "0." + "0" * -point + text
    else:
        fraction = f".{text[1:]}" if len(text) > 1 else ""
        number = f"{text[0]}{fraction}e{point - 1:+d}"
    return ("-" if sign else "") + number


def read_receipt(path: str | Path, *, receipt_id: str | None = None) -> Any:
    """A receipt as it was written: a JSON file, or one line of a JSON Lines file.

    Args:
        path: a receipt, a whole response of the Images API, a `.jsonl` file, or a folder of them.
        receipt_id: which one, where there are several; its first digits are enough.

    Raises:
        UsageError: unreadable, none or several that fit.
    """
    source = Path(path)
    files = sorted(source.glob(f"{_NAME}*.jsonl")) if source.is_dir() else [source]
    found = [
        receipt
        for file in files
        for receipt in _receipts_of(file)
        if receipt_id is None or str(receipt.get("id", "")).startswith(receipt_id)
    ]
    named = f" that starts with {receipt_id}" if receipt_id else ""
    if not found:
        raise UsageError(f"{source}: no receipt{named}")
    if len(found) > 1:
        raise UsageError(f"{source}: {len(found)} receipts{named}", hint="say which one with --id")
    return found[0]


def _receipts_of(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    try:
        values = [json.loads(text)]
    except (json.JSONDecodeError, RecursionError):
        values = []
        for line in text.splitlines():
            # A line that a full disk cut short is no receipt.
            with contextlib.suppress(json.JSONDecodeError, RecursionError):
                values.append(json.loads(line))
    receipts: list[Any] = []
    for value in values:
        data = value.get("data") if isinstance(value, dict) else None
        if isinstance(data, list):  # a response
            receipts += [item.get("x_modelops") for item in data if isinstance(item, dict)]
        else:
            receipts.append(value)
    return [receipt for receipt in receipts if isinstance(receipt, dict)]


class ReceiptLog:
    """Appends receipts to files of a folder that never grows beyond a limit.

    One line each, in one write; a killed process loses none, a power cut may lose the last ones.
    Every process writes files of its own, so that several may share a folder; the oldest files go
    first.

    Args:
        folder: made when it is missing.
        max_bytes: of all receipt files in it together.
        registry: where the counter `modelops_receipts_total` is registered.

    Raises:
        ModelopsError: the folder cannot be made or written to.
    """

    def __init__(
        self, folder: str | Path, *, max_bytes: int, registry: CollectorRegistry | None = None
    ) -> None:
        if max_bytes < SEGMENTS * 4096:
            raise UsageError(f"receipts: {max_bytes} bytes are too few", hint="use 1 MB or more")
        self.folder = Path(folder)
        self.segment_bytes = max_bytes // SEGMENTS
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._file: int | None = None
        self._written = 0
        self._failing = False
        self._counter = Counter(
            "modelops_receipts", "Receipts by what became of them: written or failed",
            ["result"], registry=registry,
        )  # fmt: skip
        for result in ("written", "failed"):
            self._counter.labels(result)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._open()
        except OSError as error:
            raise ModelopsError(
                f"{self.folder}: receipts cannot be kept here: {error.strerror or error}",
                hint="choose another folder for receipts, or leave it out",
            ) from error

    def write(self, receipt: Mapping[str, Any]) -> bool:
        """Append one receipt; False when it could not be kept, which is logged and counted."""
        line = canonical_bytes(dict(receipt)) + b"\n"
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                self._counter.labels("failed").inc()
                if not self._failing:  # once, not for each picture while the disk is full
                    log.error("receipts cannot be written: %s", error.strerror or error)
                self._failing = True
                return False
            if self._failing:
                log.warning("receipts can be written again")
            self._failing = False
        self._counter.labels("written").inc()
        return True

    @property
    def failing(self) -> bool:
        """Whether the last receipt could not be kept."""
        return self._failing

    def close(self) -> None:
        """Close the file; a later `write` opens another."""
        with self._lock:
            self._close()

    def _append(self, line: bytes) -> None:
        if self._file is None or self._written + len(line) > self.segment_bytes:
            self._close()
            self._open()
        assert self._file is not None
        try:
            done = os.write(self._file, line)
            if done != len(line):
                raise OSError(28, "No space left on device")
        except OSError:
            # No half line stays before the next receipt.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._written)
            raise
        self._written += done

    def _open(self) -> None:
        self._make_room()
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
        path = self.folder / f"{_NAME}{stamp}-{nanoseconds:09d}-{os.getpid()}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._written = 0

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None

    def _make_room(self) -> None:
        """Delete the oldest files until another full one fits."""
        sizes = {}
        for path in sorted(self.folder.glob(f"{_NAME}*.jsonl")):
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total + self.segment_bytes <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
