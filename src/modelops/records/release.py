"""Records of gates, people and releases: verdicts, sign-offs, preflights, release.json."""

from __future__ import annotations

from typing import Any, Literal

from modelops.records.base import Answer, InputRef, Record, RecordPart
from modelops.records.export import ReproductionCheck


class Criterion(RecordPart):
    """One line of a verdict."""

    name: str
    evidence: str
    metric: str
    bound: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    answer: Answer
    reason: str


class Verdict(Record):
    """verdict.json"""

    kind: Literal["verdict"] = "verdict"
    answer: Answer
    policy_sha256: str
    subject_sha256: str | None = None
    criteria: list[Criterion] = []


class SignOff(Record):
    """FILE.signoff-ROLE.json: a person's approval of a file, valid until the file changes."""

    kind: Literal["signoff"] = "signoff"
    subject: InputRef
    name: str
    role: str
    statement: str


class PreflightRecord(Record):
    """Distance of a model from its own numbers on one machine; written by `modelops serve
    preflight`.
    """

    kind: Literal["preflight"] = "preflight"
    model_sha256: str
    processor: str
    runtime: str = ""  # that would serve it here; "" where none gives its numbers
    reason: str = ""
    reproduced: list[ReproductionCheck] = []
    fallback: bool = False  # the release's other artifact would be served here


class ReleaseFile(RecordPart):
    sha256: str
    bytes: int


class ReleaseRecord(Record):
    """release.json: everything a release consists of, by digest."""

    kind: Literal["release"] = "release"
    name: str
    version: str
    model: str
    model_sha256: str
    fallback: str | None = None  # folder of an artifact for processors that the model is wrong on
    fallback_sha256: str | None = None
    reproduced: list[ReproductionCheck] = []  # by kind of processor: the model's error
    verdict_sha256: str
    verdict_answer: Answer = "pass"
    allowed_without_pass: bool = False
    policy_sha256: str | None = None
    defaults: dict[str, Any] = {}
    files: dict[str, ReleaseFile]
