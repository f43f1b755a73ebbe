"""Signed receipts: one per image, saying what it was made of, and a bounded folder of them.

The signature covers everything but itself and the two prompt texts, which it binds by their
digests. So the same receipt can go to the client with the prompt and be stored without it, and both
copies verify. (A digest hides a prompt from a reader, not from someone who tries likely prompts.)
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import sha256_bytes
from modelops.serving.provenance.signing import ALGORITHM, SigningKey, VerifyingKey
from modelops.serving.telemetry.segments import SegmentLog, result_counter

PAYLOAD_TYPE = "application/vnd.modelops.receipt+json"
TEXTS = ("prompt", "negative_prompt")
_NAME = "receipts-"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ReceiptRequest(_Part):
    """Request with every default filled in. The texts may have been left out."""

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
    """Release; `sha256` is that of its release.json."""

    name: str
    version: str
    sha256: Digest


class ReceiptFilters(_Part):
    """Filters that let it pass, and the image filter's score in [0, 1]."""

    prompt: str
    image: str
    image_score: float


class ReceiptSignature(_Part):
    """Base64 ECDSA over DSSE's encoding of the receipt; `key_id` is the public key's sha256."""

    algorithm: Literal["ecdsa-p256-sha256"]
    key_id: Digest
    value: str


class ReceiptWatermark(_Part):
    """Invisible watermark that was embedded: its key, and whether it is found again.

    `pixels_sha256` is of the pixels with it; the receipt's own is of the pixels without it.
    """

    method: str
    key_id: Digest
    psnr_db: float
    z: float
    found: bool
    pixels_sha256: Digest


class Receipt(_Part):
    """Receipt of one image; `x_modelops` of a response, a line of a receipts file.

    `batch_rows` holds the rows of the forward pass at each step.
    `output_sha256` is of the file as sent, manifest included; `pixels_sha256` of the pixels before
    they were encoded, and before a watermark. `development` when a development key signed it.
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
    watermark: ReceiptWatermark | None = None
    pixels_sha256: Digest
    output_sha256: Digest
    output_bytes: int
    queue_s: float
    denoise_s: float
    signature: ReceiptSignature


def new_receipt_id() -> str:
    """Return 32 random hex digits, the id by which an image's manifest names its receipt."""
    return uuid.uuid4().hex


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def text_digest(text: str) -> str:
    """Return the hex sha256 of a prompt's UTF-8."""
    return sha256_bytes(text.encode())


def sign_receipt(content: Mapping[str, Any], key: SigningKey) -> dict[str, Any]:
    """Sign a receipt; `content` is a `Receipt` without `development` and `signature`."""
    content = {**content, "development": key.development}
    value = key.sign(PAYLOAD_TYPE, signed_bytes(content))
    return {
        **content,
        "signature": {"algorithm": ALGORITHM, "key_id": key.key_id, "value": value},
    }


def verify_receipt(receipt: Any, key: VerifyingKey) -> Receipt:
    """Check that `key` signed a receipt and that its prompt texts, if any, have the signed digests.

    Raises:
        IntegrityError: it is not a receipt, was changed, or another key signed it.
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
    except (IntegrityError, ValueError) as error:  # a number, say, that has no canonical form
        raise IntegrityError("the receipt was changed: its signature does not match") from error
    for name in TEXTS:
        text = getattr(checked.request, name)
        if text is not None and text_digest(text) != getattr(checked.request, f"{name}_sha256"):
            raise IntegrityError(f"the receipt was changed: {name} is not the one that was signed")
    return checked


def without_texts(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the receipt without prompt texts; the signature stays valid."""
    kept = dict(copy.copy(receipt))
    kept["request"] = {k: v for k, v in receipt["request"].items() if k not in TEXTS}
    return kept


def signed_bytes(receipt: Mapping[str, Any]) -> bytes:
    """Return the bytes that the signature covers, in canonical form."""
    content = without_texts(receipt)
    content.pop("signature", None)
    return canonical_bytes(content)


def canonical_bytes(value: Any) -> bytes:
    """Write JSON in the form of RFC 8785, so that readers in other languages get the same bytes.

    Raises:
        ValueError: NaN, infinity, an integer beyond 2^53 or text that is no Unicode.
    """
    return rfc8785.dumps(value)


def read_receipt(path: str | Path, *, receipt_id: str | None = None) -> Any:
    """Read a receipt as it was written: a JSON file, or one line of a JSON Lines file.

    Args:
        path: a receipt, a whole response of the Images API, a `.jsonl` file, or a folder of them.
        receipt_id: id of the receipt, if there are several; its first digits are enough.

    Raises:
        UsageError: the file is unreadable, or none or several receipts match.
    """
    source = Path(path)
    files = sorted(source.glob(f"{_NAME}*.jsonl")) if source.is_dir() else [source]
    found = [
        receipt
        for file in files
        if file.is_file() or not source.is_dir()  # the node may have made room meanwhile
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    values = _json_values(data)
    if values is None:
        # By the byte that ends a line: a prompt may hold what else Unicode calls a line's end. A
        # line that a power cut left half, within a letter perhaps, is no receipt.
        values = [one for line in data.split(b"\n") for one in _json_values(line) or []]
    receipts: list[Any] = []
    for value in values:
        images = value.get("data") if isinstance(value, dict) else None
        if isinstance(images, list):  # a response
            receipts += [item.get("x_modelops") for item in images if isinstance(item, dict)]
        else:
            receipts.append(value)
    return [receipt for receipt in receipts if isinstance(receipt, dict)]


def _json_values(data: bytes) -> list[Any] | None:
    """Return [the value] of a JSON text in UTF-8; None if it is not JSON."""
    try:
        return [json.loads(data.decode("utf-8"))]
    except (ValueError, RecursionError):  # also a number of too many digits
        return None


class ReceiptLog(SegmentLog):
    """Sink of receipts: files in a folder that never grows beyond a limit, see SegmentLog.

    Args:
        folder: made when it is missing.
        max_bytes: of all receipt files in it together.
        writers: processes that share the folder; each may fill the file it writes.
        registry: where the counter `modelops_receipts_total` is registered.

    Raises:
        ModelopsError: the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int,
        writers: int = 1,
        registry: CollectorRegistry | None = None,
    ) -> None:
        text = "Receipts by what became of them: written or failed"
        counter = result_counter("modelops_receipts", text, registry, "written", "failed")
        super().__init__(
            folder, prefix=_NAME, max_bytes=max_bytes, what="receipts", writers=writers,
            counter=counter,
        )  # fmt: skip

    def write(self, receipt: Mapping[str, Any]) -> bool:
        """Append one receipt; return False if it could not be written (logged and counted)."""
        return self.write_line(canonical_bytes(dict(receipt)))
