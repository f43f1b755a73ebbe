"""Intervals and histograms as inline SVG, drawn with the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from modelops.evaluation.report.text import number, visible
from modelops.records.base import Measurement

Values = npt.NDArray[np.float64]
BANDS = 40  # at most so many bars
INTERVAL_WIDTH, INTERVAL_HEIGHT = 200, 32
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 12, 40, 26


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values laid over a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def shared_axis(values: Sequence[float]) -> Axis:
    """An axis for intervals that holds zero and all values, with round ends."""
    low, high = min(0.0, *values), max(0.0, *values)
    return Axis(
        -_round_up(-low) if low < 0 else 0.0,
        _round_up(high) if high > 0 or low == 0 else 0.0,
        8,
        INTERVAL_WIDTH - 8,
    )


def _round_up(value: float) -> float:
    """The next of 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next((s for s in steps if value <= s * power * (1 + 1e-9)), 10) * power


def draw_interval(
    low: float,
    value: float,
    high: float,
    axis: Axis,
    *,
    other: tuple[float, float, float] | None = None,
) -> Markup:
    """A value and its interval on an axis; `other` (low, value, high) below it, in grey.

    The numbers stand beside it in the page, so assistive technology is told to skip the drawing.
    """
    zero = axis(0)
    parts = [
        f'<svg class="interval" viewBox="0 0 {INTERVAL_WIDTH} {INTERVAL_HEIGHT}" '
        f'width="{INTERVAL_WIDTH}" height="{INTERVAL_HEIGHT}" aria-hidden="true">',
        f'<path class="track" d="M{axis.start} 20H{axis.end}"/>',
        f'<path class="zero" d="M{zero} 3V22"/>',
    ]
    if other:
        parts.append(_bar(other, axis, 15, "other"))
    parts.append(_bar((low, value, high), axis, 8, "own"))
    ends = [(axis.start, axis.low, "start"), (axis.end, axis.high, "end")]
    parts += [
        f'<text x="{x}" y="31" text-anchor="{anchor}">{number(at)}</text>' for x, at, anchor in ends
    ]
    return Markup("".join(parts) + "</svg>")


