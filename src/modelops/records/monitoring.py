"""Records that `modelops monitor` writes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from modelops.records.base import Amount, Count, Record, Share

MonitorAnswer = Literal["keep", "investigate", "retrain", "undecided"]
Outcome = Literal["found", "below margin", "not found", "undecided", "not measured"]


class DriftTest(BaseModel):
    """One test of the window against the reference.

    `found` needs both: p_adjusted at most the threshold, and an effect of at least the margin.
    `effect` is in the unit of the margin, with a 95 % interval. If the test was not made, `p` and
    the fields after it are None, and `reason` says why.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    outcome: Outcome
    reason: str
    method: str = ""
    n_window: Count = 0
    n_reference: Count = 0
    statistic: float | None = None
    p: Share | None = None
    p_adjusted: Share | None = None
    threshold: float | None = None
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    unit: str = ""


class MonitorRecord(Record):
    """Verdict on a window of a drift log against a reference.

    `alpha` is the chance that a window without drift has any test that finds one (Holm over the
    tests made); `period_alpha` is that chance over the `windows` windows until the next evaluation.
    Both are upper bounds, for independent rows. `reference` names what the window was compared
    with: the release's own evaluation, or an earlier window of the log.
    """

    kind: Literal["monitor"] = "monitor"
    answer: MonitorAnswer
    reasons: list[str]
    release: str
    release_sha256: str
    model_sha256: str
    reference: Literal["evaluation", "baseline", "none"]
    window: str
    baseline: str | None = None
    alpha: Share
    period_alpha: Share
    windows: Count
    adjustment: Literal["holm"] = "holm"
    tests: list[DriftTest] = Field(default_factory=list)
    n_requests: Count = 0
    n_images: Count = 0
    n_prompts: Count = 0
    refused: dict[str, Count] = Field(default_factory=dict)
    evaluation_age_days: float | None = None
    evaluate_every_days: Amount
    overdue: bool = False
    # What is not tested: shares of settings, p50 and p95 by phase.
    about: dict[str, float] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
