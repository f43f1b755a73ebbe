"""Fields of records that a card does not print: its table of records names those that hold some.

A test changes every field of every record and fails if neither the card's text follows nor the
field stands here.
"""

from __future__ import annotations

from typing import Any, Literal

from modelops.records.base import Record

Card = Literal["model", "dataset"]
Unprinted = dict[str, tuple[str, ...]]  # words: fields, by their path without numbers of list items

# Of every record; they do not say what was measured.
STRUCTURE = ("kind", "schema_version")
_COMMON: Unprinted = {"inputs": ("inputs",), "seeds": ("seeds",)}
_PAIR = ("confidence", "method", "unit", "higher_is_better", "protocol", "details")

UNPRINTED: dict[tuple[Card, str], Unprinted] = {
    ("model", "train"): {
        "places of its inputs": ("inputs",),
        "all checkpoints": ("checkpoints",),
        "reasons for what was left out": ("quarantined",),
        "lengths of captions": ("captions",),
    },
    ("model", "evaluation"): {
        **_COMMON,
        "place and details of the source": ("source.uri", "source.details"),
        "place of the reference": ("reference.path",),
        "protocols in full": ("protocols",),
        "files beside it": ("files",),
        "rule of the copying verdict": ("memorization.rule", "memorization.alpha"),
        "protocol of the thresholds": ("safety_sweep.protocol",),
        "tests of each group in full": (
            "slices.p_value", "slices.n_comparisons",
            *(f"slices.{part}.{name}" for part in ("inside", "rest", "difference")
              for name in _PAIR),
            "slices.difference.n", "slices.difference.warnings",
        ),
    },
    ("model", "artifact"): {
        "places of its inputs": ("inputs",),
        "seeds": ("seeds",),
        "graphs in full": ("components",),
        "calibration": ("calibration",),
        "what stays in another precision": ("conversion",),
        "precision that each runtime ran in": ("execution",),
        "other files": ("files",),
    },
    ("model", "split"): {
        **_COMMON,
        "leakage": ("leakage",),
        "shares": ("fractions",),
        "groups by split": ("group_counts",),
        "files": ("files",),
    },
    ("model", "dedup"): {
        **_COMMON,
        "weights": ("weights_sha256",),
        "neighbours": ("neighbours",),
        "candidate pairs": ("n_candidate_pairs",),
        "exact duplicates": ("n_exact_duplicates",),
        "members of the clusters": ("clusters", "components"),
        "unreadable images": ("quarantined",),
        "removable images": ("removable",),
        "chaining": ("chaining",),
        "calibration": ("calibration",),
        "files": ("files",),
    },
    ("model", "verdict"): {**_COMMON},
    ("dataset", "dedup"): {
        **_COMMON,
        "members of the clusters": ("clusters", "components"),
        "names of unreadable images": ("quarantined",),
        "names of removable images": ("removable",),
        "files": ("files",),
    },
    ("dataset", "split"): {**_COMMON, "files": ("files",)},
    ("dataset", "smoke"): {**_COMMON},
}  # fmt: skip


def left_out(card: Card, record: Record) -> list[str]:
    """Return the words for what a record holds and the card does not print."""
    known = UNPRINTED.get((card, record.kind), {})
    return [
        words for words, fields in known.items() if any(_holds(record, field) for field in fields)
    ]


def _holds(value: Any, field: str) -> bool:
    """Return whether the field, or one of any item of a list on the way, holds anything."""
    name, _, rest = field.partition(".")
    if value is None:
        return False
    if isinstance(value, list):
        return any(_holds(item, field) for item in value)
    inner = getattr(value, name)
    return _holds(inner, rest) if rest else inner not in (None, "", [], {}, 0)
