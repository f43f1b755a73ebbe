"""Records: files that one stage leaves for another, as versioned models. Imports no torch.

A record names its inputs by sha256, says how it ended (`ok`, `failed`, `refused`), and gives each
number as a `Measurement`: a value with an interval, n, a method and a protocol, or the reason why
it was not measured.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modelops.base.environment import Environment
from modelops.base.files import sha256_json, write_json

SCHEMA_VERSION = 1
Status = Literal["ok", "failed", "refused"]
Answer = Literal["pass", "fail", "undecided"]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]  # seconds, ratios, rates per second
Share = Annotated[float, Field(ge=0, le=1)]


class RecordPart(BaseModel):
    """A part of a record: no unknown keys, no NaN."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class InputRef(RecordPart):
    """An input by name and digest; `path` is relative to the record's workspace where it can be."""

    path: str
    sha256: str


class Measurement(RecordPart):
    """Number with its interval, or the reason why there is none.

    `value`, `low` and `high` are None exactly when `not_measured` holds the reason.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    method: str = ""
    n: Count = 0
    unit: str = ""
    higher_is_better: bool | None = None
    protocol: str | None = None
    warnings: list[str] = []
    details: dict[str, float | int | str | bool | None] = {}
    not_measured: str | None = None

    @model_validator(mode="after")
    def _value_or_reason(self) -> Self:
        if (self.value is None) == (self.not_measured is None):
            raise ValueError("give either a value or the reason it was not measured")
        if self.value is not None and (self.low is None or self.high is None):
            raise ValueError("a value needs an interval")
        if self.value is None and (self.low is not None or self.high is not None):
            raise ValueError("an interval needs a value")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("the interval is upside down")
        if self.value is not None and self.low is not None and self.high is not None:
            if self.n < 1:
                raise ValueError("a value of nothing: n is 0")
            slack = 1e-9 * max(1.0, abs(self.low), abs(self.high))
            if not self.low - slack <= self.value <= self.high + slack:
                raise ValueError("the value is outside its interval")
        return self

    @classmethod
    def missing(cls, reason: str) -> Measurement:
        """A measurement that was not made, and why."""
        return cls(not_measured=reason)


class Record(RecordPart):
    """Fields of every record."""

    kind: str
    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    status: Status = "ok"
    error: str | None = None
    inputs: dict[str, InputRef] = {}
    seeds: dict[str, int] = {}
    environment: Environment | None = None
    started_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    duration_s: Amount = 0.0

    @model_validator(mode="after")
    def _known_version(self) -> Self:
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(
                f"schema_version {self.schema_version} is newer than this modelops understands "
                f"({SCHEMA_VERSION}); upgrade modelops"
            )
        return self

    @property
    def digest(self) -> str:
        """sha256 of the record's canonical JSON: what other records cite."""
        return sha256_json(self.model_dump(mode="json"))

    def write(self, path: str | Path) -> None:
        """Write atomically as indented JSON."""
        write_json(path, self.model_dump(mode="json"))
