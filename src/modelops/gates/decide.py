"""Decision of a policy over records, as a verdict. What was not measured never passes."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from modelops.base.environment import current_environment
from modelops.base.files import sha256_file
from modelops.gates.chain import (
    Evidence,
    Subject,
    find_subject,
    misfit,
    read_evidence,
    unlike,
)
from modelops.gates.policy import Policy, PolicyCriterion, RelativeBound, load_policy
from modelops.records.base import Answer, InputRef, Measurement, Record
from modelops.records.bounds import bound_text
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.measurements import measurement_of
from modelops.records.release import Criterion, Verdict, overall

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "at_most": operator.le, "at_least": operator.ge, "below": operator.lt, "above": operator.gt,
}  # fmt: skip
_HARDER_END = {"at_most": "high", "below": "high", "at_least": "low", "above": "low"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """Result of a criterion, before it is written down."""

    answer: Answer
    reason: str
    bound: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None


def decide(policy_path: str | Path, *, root: str | Path, out_path: str | Path) -> Verdict:
    """Decide a policy over the records below `root` and write the verdict, whatever it says.

    A criterion passes or fails only on a number that was measured, by a record that ended well and
    belongs to the subject, against a baseline measured in the same way; otherwise it is undecided.
    Overall: `fail` if any criterion fails, else `undecided` if any is, else `pass`.

    Args:
        policy_path: policy.yaml.
        root: folder that the policy's paths are relative to.
        out_path: where verdict.json goes.

    Raises:
        UsageError: the policy cannot be read.
        ConfigError: the policy is not valid.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    policy = load_policy(policy_path)
    policy_sha256 = sha256_file(policy_path)
    top = Path(root)
    evidence = read_evidence(policy, top)
    subject = find_subject(policy, evidence, top)
    criteria = [_criterion(criterion, policy, evidence, subject) for criterion in policy.criteria]
    verdict = Verdict(
        answer=overall(criterion.answer for criterion in criteria),
        policy_sha256=policy_sha256,
        subject_sha256=subject.sha256,
        criteria=criteria,
        inputs={
            "policy": InputRef(path=Path(policy_path).name, sha256=policy_sha256),
            **{
                name: InputRef(path=item.path, sha256=item.sha256)
                for name, item in evidence.items()
                if item.sha256 is not None
            },
        },
        environment=current_environment(),
        started_at=started,
        duration_s=time.monotonic() - clock,
    )
    verdict.write(out_path)
    return verdict


def _criterion(
    criterion: PolicyCriterion, policy: Policy, evidence: dict[str, Evidence], subject: Subject
) -> Criterion:
    found = _find(criterion, policy, evidence, subject)
    asked = criterion.metric or criterion.field or "parity"
    return Criterion(
        name=criterion.name,
        evidence=evidence[criterion.evidence].path,
        metric=asked,
        bound=found.bound,
        value=found.value,
        low=found.low,
        high=found.high,
        answer=found.answer,
        reason=found.reason,
    )


def _find(
    criterion: PolicyCriterion, policy: Policy, evidence: dict[str, Evidence], subject: Subject
) -> _Finding:
    shown = describe_bound(criterion)
    used = [criterion.evidence]
    if isinstance(criterion.bound, RelativeBound):
        used.append(criterion.bound.of)
    for name in used:
        problem = evidence[name].problem or misfit(name, policy, evidence, subject)
        if problem:
            return _Finding(answer="undecided", reason=problem, bound=shown)
    if subject.problem:
        return _Finding(answer="undecided", reason=subject.problem, bound=shown)
    record = evidence[criterion.evidence].record
    assert record is not None  # its problem would have been found above
    if criterion.parity is not None:
        return _parity(criterion.parity, record, shown)
    if criterion.field is not None:
        return _field(criterion, criterion.field, record, shown)
    return _metric(criterion, record, evidence, shown)


def describe_bound(criterion: PolicyCriterion) -> str:
    """Format the bound in a few characters, such as `≤ 0.5 × early` or `> 0 (low end)`."""
    return bound_text(criterion.model_dump(exclude_none=True))


def _parity(wanted: str | list[str], record: Record, shown: str) -> _Finding:
    if not isinstance(record, ArtifactRecord):
        return _undecided(f"a {record.kind} record has no parity checks", shown)
    known = {check.name for check in record.parity}
    missing = [] if wanted == "all" else [name for name in wanted if name not in known]
    checks = [check for check in record.parity if wanted == "all" or check.name in wanted]
    if missing or not checks:
        return _undecided(f"not checked: {', '.join(missing) or 'no parity check at all'}", shown)
    failed = [check for check in checks if not check.holds]
    worst = ", ".join(f"{check.name} {check.distance}" for check in failed or checks)
    answer: Answer = "fail" if failed else "pass"
    value = f"{len(checks) - len(failed)} of {len(checks)}"
    return _Finding(answer=answer, reason=worst, bound=shown, value=value)


