"""Records of gates, people and releases: verdicts, sign-offs, preflights, release.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    model_validator,
)
from typing_extensions import TypedDict  # typing's own has no pydantic support before 3.12

from modelops.base.files import sha256_json
from modelops.base.guidance import guidance_scale
from modelops.records.base import Answer, Count, InputRef, Record, RecordPart
from modelops.records.bounds import keeps_bound
from modelops.records.export import ReproductionCheck


def overall(answers: Iterable[Answer]) -> Answer:
    """Return the answer of criteria: `fail` wins over `undecided`, which wins over `pass`.

    Without any criterion nothing was decided.
    """
    found = set(answers) or {"undecided"}
    return "fail" if "fail" in found else "undecided" if "undecided" in found else "pass"


Words = Annotated[str, Field(pattern=r"\S")]
LABEL = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"
Label = Annotated[str, Field(pattern=LABEL)]
_ORDER: tuple[Answer, ...] = ("pass", "undecided", "fail")


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

    @model_validator(mode="after")
    def _a_pass_keeps_its_bound(self) -> Self:
        if self.answer == "pass" and not keeps_bound(self.bound, self.value, self.low, self.high):
            raise ValueError(f"{self.name}: {self.value} is said to pass {self.bound!r}")
        return self


class Verdict(Record):
    """verdict.json"""

    kind: Literal["verdict"] = "verdict"
    answer: Answer
    policy_sha256: str
    subject_sha256: str | None = None
    criteria: list[Criterion] = []

    @model_validator(mode="after")
    def _answer_of_the_criteria(self) -> Self:
        found = overall(line.answer for line in self.criteria)
        if self.answer == "pass" and not self.criteria:
            raise ValueError("the answer is 'pass', but there are no criteria")
        if _ORDER.index(self.answer) < _ORDER.index(found):
            raise ValueError(f"the answer is {self.answer!r}, that of the criteria is {found!r}")
        return self


class SignOff(Record):
    """FILE.signoff-ROLE.json: a person's approval of a file, valid until the file changes."""

    kind: Literal["signoff"] = "signoff"
    subject: InputRef
    name: Words
    role: Words
    statement: Words


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
    bytes: Count


Number = StrictInt | StrictFloat


class Golden(TypedDict, total=False):
    """Golden image of a release: from what it is made, where it lies and what its pixels are."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    prompt: str
    seed: StrictInt
    steps: StrictInt | None
    guidance: Number | None
    file: str
    fallback_file: str  # that of the release's fallback
    pixels_sha256: str


class Differences(TypedDict):
    """Images made in batches beside the same ones made otherwise; in grey levels of 255."""

    identical: Count
    max_difference: Count
    mean_difference: Number


class BatchInvariance(TypedDict):
    """Difference that batches make to a release's images, beside the same image alone (`company`)
    and from the pipeline that was evaluated (`offline`)."""

    runtime: str
    precision: str
    pictures: Count
    widest_rows: Count
    company: Differences
    offline: Differences


def _possible_guidance(value: float) -> float:
    """Return a guidance scale as it is, 0 too: the seal covers it."""
    guidance_scale(value)
    return value


class ReleaseDefaults(TypedDict, total=False):
    """Default sampling of a release's model, and its proofs about serving it."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    steps: Annotated[StrictInt, Field(ge=1, le=1000)] | None
    guidance: Annotated[Number, Field(ge=0, le=20), AfterValidator(_possible_guidance)] | None
    golden: Golden | None
    company: BatchInvariance | None


class ReleaseRecord(Record):
    """release.json: everything a release consists of, by digest."""

    kind: Literal["release"] = "release"
    name: Label
    version: Label
    model: str
    model_sha256: str
    fallback: str | None = None  # folder of an artifact for processors that the model is wrong on
    fallback_sha256: str | None = None
    reproduced: list[ReproductionCheck] = []  # by kind of processor: the model's error
    verdict_sha256: str
    verdict_answer: Answer = "pass"
    allowed_without_pass: bool = False
    policy_sha256: str | None = None
    defaults: ReleaseDefaults = {}
    files: dict[str, ReleaseFile]
    seal: str = ""  # sha256 of all other fields; see `sealed`

    def sealed(self) -> ReleaseRecord:
        """Return this record with its seal, by which an edit of it is found."""
        return self.model_copy(update={"seal": self.expected_seal})

    @property
    def expected_seal(self) -> str:
        """The seal that fits the other fields."""
        return sha256_json(self.model_dump(mode="json", exclude={"seal"}))
