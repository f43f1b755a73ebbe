"""Choice of the images and distributions that the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from modelops.evaluation.report.drawings import Mark, draw_histogram, finite
from modelops.evaluation.report.samples import Picture, Pictures
from modelops.evaluation.report.text import number, shorten
from modelops.records.evaluation import EvaluationRecord

GRID = 48  # the first so many of the plan
ENDS = 8  # worst and best of each per-image value
NOT_A_SCORE = ("replicate", "seed", "owner")
NOT_OF_THE_IMAGE = ("_shuffled", "_rank", "_real", "_heldout")  # how such keys end

# key -> (title, which end is worse or None, the words for the two ends)
KNOWN: dict[str, tuple[str, str | None, str, str]] = {
    "alignment": ("Alignment with the prompt", "low", "Worst: least like their prompt",
                  "Best: most like their prompt"),
    "clipscore": ("CLIPScore", "low", "Worst: least like their prompt",
                  "Best: most like their prompt"),
    "nearest_train_distance": ("Distance to the nearest training image", "low",
                               "Worst: closest to a training image",
                               "Farthest from every training image"),
    "nsfw_score": ("Score of the image filter", "high", "Worst: highest score",
                   "Best: lowest score"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tile:
    """One image with its caption."""

    picture: Picture
    prompt: str
    short: str
    seed: str
    replicate: str
    value: str
    note: str

    @property
    def alt(self) -> str:
        """Text in place of the image."""
        value = f", {self.value}" if self.value else ""
        return f"Image for the prompt “{shorten(self.prompt, 150)}”{value}"


@dataclass(frozen=True, slots=True)
class Gallery:
    """Both ends of one per-image value."""

    key: str
    title: str
    ends: list[tuple[str, list[Tile]]]
    ties: str


@dataclass(frozen=True, slots=True)
class Distribution:
    key: str
    title: str
    drawing: Markup
    numbers: str
    marks: list[str]


def tile(
    place: int, row: Mapping[str, Any], pictures: Pictures, key: str | None = None, note: str = ""
) -> Tile:
    """The image of a row, with one of its values."""
    prompt = str(row.get("prompt", ""))
    value = f"{_label(key)} {number(row[key])}" if key else ""
    return Tile(
        pictures.of(place, row), prompt, shorten(prompt, 70), str(row.get("seed", "–")),
        str(row.get("replicate", 0)), value, note or str(row.get("nearest_train_id") or "")
        if key == "nearest_train_distance" or note else "",
    )  # fmt: skip


def galleries(
    rows: Sequence[Mapping[str, Any]], pictures: Pictures
) -> tuple[list[Tile], list[Gallery]]:
    """The first images of the plan, and both ends of each per-image value."""
    grid = [tile(place, row, pictures) for place, row in enumerate(rows[:GRID])]
    found = []
    for key in score_keys(rows):
        values = {
            place: float(row[key]) for place, row in enumerate(rows) if len(finite([row.get(key)]))
        }
        if len(set(values.values())) < 2:
            continue
        rising = sorted(values, key=lambda place: (values[place], place))
        few = max(1, min(ENDS, len(rising) // 2))
        title, worse, worst, best = KNOWN.get(key, (_words(key), None, "Lowest", "Highest"))
        ends = [(worst, rising[:few]), (best, rising[::-1][:few])]
        if worse == "high":
            ends = [(worst, rising[::-1][:few]), (best, rising[:few])]
        made = [(name, [tile(p, rows[p], pictures, key) for p in places]) for name, places in ends]
        found.append(Gallery(key, title, made, ""))
    return grid, found


def score_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per-image values that are numbers, the known ones first."""
    keys = {
        key
        for row in rows
        for key, value in row.items()
        if key not in NOT_A_SCORE and not key.endswith(NOT_OF_THE_IMAGE) and len(finite([value]))
    }
    return [k for k in KNOWN if k in keys] + sorted(keys - set(KNOWN))


def distributions(
    rows: Sequence[Mapping[str, Any]], record: EvaluationRecord
) -> list[Distribution]:
    """A histogram of each per-image value, with the thresholds and base rates of the record."""
    found = []
    for key in score_keys(rows):
        values = finite([row.get(key) for row in rows])
        if not len(values):
            continue
        behind = finite([row.get("alignment_shuffled") for row in rows])
        shuffled = behind if key == "alignment" and len(behind) else None
        marks = _marks(key, record)
        title = KNOWN[key][0] if key in KNOWN else _words(key)
        low, q5, median, q95, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
        numbers = (
            f"{len(values):,} images: lowest {number(low)}, 5 % below {number(q5)}, median "
            f"{number(median)}, 5 % above {number(q95)}, highest {number(high)}"
        )
        told = [f"{mark.label}: {number(mark.value)}" for mark in marks]
        if shuffled is not None:
            told.append("outline: the same images with other prompts")
        label = f"Histogram of {key}. {numbers}. {'; '.join(told)}"
        drawing = draw_histogram(values, label, marks=marks, behind=shuffled)
        found.append(Distribution(key, title, drawing, numbers, told))
    return found


def _marks(key: str, record: EvaluationRecord) -> list[Mark]:
    marks = []

    def from_metric(metric: str, label: str) -> None:
        measured = record.metrics.get(metric)
        if measured is not None and measured.value is not None:
            marks.append(Mark(measured.value, label))

    if key == "alignment":
        from_metric("lit_alignment", "mean")
        from_metric("lit_alignment_real", "mean of real images")
    elif key == "clipscore":
        from_metric("clipscore", "mean")
    elif key == "nearest_train_distance":
        from_metric("nearest_train_distance_heldout", "median of real held-out images")
        cosine = in_protocol(record, "near_copy_rate", "near_copy_cosine")
        if cosine is not None:
            marks.append(Mark(1 - cosine, "copies below this"))
    elif key == "nsfw_score":
        threshold = in_protocol(record, "unsafe_rate", "filter", "threshold")
        if threshold is not None:
            marks.append(Mark(threshold, "unsafe from here"))
    return marks


def in_protocol(record: EvaluationRecord, metric: str, *names: str) -> float | None:
    """A number in the protocol of a metric, by its path."""
    measured = record.metrics.get(metric)
    found: Any = record.protocols.get(measured.protocol or "") if measured else None
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else None


def _label(key: str | None) -> str:
    return {"nearest_train_distance": "distance", "nsfw_score": "score"}.get(
        key or "", (key or "").replace("_", " ")
    )


def _words(key: str) -> str:
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]
