"""Bounds of a verdict's criteria as text: `≤ 0.5`, `> 0 (low end)`, `≤ 0.5 × early = 154.1`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIGNS = {"at_most": "≤", "at_least": "≥", "below": "<", "above": ">"}
_BOUND = re.compile(r"([≤≥<>]) (.+?)(?: \((low|high|worst) end\))?(?: = (\S+))?", re.DOTALL)
_RELATION = re.compile(r"(\S+) × (.+)|(.+) ([+-]\S+)", re.DOTALL)
_COUNT = re.compile(r"(\d+) of (\d+)")


def bound_text(asked: Mapping[str, Any]) -> str:
    """Format the bound of a policy's criterion, given as policy.yaml has it.

    Raises:
        KeyError, TypeError, ValueError: it has no bound, or one that is not a number.
    """
    parity = asked.get("parity")
    if parity is not None:
        return f"{'all checks' if parity == 'all' else ', '.join(parity)} passed"
    comparison = next((key for key in SIGNS if asked.get(key) is not None), None)
    if comparison is None:
        return f"= {asked['equals']}"
    text, bound = SIGNS[comparison], asked[comparison]
    if not isinstance(bound, Mapping):
        text += f" {float(bound):g}"
    elif bound.get("ratio") is not None:
        text += f" {float(bound['ratio']):g} × {bound['of']}"
    else:
        text += f" {bound['of']} {float(bound['plus']):+g}"
    end = asked.get("use", "value")
    return text if end == "value" else f"{text} ({end} end)"


@dataclass(frozen=True, slots=True)
class Relation:
    """Relative bound: `ratio` times, or `plus` above, the value of the evidence `of`."""

    of: str
    ratio: float
    plus: float
    limit: float

    def gives(self, base: float) -> bool:
        """Return whether the number that was printed follows from the evidence's value."""
        made = self.ratio * base + self.plus
        return abs(made - self.limit) <= 1e-3 * max(abs(made), abs(self.limit))


def relation_in(bound: str) -> Relation | None:
    """Read a relative bound with its number; None for another."""
    found = _BOUND.fullmatch(bound)
    parts = _RELATION.fullmatch(found[2]) if found and found[4] else None
    if found is None or parts is None:
        return None
    try:
        limit = float(found[4])
        if parts[1]:
            return Relation(parts[2], float(parts[1]), 0.0, limit)
        return Relation(parts[3], 1.0, float(parts[4]), limit)
    except ValueError:
        return None


def keeps_bound(
    bound: str, value: float | str | None, low: float | None, high: float | None
) -> bool:
    """Return whether a value that is said to pass is within its bound, as far as that is printed.

    A number has to lie in its own interval, and within its bound at the end that decides. A bound
    that is relative to other evidence is printed with four digits, another with six, and so much is
    let pass. A bound that cannot be read is kept by nothing.
    """
    if bound.startswith("= "):
        return value is not None and _same(str(value), bound[2:])
    found = _BOUND.fullmatch(bound)
    if found is None:
        counted = _COUNT.fullmatch(str(value)) if bound.endswith(" passed") else None
        return counted is not None and int(counted[1]) == int(counted[2]) > 0
    try:
        limit = float(found[4] or found[2])
    except ValueError:
        return False  # relative, and to what number is not said
    if not isinstance(value, float):
        return False
    near = 1e-9 * max(1.0, abs(value))
    if (low is not None and value < low - near) or (high is not None and value > high + near):
        return False
    upper = found[1] in "≤<"
    ends = {"low": low, "high": high, "worst": high if upper else low}
    deciding = ends[found[3]] if found[3] else value
    if deciding is None or (found[1] in "<>" and deciding == limit):
        return False
    slack = abs(limit) * (5e-4 if found[4] else 5e-6)
    return deciding <= limit + slack if upper else deciding >= limit - slack


def _same(value: str, wanted: str) -> bool:
    try:
        return value == wanted or float(value) == float(wanted)
    except ValueError:
        return False
