"""Compare two evaluation records: better, worse, within noise, or not comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelops.errors import EvaluationError
from modelops.evaluation.evaluate import read_per_image
from modelops.metrics.alignment import paired_difference
from modelops.metrics.intervals import Interval
from modelops.metrics.protocol import protocol_differences
from modelops.records import EvaluationRecord, Measurement, read_record

Verdict = Literal["better", "worse", "within noise", "not comparable"]
# Metrics whose per-image values allow a paired test: key -> values of a row of per_image.json.
PAIRED = {
    "lit_alignment": ("alignment",),
    "lit_alignment_gain": ("alignment", "alignment_shuffled"),
    "clipscore": ("clipscore",),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of the second record against the first. `difference` is second minus first."""

    metric: str
    verdict: Verdict
    reason: str
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_records(
    first_path: str | Path, second_path: str | Path, *, seed: int = 0, resamples: int = 2000
) -> list[Comparison]:
    """Compare every metric that both records have and that has a better direction.

    Per-prompt metrics are compared by a paired bootstrap over prompts; the others by the difference
    of independent values, which is wider than need be where both share prompts and reference.

    Raises:
        UsageError: a file is not an evaluation record.
    """
    first = read_record(first_path, EvaluationRecord)
    second = read_record(second_path, EvaluationRecord)
    results = []
    for name in sorted(first.metrics.keys() & second.metrics.keys()):
        a, b = first.metrics[name], second.metrics[name]
        if name.startswith("lit_heldout") or name.endswith("_floor"):
            continue  # of the alignment model and the pictures, not of the source
        if (a.higher_is_better if a.value is not None else b.higher_is_better) is None:
            continue
        reasons = _incomparable(first, second, a, b)
        if reasons:
            results.append(Comparison(name, "not comparable", "; ".join(reasons), a.value, b.value))
            continue
        try:
            difference = (
                _paired(name, first_path, first, second_path, second, seed, resamples)
                if name in PAIRED
                else _independent(a, b)
            )
        except EvaluationError as error:
            results.append(Comparison(name, "not comparable", error.message, a.value, b.value))
            continue
        results.append(_decide(name, a, b, difference))
    return results


def _incomparable(
    first: EvaluationRecord, second: EvaluationRecord, a: Measurement, b: Measurement
) -> list[str]:
    missing = [m.not_measured for m in (a, b) if m.not_measured]
    if missing:
        return [f"not measured: {reason}" for reason in missing]
    known = [record.protocols.get(m.protocol or "") for record, m in ((first, a), (second, b))]
    if known[0] is None or known[1] is None:
        return ["a protocol is missing from its record"]
    return protocol_differences(known[0], known[1])


def _decide(name: str, a: Measurement, b: Measurement, difference: Interval) -> Comparison:
    sign = 1 if a.higher_is_better else -1
    if difference.low <= 0 <= difference.high:
        verdict, reason = "within noise", "the interval of the difference holds zero"
    else:
        verdict = "better" if sign * difference.value > 0 else "worse"
        reason = "the interval of the difference is clear of zero"
    return Comparison(
        name, verdict, reason, a.value, b.value,  # type: ignore[arg-type]
        difference.value, difference.low, difference.high, difference.method,
    )  # fmt: skip


def _paired(
    name: str,
    first_path: str | Path,
    first: EvaluationRecord,
    second_path: str | Path,
    second: EvaluationRecord,
    seed: int,
    resamples: int,
) -> Interval:
    ours = _by_prompt(read_per_image(first_path, first), PAIRED[name])
    theirs = _by_prompt(read_per_image(second_path, second), PAIRED[name])
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < 2:
        raise EvaluationError("fewer than two prompts in common")
    return paired_difference(
        np.array([theirs[prompt] for prompt in shared]),
        np.array([ours[prompt] for prompt in shared]),
        seed=seed, resamples=resamples, purpose=f"compare/{name}",
    )  # fmt: skip


def _by_prompt(rows: Sequence[dict[str, Any]], parts: tuple[str, ...]) -> dict[str, float]:
    """Mean over replicates of parts[0] minus the other parts, for each prompt."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if all(part in row for part in parts):
            value = row[parts[0]] - sum(row[part] for part in parts[1:])
            values.setdefault(row["prompt"], []).append(value)
    return {prompt: float(np.mean(found)) for prompt, found in values.items()}


def _independent(a: Measurement, b: Measurement) -> Interval:
    """Difference of independent values; half-widths add in squares (Newcombe's method 10)."""
    if a.value is None or b.value is None or None in (a.low, a.high, b.low, b.high):
        raise EvaluationError("a value without an interval")
    assert a.low is not None and a.high is not None and b.low is not None and b.high is not None
    value = b.value - a.value
    low = value - float(np.hypot(b.value - b.low, a.high - a.value))
    high = value + float(np.hypot(b.high - b.value, a.value - a.low))
    return Interval(value, low, high, "difference of independent values (Newcombe)")
