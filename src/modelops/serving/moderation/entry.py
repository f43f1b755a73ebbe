"""Entry of a blocked request for review: the request, the release, and the filter's answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelops.serving.provenance.receipts import Digest, ReceiptRelease


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class BlockedRequest(_Part):
    """Request that was blocked. The texts are there only with MODELOPS_QUARANTINE_PROMPTS=text."""

    prompt: str | None = None
    prompt_sha256: Digest
    negative_prompt: str | None = None
    negative_prompt_sha256: Digest
    steps: int | None = None
    guidance: float | None = None
    size: str | None = None


class BlockedPicture(_Part):
    """Image of a blocked request; `png` (base64) only of those that the filter blocked."""

    index: int
    seed: int
    score: float
    blocked: bool
    pixels_sha256: Digest
    batch_rows: list[int] = []
    png: str | None = None


class BlockingFilter(_Part):
    """Filter that blocked it: `sha256` is the digest of `info`, its own description."""

    name: str
    sha256: Digest
    threshold: float | None = None
    info: dict[str, Any] = {}


class Entry(_Part):
    """Blocked request, with everything needed to make its images again."""

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
        """The highest score of its images; None for a blocked prompt."""
        return max((picture.score for picture in self.pictures), default=None)
