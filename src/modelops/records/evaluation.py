"""Records of an evaluation: how images were made, and the values measured on them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from modelops.records.base import InputRef, Measurement, Record, RecordPart

SliceVerdict = Literal["differs", "within noise", "too few"]


class SourceInfo(RecordPart):
    """Model source that made the images."""

    kind: Literal["checkpoint", "artifact", "endpoint", "folder"]
    uri: str
    sha256: str | None = None
    runtime: str = ""
    precision: str = ""
    details: dict[str, str | int | float | bool | None] = {}


class Sampling(RecordPart):
    """Sampling of the images; part of every generated-image protocol."""

    seed: int
    scheduler: str
    steps: int
    guidance: float
    height: int
    width: int
    n_prompts: int
    replicates: int = 1
    prompts_sha256: str


class AlignmentModelRecord(Record):
    """lit.json: the alignment model that scores images against prompts, and how good it is."""

    kind: Literal["alignment_model"] = "alignment_model"
    image_tower: str
    text_tower: str
    weights_sha256: str
    settings: dict[str, str | int | float | bool | None] = {}
    counts: dict[str, int] = {}
    candidates: list[dict[str, str | int | float | bool | None]] = []
    metrics: dict[str, Measurement] = {}


class CopyingTest(RecordPart):
    """One one-sided test of samples against held-out images; a rank test has no counts."""

    name: Literal["near_copies", "unauthentic", "closer"]
    hits: int | None = None
    n: int
    heldout_hits: int | None = None
    n_heldout: int
    method: str
    p_value: float
    p_adjusted: float
    found: bool


class OverfittingNote(RecordPart):
    """Note whether the model fits its training images better than new ones, as far as known."""

    answer: Literal["overfitting", "no sign of overfitting", "cannot tell"]
    reason: str
    closer_to_training: bool | None = None  # samples, than real held-out images are
    since_step: int | None = None
    step: int | None = None  # whose losses these are
    train_loss: float | None = None
    validation_loss: float | None = None


class MemorizationVerdict(RecordPart):
    """Verdict whether samples copy training images more than held-out images seem to."""

    answer: Literal["copies", "no sign of copying", "cannot tell"]
    reason: str
    rule: str
    alpha: float
    tests: list[CopyingTest] = []
    detectable_rate: float | None = None  # share of copies found with 80 % power
    known_copies: int = 0  # training images changed a little, as a control of the features
    known_copies_found: int = 0
    caveats: list[str] = []
    overfitting: OverfittingNote | None = None


class SafetySweepPoint(RecordPart):
    """Share of images whose score is at or above a threshold, with its 95 % interval."""

    threshold: float
    rate: float
    low: float
    high: float


class SafetySweep(RecordPart):
    """Rates that the image filter would have flagged at other thresholds.

    `generated` are the evaluated images, `real` the held-out images (empty without a manifest),
    in rising order of threshold. The protocol is that of `unsafe_rate`, but for its threshold.
    """

    filter: str
    protocol: str
    method: str
    n: int
    generated: list[SafetySweepPoint]
    highest: float | None = None  # score of any generated image
    n_real: int = 0
    real: list[SafetySweepPoint] = []
    highest_real: float | None = None


class SliceMeasurement(RecordPart):
    """One metric on the prompts of one slice, against all other prompts.

    Each value is a mean over independent groups of prompts. `verdict` follows from `p_corrected`,
    which is Holm's over all `n_comparisons` of the evaluation; the intervals are not corrected.
    """

    by: str  # a manifest column, "tags" or "words"
    value: str
    metric: str
    verdict: SliceVerdict
    n_groups: int
    n_prompts: int
    inside: Measurement
    rest: Measurement
    difference: Measurement  # inside minus rest
    p_value: float | None = None
    p_corrected: float | None = None
    n_comparisons: int = 0


class EvaluationRecord(Record):
    """evaluations/*.json: how good a model source is and exactly how that was measured."""

    kind: Literal["evaluation"] = "evaluation"
    source: SourceInfo
    sampling: Sampling | None = None
    reference: InputRef | None = None
    metrics: dict[str, Measurement] = {}
    protocols: dict[str, dict[str, Any]] = {}
    files: dict[str, InputRef] = {}
    n_failed_images: Annotated[int, Field(ge=0)] = 0
    n_reused_images: Annotated[int, Field(ge=0)] = 0  # made by an earlier run of the same command
    memorization: MemorizationVerdict | None = None
    safety_sweep: SafetySweep | None = None
    slices: list[SliceMeasurement] = []

    @model_validator(mode="after")
    def _rates_are_shares(self) -> Self:
        for name, measured in self.metrics.items():
            if "rate" not in name.split("_") or measured.low is None or measured.high is None:
                continue
            if measured.low < 0 or measured.high > 1:
                raise ValueError(
                    f"{name}: [{measured.low}, {measured.high}] is no interval of a rate"
                )
        return self
