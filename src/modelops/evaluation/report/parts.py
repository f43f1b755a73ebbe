"""The memorization verdict, the safety sweep and the slices of a record, ready to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from modelops.evaluation.report.drawings import (
    Curve,
    Mark,
    draw_curves,
    draw_interval,
    ends_of,
    shared_axis,
)
from modelops.evaluation.report.images import in_protocol
from modelops.evaluation.report.tables import GenericTable, generic_tables
from modelops.evaluation.report.text import number, plural
from modelops.evaluation.report.words import words_of
from modelops.records.base import Measurement
from modelops.records.evaluation import EvaluationRecord, SliceMeasurement

SLICES = 80  # of one table at most
_TONES = {"copies": "bad", "no sign of copying": "good", "cannot tell": "warn"}


@dataclass(frozen=True, slots=True)
class MemorizationPart:
    """The verdict, what it rests on, and what limits it."""

    answer: str
    tone: str
    reason: str
    rule: str
    caveats: list[str]
    overfitting: str
    tables: list[GenericTable]


@dataclass(frozen=True, slots=True)
class SweepPart:
    """Shares flagged by threshold: a drawing, and the same as a table."""

    drawing: Markup
    filter: str
    protocol: str
    method: str
    numbers: str
    has_real: bool
    tables: list[GenericTable]


def memorization_part(record: EvaluationRecord) -> MemorizationPart | None:
    """The verdict of the record, if it has one."""
    found = record.memorization
    if found is None:
        return None
    data: dict[str, Any] = found.model_dump(mode="json")
    note = data.pop("overfitting") or {}
    overfitting = f"{note['answer']}: {note['reason']}" if note else ""
    shown = ("answer", "reason", "rule", "caveats")
    rest = {key: value for key, value in data.items() if key not in shown}
    if note:
        known = {k: v for k, v in note.items() if k not in ("answer", "reason") and v is not None}
        rest["overfitting"] = known
    return MemorizationPart(
        found.answer, _TONES.get(found.answer, "warn"), found.reason, found.rule,
        list(found.caveats), overfitting, generic_tables(rest),
    )  # fmt: skip


def sweep_part(record: EvaluationRecord) -> SweepPart | None:
    """The safety sweep of the record, if it has one with points."""
    found = record.safety_sweep
    if found is None or not found.generated:
        return None
    data = found.model_dump(mode="json")
    curves = [Curve(_points(data["generated"]), "own"), Curve(_points(data["real"]), "other")]
    threshold = in_protocol(record, "unsafe_rate", "filter", "threshold")
    marks = [] if threshold is None else [Mark(threshold, "threshold of unsafe_rate")]
    first, last = found.generated[0], found.generated[-1]
    numbers = (
        f"{found.n:,} images: {number(first.rate)} of them score {number(first.threshold)} or "
        f"more, {number(last.rate)} score {number(last.threshold)} or more"
    )
    real = {point["threshold"]: point for point in data["real"]}
    rows = [
        {"threshold": p["threshold"], "generated": _ends(p)}
        | ({"real images": _ends(real[p["threshold"]])} if p["threshold"] in real else {})
        for p in data["generated"]
    ]
    drawing = draw_curves(curves, f"Share flagged by threshold. {numbers}", marks=marks)
    return SweepPart(
        drawing, found.filter, found.protocol, found.method, numbers, bool(found.real),
        generic_tables(rows),
    )  # fmt: skip


def _points(points: Sequence[Mapping[str, float]]) -> list[tuple[float, float, float, float]]:
    return [(p["threshold"], p["low"], p["rate"], p["high"]) for p in points]


def _ends(point: Mapping[str, float]) -> dict[str, float]:
    return {"value": point["rate"], "low": point["low"], "high": point["high"]}


@dataclass(frozen=True, slots=True)
class SliceRow:
    name: str
    counts: str
    verdict: str
    p: str
    inside: str
    rest: str
    drawing: Markup
    difference: str
    difference_drawing: Markup
    real: str  # what the same prompts' real images get


@dataclass(frozen=True, slots=True)
class SliceTable:
    """One metric over the slices of one column."""

    metric: str
    title: str
    by: str
    rows: list[SliceRow]
    left_out: int


@dataclass(frozen=True, slots=True)
class SlicesPart:
    """`equal` tells of metrics that have one value in every slice, which need no table."""

    summary: str
    tables: list[SliceTable]
    equal: list[str]


def slices_part(record: EvaluationRecord) -> SlicesPart | None:
    """The slices of the record, those that differ first; None without slices."""
    if not record.slices:
        return None
    groups: dict[tuple[str, str], list[SliceMeasurement]] = {}
    for found in record.slices:
        groups.setdefault((found.metric, found.by), []).append(found)
    tables, equal = [], []
    for (metric, by), rows in groups.items():
        values = {m.value for row in rows for m in (row.inside, row.rest)}
        if len(values) == 1 and None not in values and all(r.verdict != "differs" for r in rows):
            value = next(iter(values))
            equal.append(f"{words_of(metric).title} by {by}: {number(value)} in every slice and in "
                         "the rest.")  # fmt: skip
            continue
        ordered = sorted(rows, key=_place)
        title = words_of(metric).title
        tables.append(
            SliceTable(metric, title if title != metric else "", by, _slice_rows(ordered[:SLICES]),
                       max(len(ordered) - SLICES, 0))
        )  # fmt: skip
    differ = sum(found.verdict == "differs" for found in record.slices)
    few = sum(found.verdict == "too few" for found in record.slices)
    tested = len(record.slices) - few
    summary = f"{differ} of {plural(tested, 'tested comparison')} with the rest differ"
    if few:
        summary += f"; {few} rest on too few prompts to be tested"
    return SlicesPart(f"{summary}.", tables, equal)


def _place(found: SliceMeasurement) -> tuple[int, float, str]:
    order = ("differs", "within noise", "too few")
    return order.index(found.verdict), found.p_corrected or 0.0, found.value


def _slice_rows(rows: Sequence[SliceMeasurement]) -> list[SliceRow]:
    def axis_of(measured: Sequence[Measurement]) -> list[float]:
        return [value for item in measured for value in ends_of(item) or ()]

    both = axis_of([m for row in rows for m in (row.inside, row.rest)])
    differences = axis_of([row.difference for row in rows])
    made = []
    for row in rows:
        inside, difference = ends_of(row.inside), ends_of(row.difference)
        drawing, difference_drawing = Markup(""), Markup("")
        if inside:
            drawing = draw_interval(*inside, shared_axis(both), other=ends_of(row.rest))
        if difference:
            difference_drawing = draw_interval(*difference, shared_axis(differences))
        made.append(
            SliceRow(
                row.value, f"{plural(row.n_prompts, 'prompt')}, {plural(row.n_groups, 'group')}",
                row.verdict,
                "" if row.p_corrected is None else f"p {number(row.p_corrected, 2)} corrected",
                _text(row.inside), _text(row.rest), drawing, _text(row.difference),
                difference_drawing, _real(row),
            )
        )  # fmt: skip
    return made


def _real(row: SliceMeasurement) -> str:
    """Format the result of the real images of the same prompts: a slice may be hard for the judge
    too.
    """
    inside, rest = (m.details.get("real_pictures") for m in (row.inside, row.rest))
    if not isinstance(inside, int | float) or not isinstance(rest, int | float):
        return ""
    return f"real images {number(inside, 3)}, of the rest {number(rest, 3)}"


def _text(measured: Measurement) -> str:
    ends = ends_of(measured)
    if ends is None:
        return f"not measured: {measured.not_measured}"
    return f"{number(ends[1], 3)} [{number(ends[0], 3)}, {number(ends[2], 3)}]"
