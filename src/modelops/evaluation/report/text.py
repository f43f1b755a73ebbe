"""Text and numbers as a page shows them."""

from __future__ import annotations

import math
import unicodedata

# Characters that change the direction of what follows: shown, never obeyed.
_DIRECTION = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def visible(text: str, *, lines: bool = False) -> str:
    """Make control, direction and unpaired surrogate characters visible, such as ⟨U+0007⟩.

    Ends of lines are kept with `lines` and are spaces without.

    The result encodes to UTF-8 and cannot reverse the line it is in; it is not escaped.
    """
    end = "\n" if lines else " "
    return "".join(end if sign == "\n" else _visible(sign) for sign in text)


def _visible(sign: str) -> str:
    code = ord(sign)
    category = unicodedata.category(sign)
    if category in ("Cc", "Cs", "Zl", "Zp") or code in _DIRECTION or code & 0xFFFE == 0xFFFE:
        return f"⟨U+{code:04X}⟩"
    return sign


def shorten(text: str, length: int) -> str:
    """The first `length` characters, with … where something is left out."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def number(value: float | None, digits: int = 4) -> str:
    """Format a number with `digits` significant digits; no exponent from 0.0001 to a million."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}".replace("-", "−")
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def seconds(value: float) -> str:
    """`1 min 27 s`"""
    whole = round(value)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{value:.1f} s"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 image`, `395 images`"""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
