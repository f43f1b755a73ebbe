"""Rows of the drift log: one per sampled request, and one per image that was made of it.

They are JSON lines in files `drift-*.jsonl` of a folder. Of a prompt they hold only its length, its
scripts and a tag that is equal for equal prompts of one process. The tag's key is random and only
in memory, so that likely prompts cannot be tried against the log.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from modelops.monitoring.scripts import SCRIPTS

PREFIX = "drift-"
Features = npt.NDArray[np.float16]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Tag = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class _Row(BaseModel):
    """`time` is Unix time; `request` names a request without its id."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)

    schema_version: Literal[1]
    time: float = Field(gt=0)
    release: Digest
    model: Digest
    request: Tag
    prompt: Tag


class RequestRow(_Row):
    """A request that reached the prompt filter, `blocked` if it was stopped there."""

    kind: Literal["request"]
    filter: str
    blocked: bool
    characters: int = Field(ge=0)
    tokens: int = Field(ge=0)
    scripts: dict[str, Share]


class ImageRow(_Row):
    """An image that reached the image filter, `blocked` if it was withheld.

    `extractor` is the digest of the features' protocol, None where there are no features, which are
    float16, little-endian, in base64. `seconds` are those of the request's phases, `total` up to
    the image filter's answer; `rows` the mean rows of the forward passes.
    """

    kind: Literal["image"]
    filter: str
    blocked: bool
    score: Share
    steps: int
    guidance: float
    rows: float
    seconds: dict[str, float]
    extractor: Digest | None = None
    features: str | None = None


def row_of(values: dict[str, Any]) -> RequestRow | ImageRow:
    """Check a line's values and return the row.

    Raises:
        ValueError: the values are not a row; pydantic's error is a ValueError.
    """
    kind = values.get("kind")
    if kind == "request":
        return RequestRow.model_validate(values)
    if kind == "image":
        return ImageRow.model_validate(values)
    raise ValueError(f"kind {kind!r}")


def features_to_text(features: npt.NDArray[np.floating]) -> str:
    """Features [D] to base64 of float16."""
    return base64.b64encode(np.asarray(features, "<f2").tobytes()).decode("ascii")


def text_to_features(text: str, dim: int) -> Features | None:
    """Decode features from text; None if it is damaged, of another length or not finite."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) != 2 * dim:
        return None
    features = np.frombuffer(data, "<f2")
    return features if np.isfinite(features).all() else None


def shares_to_vector(shares: dict[str, float]) -> npt.NDArray[np.float64]:
    """Shares by script to a vector [len(SCRIPTS)]; an unknown script counts as other."""
    vector = np.zeros(len(SCRIPTS))
    for script, share in shares.items():
        vector[SCRIPTS.index(script if script in SCRIPTS else "other")] += share
    return vector
