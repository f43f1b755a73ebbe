"""Any part of a record, as tables: for parts whose shape the page does not know by heart."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from markupsafe import Markup

from modelops.evaluation.report.drawings import draw_interval, shared_axis
from modelops.evaluation.report.text import number

MAX_ROWS = 400


@dataclass(frozen=True, slots=True)
class Cell:
    """Text, with a drawing when it is a value with an interval."""

    text: str
    drawing: Markup | str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class GenericTable:
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    left_out: int = 0


def generic_tables(value: Any, caption: str = "") -> list[GenericTable]:
    """JSON as tables: a list of objects is one, an object of objects is one with a first column of
    names, and what else an object holds is a table of two columns."""
    if isinstance(value, Mapping):
        return _of_mapping(value, caption)
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [item if isinstance(item, Mapping) else {"value": item} for item in value]
        return [_of_items(items, caption)] if items else []
    return [GenericTable(caption, ["value"], [[_cell(value, [])]])]


def _of_mapping(value: Mapping[str, Any], caption: str) -> list[GenericTable]:
    if is_measured(value):
        return [_of_items([value], caption)]
    nested = {k: v for k, v in value.items() if isinstance(v, Mapping) and v}
    if nested and len(nested) == len(value) and not any(map(_is_nest, nested.values())):
        named = [{"name": name, **_unfold(item)} for name, item in nested.items()]
        return [_of_items(named, caption)]
    plain = {k: v for k, v in value.items() if not isinstance(v, Mapping) and not _is_table(v)}
    measured = {k: v for k, v in nested.items() if is_measured(v)}
    tables = []
    facts = [
        {"what": _words(k), "value": v} for k, v in {**plain, **measured}.items() if v is not None
    ]
    if facts:
        tables.append(_of_items(facts, caption))
    for name, item in value.items():
        if name not in plain and name not in measured and item:
            inner = f"{caption} › {_words(name)}" if caption else _words(name)
            tables += generic_tables(item, inner)
    return tables


def _unfold(item: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"value": item} if is_measured(item) else item


def _is_nest(item: Any) -> bool:
    """Return whether an object holds tables, or objects that are no measurements."""
    if not isinstance(item, Mapping) or is_measured(item):
        return False
    return any(
        (isinstance(v, Mapping) and v and not is_measured(v) and k != "details") or _is_table(v)
        for k, v in item.items()
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def is_measured(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether this is a Measurement or has the shape of one."""
    return isinstance(value, Mapping) and {"value", "low", "high"} <= set(value)


def _of_items(items: Sequence[Mapping[str, Any]], caption: str) -> GenericTable:
    rows: list[Mapping[str, Any]] = []
    for item in items[:MAX_ROWS]:
        row: dict[str, Any] = {}
        if is_measured(item):  # the item is a measurement with a name or more beside it
            row |= {k: v for k, v in item.items() if k not in _MEASURED and v not in (None, "")}
            row["value"] = {k: item[k] for k in _MEASURED if k in item}
        else:
            row |= item
        rows.append(row)
    columns = [c for c in dict.fromkeys(k for row in rows for k in row)
               if any(row.get(c) not in (None, "", [], {}) for row in rows)]  # fmt: skip
    ends: dict[tuple[str, str], list[float]] = defaultdict(list)  # what has one unit has one axis
    for shown in rows:
        for c in columns:
            if is_measured(v := shown.get(c)):
                ends[c, _unit(v)] += [v[e] for e in ("low", "value", "high") if v[e] is not None]
    cells = [[_cell(row.get(c), ends[c, _unit(row.get(c))]) for c in columns] for row in rows]
    return GenericTable(caption, [_words(c) for c in columns], cells, len(items) - len(rows))


_MEASURED = ("value", "low", "high", "n", "method", "confidence", "not_measured", "protocol",
             "warnings", "unit", "higher_is_better", "details")  # fmt: skip
_TONES = {"worse": "bad", "better": "good", "fail": "bad", "failed": "bad", "pass": "good",
          "copies": "bad", "memorized": "bad"}  # fmt: skip


def _unit(value: Any) -> str:
    return str(value.get("unit") or "") if is_measured(value) else ""


def _cell(value: Any, ends: Sequence[float]) -> Cell:
    if is_measured(value):
        if value["value"] is None:
            return Cell(f"not measured: {value.get('not_measured') or 'no reason recorded'}")
        text = f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]"
        if unit := _unit(value):
            text += f" {unit}"
        if value.get("n"):
            text += f", n {value['n']:,}"
        if None in (value["low"], value["high"]):
            return Cell(text)
        drawn = draw_interval(value["low"], value["value"], value["high"], shared_axis(ends))
        return Cell(text, drawn)
    if value is None or value == "":
        return Cell("–")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        return Cell(number(value))
    if isinstance(value, str):
        return Cell(value, tone=_TONES.get(value.lower(), ""))
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return Cell(", ".join(i if isinstance(i, str) else number(i) for i in value))
    return Cell(json.dumps(value, ensure_ascii=False))


def _words(key: str) -> str:
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]
