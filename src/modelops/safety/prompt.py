"""Prompt filter: word lists, matched on normalised whole words, with reasons.

A list cannot understand a sentence. It stops the plain cases, and names the word and its category.
Borderline words are not listed, so that ordinary prompts pass. The lists are in
`safety/lists/CATEGORY.txt`: one word or phrase a line; `#` starts a comment; `*` at the end of a
line also matches every word that begins so. `exceptions.txt` beside them holds phrases in which a
listed word has another sense, such as "naked eye".
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from modelops.base.errors import UsageError
from modelops.base.files import read_text, sha256_json
from modelops.safety.lookalikes import BAR, table_version, to_latin

MAX_PROMPT = 10_000  # characters
BENIGN_FILE = "benign_prompts.txt"
EXCEPTIONS = "exceptions"  # .txt
CATEGORIES = ("sexual", "minors", "violence", "hate", "self-harm")
_LEET = str.maketrans({"0": "o", "1": BAR, "3": "e", "4": "a", "5": "s", "7": "t", "@": "a",
                       "$": "s", "!": BAR, "|": BAR})  # fmt: skip
_NEVER_DRAWN = "\u115f\u1160\u3164\uffa0"  # fillers, which are letters by category
# After an exception, these words show that it is none: "nude mouse girl".
_PERSON = (
    r"(?:wom[ae]n|m[ae]n|girls?|boys?|lad(?:y|ies)|child(?:ren)?|kids?|teen\w*|person|people|models?|"
    r"bod(?:y|ies)|couples?|babes?|mother|daughter|son|sister|wife|princess|schoolgirls?)"
)
_SPELLED_OUT = re.compile(r"(?<![^\W_])(?:[^\W_][\W_]{1,3}){2,}[^\W_](?![^\W_])")


@dataclass(frozen=True, slots=True)
class PromptVerdict:
    """Verdict on a prompt: whether it is blocked, and the reason as "category: what matched"."""

    blocked: bool
    reasons: tuple[str, ...] = ()


class PromptFilter(Protocol):
    """Filter that says which prompts must not be answered."""

    @property
    def info(self) -> dict[str, Any]:
        """Name and digest of the lists, for records."""

    def check(self, prompt: str) -> PromptVerdict:
        """The verdict on one prompt; never raises for any text."""


class WordListFilter:
    """Filter that blocks prompts with a listed word or phrase.

    Args:
        lists: {category: entries}; the packaged lists, with their exceptions, when not given.
        exceptions: phrases within which a listed word does not count. Matches that reach beyond
            the phrase do.
    """

    def __init__(
        self,
        lists: Mapping[str, Sequence[str]] | None = None,
        exceptions: Sequence[str] | None = None,
    ) -> None:
        if exceptions is None:
            exceptions = () if lists else packaged_exceptions()
        self.lists = {k: tuple(v) for k, v in (lists or packaged_lists()).items()}
        self.exceptions = tuple(exceptions)
        phrases = "|".join(map(_entry_to_pattern, self.exceptions)) or r"(?!)"
        self._excused = re.compile(rf"(?:{phrases})(?![\s\-_,]+{_or_bars(_PERSON)}\b)")
        self._patterns = {
            category: re.compile("|".join(map(_entry_to_pattern, entries)))
            for category, entries in self.lists.items()
            if entries
        }

    @property
    def info(self) -> dict[str, Any]:
        return {
            "filter": "word lists",
            "lookalikes": table_version(),
            "lists_sha256": sha256_json(self.lists),
            "categories": sorted(self.lists),
            "entries": sum(map(len, self.lists.values())),
            "exceptions_sha256": sha256_json(self.exceptions),
            "exceptions": len(self.exceptions),
        }

    def check(self, prompt: str) -> PromptVerdict:
        if len(prompt) > MAX_PROMPT:
            return PromptVerdict(True, (f"length: more than {MAX_PROMPT} characters",))
        reasons: dict[str, dict[str, None]] = {}  # of each category; sets that keep their order
        for text in _readings(prompt):
            excused: list[tuple[int, int]] | None = None  # looked for when a word is found
            found: dict[str, dict[str, None]] = {}
            for category, pattern in self._patterns.items():
                if category in reasons:  # another reading would name the same words again
                    continue
                for match in pattern.finditer(text):
                    start, end = match.span()
                    if excused is None:
                        excused = [phrase.span() for phrase in self._excused.finditer(text)]
                    if not any(low <= start and end <= high for low, high in excused):
                        what = match.group(0).replace(BAR, "|")
                        found.setdefault(category, {})[f"{category}: {what}"] = None
            reasons |= found
        named = tuple(reason for category in reasons.values() for reason in category)
        return PromptVerdict(bool(named), named)


def normalise(text: str) -> str:
    """NFKC, without accents, invisible characters or case; look-alikes of Latin letters as those;
    words separated by single spaces."""
    return " ".join(to_latin(_plain(text).casefold()).split())


@functools.cache
def packaged_lists() -> dict[str, tuple[str, ...]]:
    """The lists that come with the package."""
    folder = resources.files("modelops.safety") / "lists"
    return {
        name: parse_list((folder / f"{name}.txt").read_text("utf-8"), f"{name}.txt")
        for name in CATEGORIES
    }


@functools.cache
def packaged_exceptions() -> tuple[str, ...]:
    """The exceptions that come with the package."""
    text = (resources.files("modelops.safety") / "lists" / f"{EXCEPTIONS}.txt").read_text("utf-8")
    return parse_list(text, f"{EXCEPTIONS}.txt")


@functools.cache
def benign_prompts() -> tuple[str, ...]:
    """Ordinary prompts, many with a word that has another sense; a filter should let them pass."""
    text = (resources.files("modelops.safety") / "lists" / BENIGN_FILE).read_text("utf-8")
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def read_lists(directory: Path) -> dict[str, tuple[str, ...]]:
    """Lists of one's own: every `*.txt` of a directory (but not its exceptions, nor a copy of the
    benign prompts).

    Raises:
        UsageError: there is none, or an entry cannot be used.
    """
    others = (BENIGN_FILE, f"{EXCEPTIONS}.txt")
    files = sorted(file for file in Path(directory).glob("*.txt") if file.name not in others)
    if not files:
        raise UsageError(f"{directory}: no word lists (*.txt)")
    return {file.stem: parse_list(read_text(file), file.name) for file in files}


def read_exceptions(directory: Path) -> tuple[str, ...]:
    """The exceptions to lists of one's own, `exceptions.txt` beside them; none without that file.

    Raises:
        UsageError: an entry cannot be used.
    """
    file = Path(directory) / f"{EXCEPTIONS}.txt"
    return parse_list(read_text(file), file.name) if file.is_file() else ()


def parse_list(text: str, name: str) -> tuple[str, ...]:
    """Entries of one list, normalised.

    Raises:
        UsageError: an entry is shorter than three letters, which would block ordinary words.
    """
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = normalise(line.split("#", 1)[0])
        if not entry:
            continue
        if len(entry.rstrip("*")) < 3:
            raise UsageError(f"{name}: line {number}: {entry!r} is too short to block")
        entries.append(entry)
    return tuple(entries)


def _plain(text: str) -> str:
    """NFKC, without accents and what is not drawn; control characters as spaces."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text))
    return "".join(
        " " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c
        for c in text
        if unicodedata.category(c) not in ("Mn", "Me", "Cf", "Cn", "Co", "Cs")
        and c not in _NEVER_DRAWN
    )


