"""Records of comparisons and A/B tests."""

from __future__ import annotations

from typing import Literal

from modelops.records.base import Answer, InputRef, Measurement, Record, RecordPart
from modelops.records.evaluation import SourceInfo


class SignTest(RecordPart):
    """Exact two-sided sign test over prompts; a prompt goes to whom most of its votes do."""

    prompts_b: int
    prompts_a: int
    prompts_even: int
    p_value: float


class RaterSummary(RecordPart):
    """Summary of one rater. `left` counts choices of the left image; times are in seconds."""

    votes: int = 0
    for_a: int = 0
    for_b: int = 0
    equal: int = 0
    left: int = 0
    shown_twice: int = 0
    same_twice: int = 0
    attention_shown: int = 0
    attention_passed: int = 0
    remaining: int = 0
    median_s: float | None = None
    left_out: str | None = None


class AbTestRecord(Record):
    """abtest.json: what raters who did not know which was which say of B against A."""

    kind: Literal["abtest"] = "abtest"
    question: str
    sources: dict[str, SourceInfo]
    records: dict[str, InputRef]
    n_pairs: int
    n_identical_pairs: int = 0
    n_votes: int = 0
    n_prompts: int = 0
    n_undone: int = 0
    metrics: dict[str, Measurement] = {}
    sign_test: SignTest | None = None
    raters: dict[str, RaterSummary] = {}
    left_out: dict[str, int] = {}
    differences: list[str] = []
    warnings: list[str] = []


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
    n: int = 0  # prompts behind the difference
    p: float | None = None  # two-sided, of this metric alone
    p_adjusted: float | None = None  # by Holm over all compared metrics
    margin: float | None = None  # accepted loss, in the metric's own unit
    margin_source: Literal["", "asked", "default"] = ""
    within_margin: Literal["yes", "no", "undecided"] | None = None
    detectable: float | None = None  # smallest difference seen with 80 % power at this n
    prompts_needed: int | None = None  # to show with 80 % power that equal sources are within it
    notes: list[str] = []


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
    alpha: float = 0.05
    adjustment: Literal["holm", "none"] = "holm"
    n_better: int = 0
    n_worse: int = 0
    n_within_noise: int = 0
    n_not_comparable: int = 0
    n_margins_missed: int = 0
    n_margins_undecided: int = 0
    comparisons: list[ComparedMetric] = []
    metrics: dict[str, Measurement] = {}
    images: dict[str, Measurement] = {}  # pixel by pixel, between the two sources' images
    warnings: list[str] = []
