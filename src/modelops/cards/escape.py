"""Escaping of records' text for Markdown: it makes no markup, link, mention or table cell."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

_KEPT_FORMAT_SIGNS = {"\u200d"}  # joins emoji; other invisible characters can reverse a line
# Characters that make a line a heading, an item, a rule or an underline when they come first.
_LEADING = re.compile(r"^(#{1,6}(?= |$)|[+-](?= |$)|-{3,}|=+$|\d+(?=[.)](?: |$)))")


def one_line(text: str) -> str:
    """Put `text` on one line, without characters that control or change the reading direction."""
    signs = []
    for sign in text:
        category = unicodedata.category(sign)
        if sign.isspace():
            signs.append(" ")
        elif category not in ("Cc", "Cf", "Cs") or sign in _KEPT_FORMAT_SIGNS:
            signs.append(sign)
    return " ".join("".join(signs).split())


def markdown(text: str) -> Markup:
    """Escape text for any place in a Markdown page, table cells included."""
    line = one_line(text)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
    line = line.replace("://", "&#58;//").replace("@", "&#64;")
    line = re.sub(r"(?i)\bwww\.", lambda found: found.group()[:3] + "&#46;", line)
    line = re.sub(r"(?i)\b(javascript|data|vbscript):", r"\1&#58;", line)
    found = _LEADING.match(line)
    if found:
        end = found.end() if line[0].isdigit() else 0
        line = f"{line[:end]}\\{line[end:]}"
    return Markup(line)


def code(text: Any) -> Markup:
    """Text as inline code."""
    line = one_line(str(text))
    if not line:
        return Markup("")
    if "`" in line or "|" in line:
        return Markup("<code>") + markdown(line).replace("\\|", "&#124;") + Markup("</code>")
    return Markup(f"`{line}`")


def link(label: str, target: str) -> Markup:
    """A link to a file beside the card, or to an http(s) address; anything else stays text."""
    if re.match(r"(?i)^[a-z][a-z0-9+.\-]*:", target) and not re.match(r"(?i)^https?://", target):
        return markdown(label)
    address = quote(target, safe="/.-_~:?&=%#")
    return Markup("[") + markdown(label) + Markup("](") + Markup(address) + Markup(")")


def string_literal(text: str) -> Markup:
    """A string literal for a snippet in Python, JSON or inside a shell's single quotes."""
    literal = json.dumps(one_line(text), ensure_ascii=True)
    return Markup(literal.replace("'", "\\u0027").replace("`", "\\u0060"))


def finalize(value: Any) -> Any:
    """Check and escape the value of a `{{ expression }}`; all of a template's go through this.

    Raises:
        ValueError: None or a bare float: a card prints numbers only through `number`.
    """
    if hasattr(value, "__html__"):
        return value
    if isinstance(value, str):
        return markdown(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Markup(f"{value:,}")
    raise ValueError(f"a card cannot print {value!r}: format it or say why it is missing")


def number(value: float) -> Markup:
    """Four significant digits, without an exponent where a person would write none.

    Raises:
        ValueError: NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError("a card never prints NaN or infinity")
    if value == int(value) and abs(value) < 1e6:
        return Markup(f"{int(value):,}")
    return Markup(f"{value:.4g}")


def seconds(value: float) -> str:
    """`9 min 40 s`"""
    whole = round(value)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{value:.1f} s"


def megabytes(value: int) -> str:
    """`17.6 MB`, or `3.4 kB` below a tenth of one."""
    return f"{value / 1e6:.1f} MB" if value >= 100_000 else f"{value / 1e3:.1f} kB"