def _readings(prompt: str) -> list[str]:
    """The prompt as words, with digits read as letters, and with s p a c e d words closed up.

    Letters are compared as small and as they stand: the Greek capital that looks like an H has a
    small letter that looks like an n, and a capital I looks like a small l.
    """
    readings = []
    drawn = to_latin(_plain(prompt)).replace("I", BAR).replace("l", BAR)
    as_it_stands = " ".join(to_latin(drawn.casefold()).split())
    for plain in dict.fromkeys((normalise(prompt), as_it_stands)):
        leet = " ".join(
            word.translate(_LEET) if any(c.isalpha() for c in word) else word
            for word in plain.split()
        )
        readings += [plain, leet]
        readings += [
            _SPELLED_OUT.sub(lambda m: re.sub(r"[\W_]", "", m.group(0)), text)
            for text in (plain, leet)
        ]
    return list(dict.fromkeys(readings))


def _entry_to_pattern(entry: str) -> str:
    """A whole-word pattern; words of a phrase may be joined by spaces, hyphens or underscores."""
    prefix = entry.endswith("*")
    words = [_or_bars(re.escape(word)) for word in entry.rstrip("*").split()]
    body = r"[\s\-_]+".join(words)
    return rf"(?<![^\W_]){body}" + (r"[^\W_]*" if prefix else r"s?") + r"(?![^\W_])"


def _or_bars(pattern: str) -> str:
    return pattern.replace("i", f"[i{BAR}]").replace("l", f"[l{BAR}]")
