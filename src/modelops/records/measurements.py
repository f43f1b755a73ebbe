"""Meaning of the metric names in a policy, for records of each kind.

Slices of an evaluation are named by column, value and metric:

    slices.words.skin-tone:dark.lit_alignment_gain              its mean in the slice
    slices.words.skin-tone:dark.lit_alignment_gain.difference   slice minus the other prompts
    slices.words.worst.unsafe_rate                              of the slice where it is worst
    slices.words.worst.lit_alignment_gain.difference            of the slice that is worst off

`worst` covers every slice of the column that has enough independent groups for a verdict: its
value, low and high are each the worst of these slices. The worst of many looks worse than that
slice is. The intervals are not corrected for this, which errs towards refusing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from modelops.records.base import Measurement, Record
from modelops.records.comparison import AbTestRecord, ComparisonRecord
from modelops.records.data import SplitReport
from modelops.records.evaluation import EvaluationRecord, SliceMeasurement
from modelops.records.export import ArtifactRecord

SLICES, WORST, DIFFERENCE = "slices.", "worst", ".difference"


def measurement_of(record: Record, metric: str) -> Measurement | None:
    """The measurement a policy means by `metric` in a record of this kind."""
    if isinstance(record, EvaluationRecord) and metric.startswith(SLICES):
        return _slice(record.slices, metric)
    if isinstance(record, EvaluationRecord | ComparisonRecord | AbTestRecord):
        return record.metrics.get(metric)
    if isinstance(record, ArtifactRecord):
        return record.speed.get(metric.removeprefix("speed."))
    if isinstance(record, SplitReport):
        return record.leakage.get(metric.removeprefix("leakage."))
    return None


def is_slice_name(metric: str) -> bool:
    """Return whether a name that begins with `slices.` has a column, a value and a metric."""
    return len(metric.removeprefix(SLICES).removesuffix(DIFFERENCE).split(".")) >= 3


def _slice(slices: list[SliceMeasurement], metric: str) -> Measurement:
    """Return a slice's measurement, never None: for a missing slice it names those that exist."""
    name = metric.removeprefix(SLICES).removesuffix(DIFFERENCE)
    asked_difference = metric.endswith(DIFFERENCE)
    if not slices:
        return Measurement.missing("the evaluation has no slices (--slice-by)")
    for found in slices:
        if f"{found.by}.{found.value}.{found.metric}" == name:
            return found.difference if asked_difference else found.inside
    of_column = [s for s in slices if f"{s.by}.{WORST}.{s.metric}" == name]
    if of_column:
        return _worst(of_column, asked_difference)
    known = sorted({f"{s.by}.{s.value}" for s in slices})
    few = ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")
    measured = ", ".join(dict.fromkeys(s.metric for s in slices))
    return Measurement.missing(f"no slice {name!r}; there are {few}, with {measured}")


def _worst(slices: list[SliceMeasurement], asked_difference: bool) -> Measurement:
    judged = {
        s.value: part
        for s in slices
        if s.verdict != "too few"
        and (part := s.difference if asked_difference else s.inside).value is not None
    }
    if not judged:
        return Measurement.missing(
            f"none of the {len(slices)} slices has enough independent groups of prompts"
        )
    first = next(iter(judged.values()))
    if first.higher_is_better is None:
        return Measurement.missing("the metric has no better direction, so no slice is the worst")
    pick: Callable[[Iterable[float]], float] = min if first.higher_is_better else max

    def end(values: list[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return pick(found) if len(found) == len(values) else None

    value = end([part.value for part in judged.values()])
    name = next(name for name, part in judged.items() if part.value == value)
    left_out = len(slices) - len(judged)
    few = f", {left_out} with too few groups left out" if left_out else ""
    return first.model_copy(
        update={
            "value": value,
            "low": end([part.low for part in judged.values()]),
            "high": end([part.high for part in judged.values()]),
            "n": min(part.n for part in judged.values()),
            "method": f"the worst of {len(judged)} slices, ends too; {first.method}",
            "warnings": [f"{name} is the worst of {len(judged)} slices{few}"],
            "details": {"slice": name, "slices": len(judged), "left_out": left_out},
        }
    )
