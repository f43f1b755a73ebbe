"""Measurements into table cells. Every number leads back to its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from markupsafe import Markup

from modelops.cards.escape import code, link, markdown, number
from modelops.evaluation.report.words import METRICS, PARTS, words_of
from modelops.records.base import InputRef, Measurement
from modelops.records.evaluation import EvaluationRecord

EXPECTED = (  # asked of every release: a card says so when one is missing
    "frechet_distance_lite0", "frechet_distance_lite0_floor", "fid", "lit_alignment_gain",
    "clipscore", "nearest_train_distance_gap", "unsafe_rate",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An evaluation with its place."""

    name: str
    record: EvaluationRecord
    file: InputRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric over all evaluations.

    Attributes:
        key: the metric's key in the records.
        title: in words.
        head: the title with its unit and an arrow for the better direction.
        says: in plain words.
        cells: one per evaluation: value [low, high] and n, or why not.
        how: methods and protocols.
        alike: whether all cells were measured under one protocol.
    """

    key: str
    title: Markup
    head: Markup
    says: Markup
    cells: list[Markup]
    how: Markup
    alike: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one part of the card, and the warnings behind its ⚠1, ⚠2…"""

    rows: list[Any] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def interval(measured: Measurement) -> Markup:
    """`21.6 [20.1, 23.0]`, or `not measured: reason`."""
    if measured.value is None or measured.low is None or measured.high is None:
        return Markup("*not measured: ") + markdown(measured.not_measured or "") + Markup("*")
    low, high = number(measured.low), number(measured.high)
    return Markup(f"**{number(measured.value)}** \\[{low}, {high}\\]")


def cell(measured: Measurement, warnings: list[str]) -> Markup:
    """An interval with its n; its warnings become numbered marks and join `warnings`."""
    text = interval(measured)
    if measured.value is not None:
        text += Markup(f" <sub>n {measured.n:,}</sub>")
    for warning in measured.warnings:
        if warning not in warnings:
            warnings.append(warning)
        text += Markup(f" ⚠{warnings.index(warning) + 1}")
    return text


def with_unit(title: Markup, measured: list[Measurement]) -> Markup:
    """A title with an arrow for the better direction and the unit, where its values share it."""
    directions = {item.higher_is_better for item in measured} - {None}
    title += "" if len(directions) != 1 else " ↑" if directions == {True} else " ↓"
    units = {item.unit for item in measured if item.unit}
    return title + Markup(" <sub>") + markdown(units.pop()) + Markup("</sub>") if units else title


def record_link(file: InputRef) -> Markup:
    """The record's name as a link, with the first digits of its digest."""
    return link(PurePosixPath(file.path).name, file.path) + Markup(" ") + code(file.sha256[:12])


def tables_by_part(evaluations: list[Measured]) -> dict[str, Table]:
    """The evaluation tables: part of the card -> rows, known metrics first."""
    keys = list(EXPECTED)
    for item in evaluations:
        keys += [key for key in item.record.metrics if key not in keys]
    parts = {part: Table() for part in PARTS}
    for key in sorted(keys, key=_place):
        table = parts[words_of(key).part]
        table.rows.append(_row(key, evaluations, table.warnings))
    return parts


def slice_table(evaluations: list[Measured]) -> Table:
    """Metrics of groups against all others, those too small to judge left out."""
    table: Table = Table()
    for item in evaluations:
        for row in item.record.slices if item.record.status == "ok" else ():
            if row.verdict == "too few":
                continue
            p = "" if row.p_corrected is None else f", p {number(row.p_corrected)}"
            shown = f"**{row.verdict}**" if row.verdict == "differs" else row.verdict
            group = f"{row.by}: {row.value} ({row.n_groups} groups, {row.n_prompts} prompts)"
            table.rows.append(
                [
                    markdown(item.name),
                    markdown(group),
                    markdown(words_of(row.metric).title),
                    cell(row.inside, table.warnings),
                    cell(row.rest, table.warnings),
                    interval(row.difference),
                    Markup(shown + p),
                ]
            )
    return table


def small_slices(evaluations: list[Measured]) -> int:
    """Count the comparisons of groups that are too small for a verdict."""
    return sum(row.verdict == "too few" for item in evaluations for row in item.record.slices)


def _place(key: str) -> tuple[int, str]:
    known = list(METRICS)
    return (known.index(key), "") if key in METRICS else (len(known), key)


def measurement_in(item: Measured, key: str) -> Measurement:
    """Return a record's measurement, or the reason why there is none."""
    if item.record.status != "ok":
        return Measurement.missing(f"the evaluation {item.record.status}: {item.record.error}")
    return item.record.metrics.get(key) or Measurement.missing("not in this record")


def _row(key: str, evaluations: list[Measured], warnings: list[str]) -> Row:
    words = words_of(key)
    found = [measurement_in(item, key) for item in evaluations]
    made = [measured for measured in found if measured.value is not None]
    title = Markup(words.title) if words.title != key else code(key)
    return Row(
        key=key,
        title=title,
        head=with_unit(title, made),
        says=Markup(words.says),
        cells=[cell(measured, warnings) for measured in found],
        how=_how(made),
        alike=len({measured.protocol for measured in made}) <= 1,
    )


def _how(made: list[Measurement]) -> Markup:
    if not made:
        return Markup("–")
    ways: dict[str, Markup] = {}
    for measured in made:
        way = markdown(measured.method or "method not recorded")
        way += Markup(f", {measured.confidence * 100:g} % interval")
        if measured.protocol:
            way += Markup(", protocol ") + code(measured.protocol[:12])
        for name, detail in measured.details.items():
            shown = number(detail) if isinstance(detail, float) else detail
            way += Markup(", ") + code(f"{name} {shown}")
        ways[str(way)] = way
    return Markup("; ").join(ways.values())


def measurements_table(measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """Speeds or leakages: rows of (name, value [low, high] with n, method), and warnings."""
    warnings: list[str] = []
    rows = [
        (
            with_unit(code(name), [measured]),
            cell(measured, warnings),
            _how([measured] if measured.value is not None else []),
        )
        for name, measured in measurements.items()
    ]
    return {"rows": rows, "warnings": warnings}
