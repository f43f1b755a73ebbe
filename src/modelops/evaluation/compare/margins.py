"""Margins: the loss that is accepted, and the number of prompts needed to see it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from modelops.base.errors import UsageError
from modelops.metrics.paired import PairedDifference

Within = Literal["yes", "no", "undecided"]
POWER = 0.8


@dataclass(frozen=True, slots=True)
class Margin:
    """Accepted loss: in the metric's own unit, or as a share of the first value."""

    amount: float
    relative: bool

    def absolute(self, first: float) -> float:
        """Return the margin in the metric's unit; a share is taken of the measured first value."""
        return self.amount * abs(first) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount:.6g}" if not self.relative else f"{100 * self.amount:.6g}%"


def default_margin(name: str, unit: str) -> Margin:
    """Return the margin if none was asked for. It is shown; with `default_margins` it also decides.

    One point of a rate of harm (unsafe images, copies, failures), five points of other rates and
    of precision, recall and coverage, and 5 % of the first value of everything else.
    """
    if name in ("unsafe_rate", "near_copy_rate", "failed_image_rate"):
        return Margin(0.01, relative=False)
    if unit == "rate" or name.startswith(("precision", "recall", "coverage")):
        return Margin(0.05, relative=False)
    return Margin(0.05, relative=True)


def parse_margins(texts: Iterable[str]) -> dict[str, Margin]:
    """Parse texts such as "unsafe_rate=0.01" or "fid=5%" into {metric: margin}.

    Raises:
        UsageError: a text has another form, or a metric is named twice.
    """
    margins: dict[str, Margin] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        number = value.removesuffix("%").strip()
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not (name and sign and math.isfinite(amount) and amount >= 0):
            raise UsageError(
                f"margin {text!r}: not METRIC=VALUE with a value of at least 0",
                hint="such as unsafe_rate=0.01 or frechet_distance_lite0=5%",
            )
        if name in margins:
            raise UsageError(f"margin {text!r}: {name} has a margin already")
        relative = value.endswith("%")
        margins[name] = Margin(amount / 100 if relative else amount, relative)
    return margins


def within_margin(made: PairedDifference, margin: float, *, higher_is_better: bool) -> Within:
    """Return whether the second is worse by no more than the margin: yes if the whole interval is
    on this side of it (a one-sided test at 2.5 %), no if the whole interval is beyond.
    """
    least, most = (
        (-made.high, -made.low) if higher_is_better else (made.low, made.high)
    )  # of how much worse
    return "yes" if most <= margin else "no" if least > margin else "undecided"


def detectable(made: PairedDifference, *, alpha: float = 0.05, power: float = POWER) -> float:
    """Return the smallest true difference that this metric alone detects with the given power."""
    return _factor(alpha, power) * math.sqrt(made.variance + made.fixed_variance)


def prompts_needed(
    made: PairedDifference, margin: float, *, alpha: float = 0.05, power: float = POWER
) -> int | None:
    """Return the number of prompts that show an equally good source to be within the margin, with
    the given power. None if no number is enough: the margin is 0, or smaller than the noise of the
    reference images, which more prompts do not reduce.
    """
    allowed = (margin / _factor(alpha, power)) ** 2 - made.fixed_variance
    if margin <= 0 or allowed <= 0:
        return None
    return max(2, math.ceil(made.n * made.variance / allowed))


def _factor(alpha: float, power: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(1 - alpha / 2) + norm.ppf(power))


def unknown_margins(margins: Mapping[str, Margin], known: Iterable[str]) -> None:
    """Refuse a margin for a metric that is not compared.

    Raises:
        UsageError: there is such a margin; the message names the metrics that are compared.
    """
    import difflib

    names = sorted(known)
    for name in margins:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise UsageError(
                f"margin {name}={margins[name]}: not a metric of both records that has a better "
                "direction",
                hint=f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}",
            )
