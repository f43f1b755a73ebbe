"""Records of an evaluation: how images were made, and the values measured on them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from modelops.records.base import (
    Amount,
    Count,
    InputRef,
    Measurement,
    Record,
    RecordPart,
    Share,
)
from modelops.records.ranges import check_measured

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
    steps: Count
    guidance: Amount
    height: Count
    width: Count
    n_prompts: Count
    replicates: Count = 1
    prompts_sha256: str


class AlignmentModelRecord(Record):
    """lit.json: the alignment model that scores images against prompts, and how good it is."""

    kind: Literal["alignment_model"] = "alignment_model"
    image_tower: str
    text_tower: str
    weights_sha256: str
    settings: dict[str, str | int | float | bool | None] = {}
    counts: dict[str, Count] = {}
    candidates: list[dict[str, str | int | float | bool | None]] = []
    metrics: dict[str, Measurement] = {}

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.metrics)
        return self


class CopyingTest(RecordPart):
    """One one-sided test of samples against held-out images; a rank test has no counts."""

    name: Literal["near_copies", "unauthentic", "closer"]
    hits: Count | None = None
    n: Count
    heldout_hits: Count | None = None
    n_heldout: Count
    method: str
    p_value: Share
    p_adjusted: Share
    found: bool


class OverfittingNote(RecordPart):
    """Note whether the model fits its training images better than new ones, as far as known."""

    answer: Literal["overfitting", "no sign of overfitting", "cannot tell"]
    reason: str
    closer_to_training: bool | None = None  # samples, than real held-out images are
    since_step: Count | None = None
    step: Count | None = None  # whose losses these are
    train_loss: Amount | None = None
    validation_loss: Amount | None = None


class MemorizationVerdict(RecordPart):
    """Verdict whether samples copy training images more than held-out images seem to."""

    answer: Literal["copies", "no sign of copying", "cannot tell"]
    reason: str
    rule: str
    alpha: Share
    tests: list[CopyingTest] = []
    detectable_rate: Share | None = None  # share of copies found with 80 % power
    known_copies: Count = 0  # training images changed a little, as a control of the features
    known_copies_found: Count = 0
    caveats: list[str] = []
    overfitting: OverfittingNote | None = None


class SafetySweepPoint(RecordPart):
    """Share of images whose score is at or above a threshold, with its 95 % interval."""

    threshold: float
    rate: Share
    low: Share
    high: Share


class SafetySweep(RecordPart):
    """Rates that the image filter would have flagged at other thresholds.

    `generated` are the evaluated images, `real` the held-out images (empty without a manifest),
    in rising order of threshold. The protocol is that of `unsafe_rate`, but for its threshold.
    """

    filter: str
    protocol: str
    method: str
    n: Count
    generated: list[SafetySweepPoint]
    highest: float | None = None  # score of any generated image
    n_real: Count = 0
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
    n_groups: Count
    n_prompts: Count
    inside: Measurement
    rest: Measurement
    difference: Measurement  # inside minus rest
    p_value: Share | None = None
    p_corrected: Share | None = None
    n_comparisons: Count = 0


class EvaluationRecord(Record):
    """evaluations/*.json: how good a model source is and exactly how that was measured."""

    kind: Literal["evaluation"] = "evaluation"
    source: SourceInfo
    sampling: Sampling | None = None
    reference: InputRef | None = None
    metrics: dict[str, Measurement] = {}
    protocols: dict[str, dict[str, Any]] = {}
    files: dict[str, InputRef] = {}
    n_failed_images: Count = 0
    n_reused_images: Count = 0  # made by an earlier run of the same command
    memorization: MemorizationVerdict | None = None
    safety_sweep: SafetySweep | None = None
    slices: list[SliceMeasurement] = []

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.metrics)
        for one in self.slices:
            for part in (one.inside, one.rest):
                check_measured({one.metric: part})
            check_measured({one.metric: one.difference}, difference=True)
        return self