def _field(criterion: PolicyCriterion, name: str, record: Record, shown: str) -> _Finding:
    if name not in type(record).model_fields:
        return _undecided(f"a {record.kind} record has no field {name!r}", shown)
    if name not in record.model_fields_set:
        return _undecided(f"{name} is not in the record", shown)
    value = getattr(record, name)
    if value is None or value == "unknown":
        return _undecided(f"{name} is not known", shown)
    if criterion.comparison is None:
        if not isinstance(value, str | int | float | bool):
            return _undecided(f"{name} is not a plain value", shown)
        same = isinstance(value, bool) is isinstance(criterion.equals, bool)  # True is not 1
        met = same and value == criterion.equals
        reasons = getattr(record, "reasons", [])
        reason = "as asked" if met else "; ".join([f"{name} is {value}", *reasons])
        shown_value = value if isinstance(value, str | float) else str(value)
        return _Finding(
            answer="pass" if met else "fail", reason=reason, bound=shown, value=shown_value
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _undecided(f"{name} is not a number", shown)
    bound = criterion.bound
    assert isinstance(bound, int | float)
    met = _HOLDS[criterion.comparison](value, bound)
    reason = "the bound holds" if met else "the bound does not hold"
    return _Finding(
        answer="pass" if met else "fail", reason=reason, bound=shown, value=float(value)
    )


def _metric(
    criterion: PolicyCriterion, record: Record, evidence: dict[str, Evidence], shown: str
) -> _Finding:
    assert criterion.metric is not None and criterion.comparison is not None
    measured = measurement_of(record, criterion.metric)
    problem = _unusable(measured, criterion.metric, criterion.min_n)
    if problem or measured is None or measured.value is None:
        return _undecided(problem or "not measured", shown)
    bound = criterion.bound
    if isinstance(bound, RelativeBound):
        limit, problem = _relative_limit(bound, criterion.metric, record, evidence)
        if problem or limit is None:
            return _measured(measured, "undecided", problem or "no baseline", shown)
        shown = f"{shown} = {limit:.4g}"
    else:
        assert bound is not None
        limit = float(bound)
    end = _HARDER_END[criterion.comparison] if criterion.use == "worst" else criterion.use
    deciding = getattr(measured, end)
    if deciding is None:
        return _measured(measured, "undecided", f"the interval has no {end} end", shown)
    met = _HOLDS[criterion.comparison](deciding, limit)
    which = "the value" if end == "value" else f"the interval's {end} end"
    reason = f"{which} {deciding:.4g} is{'' if met else ' not'} {shown.split(' (')[0]}"
    if measured.warnings:
        reason += f"; {'; '.join(measured.warnings)}"
    return _measured(measured, "pass" if met else "fail", reason, shown)


def _relative_limit(
    bound: RelativeBound, metric: str, record: Record, evidence: dict[str, Evidence]
) -> tuple[float | None, str | None]:
    """Return the bound as a number, or the reason why there is none."""
    other = evidence[bound.of].record
    assert other is not None
    base = measurement_of(other, metric)
    problem = _unusable(base, metric, 0)
    if problem or base is None or base.value is None:
        return None, f"{bound.of}: {problem or 'not measured'}"
    if isinstance(record, EvaluationRecord) and isinstance(other, EvaluationRecord):
        differences = unlike(record, other, metric)
        if differences:
            return None, f"measured differently from {bound.of}: {'; '.join(differences)}"
    elif type(record) is not type(other):
        return None, f"{bound.of} is a {other.kind} record, not a {record.kind} record"
    if bound.ratio is not None:
        if base.value <= 0:
            return None, f"a ratio to {bound.of}'s {base.value:.4g} means nothing"
        return bound.ratio * base.value, None
    assert bound.plus is not None
    return base.value + bound.plus, None


def _unusable(measured: Measurement | None, metric: str, min_n: int) -> str | None:
    if measured is None:
        return f"{metric} is not in the record"
    if measured.not_measured is not None:
        return f"not measured: {measured.not_measured}"
    if measured.n < min_n:
        return f"n = {measured.n}, fewer than the {min_n} asked for"
    return None


def _undecided(reason: str, bound: str) -> _Finding:
    return _Finding(answer="undecided", reason=reason, bound=bound)


def _measured(measured: Measurement, answer: Answer, reason: str, bound: str) -> _Finding:
    return _Finding(
        answer=answer, reason=reason, bound=bound,
        value=measured.value, low=measured.low, high=measured.high,
    )  # fmt: skip