def _bar(found: tuple[float, float, float], axis: Axis, y: int, name: str) -> str:
    left, middle, right = (axis(v) for v in found)
    left, right = min(left, middle - 0.75), max(right, middle + 0.75)
    return (
        f'<rect class="{name}" x="{left:g}" y="{y - 2.5}" width="{right - left:.2f}" height="5" '
        f'rx="1"/><path class="{name}" d="M{middle:g} {y - 4}v8"/>'
    )


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across a histogram: a threshold or a base rate."""

    value: float
    label: str


def draw_histogram(
    values: Values, label: str, *, marks: Sequence[Mark] = (), behind: Values | None = None
) -> Markup:
    """Draw a histogram of finite values, [n >= 1], with marks; `behind` is an outline.

    Args:
        label: what the drawing says in words, for those who do not see it.
    """
    spread = np.concatenate([values, behind if behind is not None else values[:0]])
    everything = [*spread.tolist(), *(mark.value for mark in marks)]
    low, high = min(everything), max(everything)
    if low == high:
        low, high = low - 0.5, high + 0.5
    else:
        low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)
    ticks = _ticks(low, high)
    bins = int(np.clip(np.sqrt(len(values)) * 2, 8, BANDS))
    edges = np.linspace(low, high, bins + 1)
    counts = np.histogram(values, edges)[0]
    x = Axis(low, high, _LEFT, HISTOGRAM_WIDTH - _RIGHT)
    others = np.histogram(behind, edges)[0] if behind is not None else counts[:0]
    most = int(max(counts.max(), others.max(initial=0)))
    foot = HISTOGRAM_HEIGHT - _BOTTOM
    y = Axis(0, max(most, 1), foot, _TOP)
    outline = ""
    if others.any():
        path = "".join(
            f"L{x(left)} {y(count)}L{x(right)} {y(count)}"
            for left, right, count in zip(edges, edges[1:], others, strict=False)
        )
        outline = f'<path class="behind" d="M{x(low)} {foot}{path}L{x(high)} {foot}"/>'
    bars = "".join(
        f'<rect class="bar" x="{x(left) + 0.5:g}" y="{min(y(count), foot - 1.5):g}" '
        f'width="{max(x(right) - x(left) - 1, 0.5):.2f}" height="{max(foot - y(count), 1.5):.2f}"/>'
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        if count
    )
    axis = f'<path class="track" d="M{_LEFT} {foot}H{HISTOGRAM_WIDTH - _RIGHT}"/>'
    axis += "".join(
        f'<text x="{x(tick)}" y="{foot + 16}" text-anchor="middle">{number(tick)}</text>'
        for tick in ticks
    )
    axis += f'<text x="{_LEFT - 5}" y="{_TOP + 4}" text-anchor="end">{most:,}</text>'
    axis += f'<text x="{_LEFT - 5}" y="{foot}" text-anchor="end">0</text>'
    return Markup(
        f'<svg class="histogram" viewBox="0 0 {HISTOGRAM_WIDTH} {HISTOGRAM_HEIGHT}" role="img" '
        f'aria-label="{escape(visible(label))}">{bars}{outline}{axis}'
        f"{_draw_marks(marks, x, foot)}</svg>"
    )


def _draw_marks(marks: Sequence[Mark], x: Axis, foot: int) -> str:
    """Dashed lines; each label stands on the side where no other line crosses it, if it fits."""
    drawn = []
    ordered = sorted(marks, key=lambda m: m.value)[:3]
    for place, mark in enumerate(ordered):
        at, y, width = x(mark.value), 11 + 12 * place, 5.6 * len(mark.label) + 4
        left = place < len(ordered) - 1
        if left and at - width < 0:
            left = False
        elif not left and at + width > HISTOGRAM_WIDTH:
            left = True
        drawn.append(
            f'<path class="mark" d="M{at} {y - 8}V{foot}"/>'
            f'<text class="mark" x="{at - 4 if left else at + 4:g}" y="{y}" '
            f'text-anchor="{"end" if left else "start"}">{escape(visible(mark.label))}</text>'
        )
    return "".join(drawn)


@dataclass(frozen=True, slots=True)
class Curve:
    """A line with a band: points (x, low, value, high), and the class that colours it."""

    points: Sequence[tuple[float, float, float, float]]
    name: str


def draw_curves(curves: Sequence[Curve], label: str, *, marks: Sequence[Mark] = ()) -> Markup:
    """Shares against a threshold, each with its band; for `label` see `draw_histogram`."""
    points = [point for curve in curves for point in curve.points]
    at, highs = [p[0] for p in points], [p[3] for p in points]
    x = Axis(min(at), max(at) if max(at) > min(at) else min(at) + 1, _LEFT,
             HISTOGRAM_WIDTH - _RIGHT)  # fmt: skip
    foot = HISTOGRAM_HEIGHT - _BOTTOM
    y = Axis(0, _round_up(max(highs)), foot, _TOP)
    drawn = []
    for curve in curves:
        if not curve.points:
            continue
        upper = [f"{x(p[0])} {y(p[3])}" for p in curve.points]
        lower = [f"{x(p[0])} {y(p[1])}" for p in reversed(curve.points)]
        line = "L".join(f"{x(p[0])} {y(p[2])}" for p in curve.points)
        drawn.append(
            f'<path class="band {curve.name}" d="M{"L".join(upper + lower)}Z"/>'
            f'<path class="line {curve.name}" d="M{line}"/>'
        )
    axis = f'<path class="track" d="M{_LEFT} {foot}H{HISTOGRAM_WIDTH - _RIGHT}"/>'
    axis += "".join(
        f'<text x="{x(tick)}" y="{foot + 16}" text-anchor="middle">{number(tick)}</text>'
        for tick in _ticks(x.low, x.high)
    )
    axis += "".join(
        f'<text x="{_LEFT - 5}" y="{y(tick) + 3:g}" text-anchor="end">{number(tick)}</text>'
        for tick in (0, y.high / 2, y.high)
    )
    axis += (
        f'<text x="{HISTOGRAM_WIDTH - _RIGHT}" y="{foot + 16}" text-anchor="end">threshold</text>'
        f'<text x="{_LEFT}" y="{_TOP - 8}" text-anchor="start">share flagged</text>'
    )
    return Markup(
        f'<svg class="histogram" viewBox="0 0 {HISTOGRAM_WIDTH} {HISTOGRAM_HEIGHT}" role="img" '
        f'aria-label="{escape(visible(label))}">{"".join(drawn)}{axis}'
        f"{_draw_marks(marks, x, foot)}</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s for s in (1, 2, 2.5, 5, 10) if raw <= s * power * (1 + 1e-9)) * power
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def ends_of(measured: Measurement | None) -> tuple[float, float, float] | None:
    """Return (low, value, high) of a measurement that was made."""
    if measured is None or measured.value is None or measured.low is None or measured.high is None:
        return None
    return measured.low, measured.value, measured.high


def finite(values: Sequence[Any]) -> Values:
    """The finite numbers among per-image values, float64 [m]."""
    kept = [
        float(v)
        for v in values
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    ]
    return np.array(kept, np.float64)
