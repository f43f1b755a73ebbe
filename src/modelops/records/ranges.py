"""Ranges of measured values: what a measure can be at all, by its unit or else by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping

from modelops.records.base import Measurement

Range = tuple[float, float]
SHARE: Range = (0.0, 1.0)
_NOT_NEGATIVE: Range = (0.0, math.inf)
_SLACK = 1e-6  # of float32 cosines and of distances between equal sets

_OF_UNIT: dict[str, Range] = {
    "rate": SHARE,
    "cosine": (-1.0, 1.0),
    "1 - cosine": (0.0, 2.0),
    "100 cosine": (-100.0, 100.0),
    "2.5 max(0, cosine)": (0.0, 2.5),
    "SSIM": (-1.0, 1.0),
    "LPIPS": _NOT_NEGATIVE,
    "dB": _NOT_NEGATIVE,
    "x": _NOT_NEGATIVE,
    "images/s": _NOT_NEGATIVE,
}
# Any word of a name. Kernel distances are unbiased estimates, which may be below 0.
_OF_WORD: dict[str, Range] = {
    "rate": SHARE,
    "retrieval": SHARE,
    "authenticity": SHARE,
    "precision": SHARE,
    "recall": SHARE,
    "coverage": SHARE,
    "density": _NOT_NEGATIVE,
    "diversity": (0.0, 2.0),
    "frechet": _NOT_NEGATIVE,
    "fid": _NOT_NEGATIVE,
    "ssim": (-1.0, 1.0),
    "psnr": _NOT_NEGATIVE,
    "lpips": _NOT_NEGATIVE,
}
_DIFFERENCES = {"gap", "gain", "difference"}
_UNBOUNDED = {"infinity"}  # extrapolated to infinite n


def range_of(name: str, unit: str = "", *, difference: bool = False) -> Range | None:
    """Return the least and the largest value that a measure can have; None if nothing is known.

    Args:
        difference: the range is of a difference of two such values.
    """
    words = name.split("_")
    if _UNBOUNDED & set(words):
        return None
    found = next((_OF_WORD[word] for word in words if word in _OF_WORD), _OF_UNIT.get(unit))
    if found is None or not (difference or _DIFFERENCES & set(words)):
        return found
    return found[0] - found[1], found[1] - found[0]


def check_value(name: str, value: float, allowed: Range | None) -> None:
    """Refuse a value that its measure cannot have.

    Raises:
        ValueError: it is outside the range; the message names both.
    """
    if allowed is not None and not allowed[0] - _SLACK <= value <= allowed[1] + _SLACK:
        low, high = (f"{end:g}" for end in allowed)
        between = f"between {low} and {high}" if math.isfinite(allowed[1]) else f"at least {low}"
        raise ValueError(f"{name}: {value:g} is impossible, it must be {between}")


def check_measured(
    measured: Mapping[str, Measurement], *, allowed: Range | None = None, difference: bool = False
) -> None:
    """Refuse measurements that their measures cannot have. Of shares, the interval is checked too.

    Args:
        measured: by the name of the measure.
        allowed: range of all of them, in place of the one of name and unit.
        difference: they are differences of two values.

    Raises:
        ValueError: one is impossible; the message names it.
    """
    for name, each in measured.items():
        if each.value is None or each.low is None or each.high is None:
            continue
        found = allowed or range_of(name, each.unit, difference=difference)
        ends = (each.low, each.high) if found == SHARE else ()
        for value in (each.value, *ends):
            check_value(name, value, found)
