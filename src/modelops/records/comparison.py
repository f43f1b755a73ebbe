"""Records of comparisons and A/B tests."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from modelops.records.base import (
    Amount,
    Answer,
    Count,
    InputRef,
    Measurement,
    Record,
    RecordPart,
    Share,
)
from modelops.records.evaluation import SourceInfo
from modelops.records.ranges import check_measured, check_value, range_of


class SignTest(RecordPart):
    """Exact two-sided sign test over prompts; a prompt goes to whom most of its votes do."""

    prompts_b: Count
    prompts_a: Count
    prompts_even: Count
    p_value: Share


class RaterSummary(RecordPart):
    """Summary of one rater. `left` counts choices of the left image; times are in seconds."""

    votes: Count = 0
    for_a: Count = 0
    for_b: Count = 0
    equal: Count = 0
    left: Count = 0
    shown_twice: Count = 0
    same_twice: Count = 0
    attention_shown: Count = 0
    attention_passed: Count = 0
    remaining: Count = 0
    median_s: Amount | None = None
    left_out: str | None = None


class AbTestRecord(Record):
    """abtest.json: what raters who did not know which was which say of B against A."""

    kind: Literal["abtest"] = "abtest"
    question: str
    sources: dict[str, SourceInfo]
    records: dict[str, InputRef]
    n_pairs: Count
    n_identical_pairs: Count = 0
    n_votes: Count = 0
    n_prompts: Count = 0
    n_undone: Count = 0
    metrics: dict[str, Measurement] = {}
    sign_test: SignTest | None = None
    raters: dict[str, RaterSummary] = {}
    left_out: dict[str, Count] = {}
    differences: list[str] = []
    warnings: list[str] = []

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.metrics)
        return self


class ComparedMetric(RecordPart):
    """One metric of the second record against the first. `difference` is second minus first."""

    metric: str
    verdict: Literal["better", "worse", "within noise", "not comparable"]
    reason: str
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = ""
    n: Count = 0  # prompts behind the difference
    p: Share | None = None  # two-sided, of this metric alone
    p_adjusted: Share | None = None  # by Holm over all compared metrics
    margin: Amount | None = None  # accepted loss, in the metric's own unit
    margin_source: Literal["", "asked", "default"] = ""
    within_margin: Literal["yes", "no", "undecided"] | None = None
    detectable: Amount | None = None  # smallest difference seen with 80 % power at this n
    prompts_needed: Count | None = None  # to show with 80 % power that equal sources are within it
    notes: list[str] = []

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        for value in (self.first, self.second):
            if value is not None:
                check_value(self.metric, value, range_of(self.metric))
        if self.difference is not None:
            check_value(self.metric, self.difference, range_of(self.metric, difference=True))
        return self


class ComparisonRecord(Record):
    """comparisons/*.json: what of the second evaluation is better or worse than in the first.

    `answer` is what `modelops compare` exits with: pass 0, fail 3, undecided 4. `metrics` repeats
    each difference, second minus first, as a measurement.
    """

    kind: Literal["comparison"] = "comparison"
    first: SourceInfo
    second: SourceInfo
    answer: Answer
    reasons: list[str] = []
    alpha: Share = 0.05
    adjustment: Literal["holm", "none"] = "holm"
    n_better: Count = 0
    n_worse: Count = 0
    n_within_noise: Count = 0
    n_not_comparable: Count = 0
    n_margins_missed: Count = 0
    n_margins_undecided: Count = 0
    comparisons: list[ComparedMetric] = []
    metrics: dict[str, Measurement] = {}
    images: dict[str, Measurement] = {}  # pixel by pixel, between the two sources' images
    warnings: list[str] = []

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.metrics, difference=True)
        check_measured(self.images)
        return self
