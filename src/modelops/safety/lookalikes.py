"""Letters of all scripts that look like Latin ones, by Unicode's table of confusables (UTS 39).

The table is the one in the package confusable-homoglyphs. It has sets of look-alikes, each around a
character that need not be Latin: Cyrillic and Greek k around the Latin kra. Letters that it leaves
out, as small capitals or in black squares, are known by their Unicode names. A letter that merely
reminds of another, as the Cyrillic ya of an R, is not in it.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from importlib import metadata, resources

_PACKAGE = "confusable-homoglyphs"
BAR = "\u01c0"  # stands for a letter that may be an i or an l
_LIKE_E = frozenset("\u025b\u20ac")  # open e and the euro sign, which the table has with c
_NAMED = re.compile(
    r"(?:LATIN|NEGATIVE (?:SQUARED|CIRCLED) LATIN|REGIONAL INDICATOR SYMBOL) "
    r"(?:(?:SMALL|CAPITAL) )?LETTER (?:SMALL CAPITAL |BARRED |DOTLESS |LONG |OPEN |SCRIPT )?([A-Z])"
    r"(?: WITH .+)?"
)


def to_latin(text: str) -> str:
    """Return a text in which each letter that looks like Latin ones is those, in lower case, or
    `BAR`. ASCII stays as it is."""
    return text if text.isascii() else text.translate(_table())


def table_version() -> str:
    """Name and version of the table, for records."""
    return f"{_PACKAGE} {metadata.version(_PACKAGE)}"


class _Table(dict[int, str]):
    """Table for `str.translate` that answers for every character."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        return char if code < 128 else _named(char) or char


@functools.cache
def _table() -> _Table:
    file = resources.files("confusable_homoglyphs") / "confusables.json"
    table = _Table({ord(BAR): BAR})
    for key, entries in json.loads(file.read_text("utf-8")).items():
        # Each set is there from its middle, as a list, and from each other member, as a pair.
        alike = [_without(text, "Cf") for text in (key, *(entry["c"] for entry in entries))]
        if latin := _looks_like(alike):
            for text in alike:
                if (
                    len(text) == 1
                    and not text.isascii()
                    and (entries[1:] or ord(text) not in table)
                ):
                    table[ord(text)] = latin
    return table


def _looks_like(alike: Sequence[str]) -> str | None:
    """Latin letters that a set of texts looks like."""
    if not _LIKE_E.isdisjoint(alike):
        return "e"
    for texts in (alike, [_without(text, "Mn", "Me") for text in alike]):
        letters = [text.casefold() for text in texts if text.isascii() and text.isalnum()]
        if {"i", "l"} & set(letters):
            return BAR
        if letters:
            return min(letters, key=lambda text: (not text.isalpha(), len(text), text))
    return next((found for text in alike if len(text) == 1 and (found := _named(text))), None)


def _named(char: str) -> str | None:
    found = _NAMED.fullmatch(unicodedata.name(char, ""))
    return found[1].casefold() if found else None


def _without(text: str, *categories: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(c for c in decomposed if unicodedata.category(c) not in categories)
