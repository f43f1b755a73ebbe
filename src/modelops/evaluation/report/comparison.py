"""The part of the report that sets a record against an earlier one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from modelops.base.errors import ModelopsError
from modelops.evaluation.report.drawings import draw_interval, finite, shared_axis
from modelops.evaluation.report.images import KNOWN, Tile, score_keys, tile
from modelops.evaluation.report.samples import Pictures
from modelops.evaluation.report.tables import GenericTable, generic_tables
from modelops.evaluation.report.text import number
from modelops.evaluation.report.words import words_of
from modelops.records.comparison import ComparedMetric
from modelops.records.evaluation import EvaluationRecord

PAIRS = 8  # of each kind
_NAMES = {"detectable": "smallest difference seen with 80 % power",
          "prompts_needed": "prompts needed to show equality within the margin",
          "margin": "accepted loss"}  # fmt: skip
_ORDER = ("worse", "better", "within noise", "not comparable")
_SHOWN = ("metric", "verdict", "reason", "first", "second", "difference", "low", "high", "method",
          "margin_source", "p", "p_adjusted")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One metric; `difference` is this record minus the earlier one."""

    metric: str
    title: str
    verdict: str
    first: str
    second: str
    difference: str
    drawing: Markup
    reason: str
    method: str
    more: list[tuple[str, str]]

    @property
    def tone(self) -> str:
        return {"better": "good", "worse": "bad", "inferior": "bad"}.get(self.verdict, "")


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt and seed in both records, and the change of one value."""

    first: Tile
    second: Tile
    change: str


@dataclass(slots=True)
class ComparisonPart:
    other: EvaluationRecord
    rows: list[ComparisonRow] = field(default_factory=list)
    neither: list[str] = field(default_factory=list)  # metrics that neither record measured
    summary: str = ""
    problem: str = ""
    pairs: list[tuple[str, list[Pair]]] = field(default_factory=list)
    no_pairs: str = ""
    warnings: list[str] = field(default_factory=list)
    tables: list[GenericTable] = field(default_factory=list)


def compare_part(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    pictures: Pictures,
    against: Path,
    other: EvaluationRecord,
) -> ComparisonPart:
    """Compare with `against`: what is better or worse, in numbers and side by side."""
    from modelops.evaluation.compare.compare import compare_records
    from modelops.evaluation.report.samples import read_rows

    part = ComparisonPart(other)
    try:
        result = compare_records(against, path)
    except ModelopsError as error:
        part.problem = error.message
        part.summary = f"It could not be compared with {against.name}."
        return part
    unknown = [item for item in result.comparisons if item.first is None and item.second is None]
    part.neither = [words_of(item.metric).title for item in unknown]
    found = [_row(item) for item in result.comparisons if item not in unknown]
    part.warnings = list(result.warnings)
    if result.images:
        images = {name: m.model_dump(mode="json") for name, m in result.images.items()}
        part.tables = generic_tables(images, "Image by image, between the two")
    counts = Counter(row.verdict for row in found)
    order = [v for v in _ORDER if v in counts] + sorted(set(counts) - set(_ORDER))
    part.rows = sorted(found, key=lambda row: order.index(row.verdict))
    told = ", ".join(f"{counts[v]} {v}" for v in order if counts[v])
    if part.neither:
        told += f"{', ' if told else ''}{len(part.neither)} measured in neither"
    part.summary = f"Against {against.name}: {told or 'no metric in common'}."
    theirs, problem = read_rows(against, other)
    if not rows or not theirs:
        part.no_pairs = problem or "There are no per-image values to set side by side."
        return part
    part.pairs = _pairs(rows, pictures, theirs, Pictures(against.with_suffix("")))
    if not part.pairs:
        part.no_pairs = "The two records have no prompt and seed in common."
    return part


def _row(item: ComparedMetric) -> ComparisonRow:
    found: dict[str, Any] = item.model_dump()
    low, difference, high = (found.get(k) for k in ("low", "difference", "high"))
    text, drawing = "", Markup("")
    if difference is not None:
        text = number(difference)
        if low is not None and high is not None:
            text += f" [{number(low)}, {number(high)}]"
            drawing = draw_interval(low, difference, high, shared_axis([low, difference, high]))
    more = [
        (_NAMES.get(name, name.replace("_", " ")), _plain(value))
        for name, value in found.items()
        if name not in _SHOWN and value not in (None, "", [], {}, ())
    ]
    return ComparisonRow(
        item.metric, words_of(item.metric).title, str(found.get("verdict", "")),
        number(found.get("first")), number(found.get("second")), text, drawing,
        str(found.get("reason") or ""), str(found.get("method") or ""), more,
    )  # fmt: skip


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def _pairs(
    rows: Sequence[Mapping[str, Any]],
    pictures: Pictures,
    theirs: Sequence[Mapping[str, Any]],
    their_pictures: Pictures,
) -> list[tuple[str, list[Pair]]]:
    places = {_identity(row): place for place, row in enumerate(theirs)}
    shared = [(p, places[_identity(row)]) for p, row in enumerate(rows) if _identity(row) in places]
    keys = [k for k in score_keys(rows) if k in KNOWN and k in score_keys(theirs)]
    key = keys[0] if keys else None

    def pair(ours: int, other: int) -> Pair:
        both = len(finite([rows[ours].get(key or ""), theirs[other].get(key or "")])) == 2
        use = key if key and both else None
        change = ""
        if use is not None:
            change = number(float(rows[ours][use]) - float(theirs[other][use]))
            change = change if change.startswith("−") else f"+{change}"
        first = tile(other, theirs[other], their_pictures, use)
        return Pair(first, tile(ours, rows[ours], pictures, use), change)

    parts = [("The first of the plan, not chosen", [pair(*both) for both in shared[:PAIRS]])]
    if key is not None:
        changes = {
            both: float(rows[both[0]][key]) - float(theirs[both[1]][key])
            for both in shared
            if len(finite([rows[both[0]].get(key), theirs[both[1]].get(key)])) == 2
        }
        rising = sorted(changes, key=lambda both: (changes[both], both))
        few = min(PAIRS, len(rising) // 2)
        title, worse = KNOWN[key][:2]
        ends = [("falls most", rising[:few]), ("rises most", rising[::-1][:few])]
        if worse == "high":
            ends.reverse()
        parts += [
            (f"Where the {title[:1].lower()}{title[1:]} {name}", [pair(*b) for b in chosen])
            for name, chosen in ends
        ]
    return [(name, made) for name, made in parts if made]


def _identity(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row.get("prompt")), str(row.get("replicate")), str(row.get("seed"))
