"""Verdict on a canary from its counts and the stable release's: better, worse, or neither.

Four measures, lower is better for each: share of failed requests, of prompts and of images that a
filter stopped, and seconds of a network evaluation (as a ratio).

- worse: the canary's rate is higher by Fisher's exact test, or its evaluations take longer than the
  margin allows by the sign test. Corrected over the measures by Holm's method.
- within noise: an interval says that it is no worse than by the margin. That must hold for all four
  measures, so no correction is due (an intersection-union test).
- better: the same, and one measure is lower by the same tests and correction.
- undecided: neither has been shown yet.

`judge` is one look at what was counted; `modelops.serving.rollout.interim` says when one is due and
what it may spend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from modelops.metrics.multiple import holm
from modelops.metrics.noninferiority import (
    higher_rate_p,
    median_above_p,
    median_by_signs,
    rate_difference,
)
from modelops.serving.rollout.trial import MEASURED, CanaryRules, TrialData

Answer = Literal["better", "within noise", "worse", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One measure.

    Attributes:
        measure: errors, prompt_filter, image_filter or latency.
        canary, stable: [hits, requests] of a rate; None for latency.
        value: difference of rates, or ratio of seconds; with its interval `low`, `high`; None where
            it cannot be said.
        margin: `high` below it is no worse.
        n: requests of the canary, or blocks of time.
        p_worse, p_better: one-sided, corrected.
    """

    measure: str
    answer: Answer
    canary: tuple[int, int] | None = None
    stable: tuple[int, int] | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float
    n: int
    p_worse: float
    p_better: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryVerdict:
    """Verdict on a canary: the answer, its findings, and a sentence for a person.

    `alpha`, `seconds`, `requests` (of the canary) and `findings` are those of the look that made
    it; `alpha` is what that look spent on finding it worse, 0 before the first one.
    """

    answer: Answer
    sentence: str
    alpha: float
    seconds: float
    requests: int
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values for an answer of the server."""
        return asdict(self)


def load_statistics() -> None:
    """Import the libraries of `judge`. This takes a second of CPU time, in which a server's other
    threads stop for tenths of a second, so it is not done in the middle of a trial."""
    import scipy.stats  # noqa: F401


def judge(
    data: TrialData,
    rules: CanaryRules,
    *,
    alpha: float | None = None,
    alpha_no_worse: float | None = None,
) -> CanaryVerdict:
    """Judge the counts so far.

    Args:
        alpha: what this look may spend on finding it worse, in place of `rules.alpha`.
        alpha_no_worse: what it may spend on finding it no worse, for each measure.
    """
    alpha = rules.alpha if alpha is None else alpha
    alpha_no_worse = rules.alpha if alpha_no_worse is None else alpha_no_worse
    drafts = [*_rates(data, rules, alpha_no_worse), _speed(data, rules, alpha_no_worse)]
    worse = holm([draft.p_worse for draft in drafts])
    better = holm([draft.p_better for draft in drafts])
    findings = tuple(
        draft.decide(alpha, alpha_no_worse, float(up), float(down))
        for draft, up, down in zip(drafts, worse, better, strict=True)
    )
    answer, sentence = _together(findings, data, rules)
    return CanaryVerdict(
        answer=answer, sentence=sentence, alpha=alpha, seconds=round(data.seconds, 1),
        requests=data.requests, findings=findings,
    )  # fmt: skip


def not_yet(rules: CanaryRules, requests: int, seconds: float) -> str:
    """Return the reason why a canary cannot be found no worse yet; "" if it can."""
    if rules.sticky == "key":
        return (
            "undecided: the share is dealt out by key, and requests of one key are no independent "
            "measurements; decide by what you see, or deal out by request"
        )
    early = []
    if requests < rules.requests:
        early.append(f"{requests} of {rules.requests} requests")
    if seconds < rules.seconds:
        early.append(f"{seconds:.0f} of {rules.seconds:g} s")
    return f"undecided: {', '.join(early)} so far" if early else ""


@dataclass(slots=True, kw_only=True)
class _Draft:
    """Finding before the correction."""

    p_worse: float
    p_better: float
    no_worse: bool
    make: Callable[..., Finding]

    def decide(
        self, alpha: float, alpha_no_worse: float, p_worse: float, p_better: float
    ) -> Finding:
        answer: Answer = "undecided"
        if self.no_worse:
            answer = "better" if p_better <= alpha_no_worse else "within noise"
        elif p_worse <= alpha:
            answer = "worse"
        return self.make(answer=answer, p_worse=p_worse, p_better=p_better)


def _rates(data: TrialData, rules: CanaryRules, alpha: float) -> list[_Draft]:
    return [
        _rate("errors", "failed", MEASURED, rules.error_margin, data, alpha),
        _rate("prompt_filter", "prompt_blocked", MEASURED, rules.filter_margin, data, alpha),
        _rate("image_filter", "image_blocked", ("ok", "image_blocked"), rules.filter_margin, data,
              alpha),
    ]  # fmt: skip


def _rate(
    measure: str, hit: str, among: tuple[str, ...], margin: float, data: TrialData, alpha: float
) -> _Draft:
    new, n_new = data.canary[hit], sum(data.canary[name] for name in among)
    old, n_old = data.stable[hit], sum(data.stable[name] for name in among)

    def make(**decided: Any) -> Finding:
        return Finding(
            measure=measure, canary=(new, n_new), stable=(old, n_old), margin=margin, n=n_new,
            method="Fisher's exact test; Newcombe's method 10 with Clopper-Pearson limits",
            **interval, **decided,
        )  # fmt: skip

    interval: dict[str, Any] = {}
    if not (n_new and n_old):
        return _Draft(p_worse=1.0, p_better=1.0, no_worse=False, make=make)
    found = rate_difference(new, n_new, old, n_old, confidence=1 - 2 * alpha)
    interval = {"value": found.value, "low": found.low, "high": found.high}
    return _Draft(
        p_worse=higher_rate_p(new, n_new, old, n_old),
        p_better=higher_rate_p(old, n_old, new, n_new),
        no_worse=found.high < margin,
        make=make,
    )


def _speed(data: TrialData, rules: CanaryRules, alpha: float) -> _Draft:
    least, most = np.asarray(data.log_at_least), np.asarray(data.log_at_most)
    margin, confidence = rules.latency_margin, 1 - 2 * alpha
    below, above = (median_by_signs(logs, confidence=confidence) for logs in (least, most))
    medians = [float(np.median(logs)) for logs in (least, most) if len(logs)]
    interval: dict[str, Any] = {
        "value": math.exp(sum(medians) / len(medians)) if medians else None,
        "low": math.exp(below.low) if below else None,
        "high": math.exp(above.high) if above else None,
    }

    def make(**decided: Any) -> Finding:
        return Finding(
            measure="latency", margin=margin, n=len(most), **interval, **decided,
            method=f"sign test on bounds of the ratio in blocks of {rules.block_s:g} s",
        )  # fmt: skip

    return _Draft(
        p_worse=median_above_p(least, math.log(margin)),
        p_better=median_above_p(-most, 0.0),
        no_worse=above is not None and math.exp(above.high) < margin,
        make=make,
    )


def _together(
    findings: tuple[Finding, ...], data: TrialData, rules: CanaryRules
) -> tuple[Answer, str]:
    worse = [finding for finding in findings if finding.answer == "worse"]
    if worse:
        return "worse", "worse: " + "; ".join(map(describe, worse))
    if early := not_yet(rules, data.requests, data.seconds):
        return "undecided", early
    missing = [finding for finding in findings if finding.answer == "undecided"]
    if missing:
        return "undecided", "undecided: " + "; ".join(map(describe, missing))
    better = [finding for finding in findings if finding.answer == "better"]
    if better:
        return "better", "better: " + "; ".join(map(describe, better))
    return "within noise", (
        f"within noise: no worse than by the margins, after {data.requests} requests and "
        f"{data.seconds:.0f} s"
    )


def describe(finding: Finding) -> str:
    """Describe one measure for a person."""
    name = finding.measure.replace("_", " ")
    if finding.canary and finding.stable:
        (new, n_new), (old, n_old) = finding.canary, finding.stable
        text = f"{name} {new} of {n_new} against {old} of {n_old}"
        if finding.high is None:
            return text
        return f"{text} (at most {finding.high:+.2%}, margin {finding.margin:+.2%})"
    if finding.value is None:
        return f"{name}: no evaluations yet that compare"
    low = "?" if finding.low is None else f"{finding.low:.2f}"
    high = "?" if finding.high is None else f"{finding.high:.2f}"
    return f"{name} x {finding.value:.2f} [{low}, {high}], margin x {finding.margin:g}"
