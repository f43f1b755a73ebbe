"""Check of cards against the records that they print."""

from __future__ import annotations

import difflib
from pathlib import Path

from modelops import __version__
from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import read_text, sha256_bytes, sha256_file
from modelops.cards.dataset import render_dataset_card
from modelops.cards.model import render_model_card
from modelops.cards.sources import (
    NOTES_BEGIN,
    CardSources,
    read_sources,
    sources_path,
    split_notes,
    with_notes,
)

MOST_LINES = 20


def find_cards(path: str | Path) -> list[Path]:
    """Find the card at `path`, or every card below a folder: files with sources or notes.

    Raises:
        UsageError: there is no card.
    """
    top = Path(path)
    if top.is_file():
        return [top]
    with_sources = {
        item.with_name(item.name.removesuffix(".sources.json") + ".md")
        for item in top.rglob("*.sources.json")
    }
    with_notes_region = {item for item in top.rglob("*.md") if NOTES_BEGIN in read_text(item)}
    found = sorted(with_sources | with_notes_region)
    if not found:
        raise UsageError(f"{path}: no card here", hint="name a card or a folder of cards")
    return found


def check_card(path: str | Path) -> list[str]:
    """Compare a card with the records and images that it was rendered from.

    Returns:
        One line per finding, each naming the file or line: a record or image that changed or is
        missing, a line that was edited outside the notes, or missing sources. Empty when the card
        is up to date.
    """
    card = Path(path)
    try:
        text = read_text(card)
        sources = read_sources(card)
    except UsageError as error:
        return [str(error)]
    folder = card.parent
    changed = _changed_inputs(sources, folder)
    findings = [*changed, *_changed_pictures(sources, folder)]
    try:
        body, _ = split_notes(text)
    except UsageError as error:
        return [*findings, error.message]
    edited = sha256_bytes(body.encode()) != sources.body_sha256
    if changed:
        if edited:
            findings.append("edited outside the notes as well; write the card again to see where")
        return findings
    try:
        expected = _render(sources, folder)
    except ModelopsError as error:
        return [*findings, f"cannot be rendered again: {error.message}"]
    if expected == body:
        if edited:
            findings.append(f"{sources_path(card).name} was edited: it names another text")
        return findings
    if not edited and sources.modelops != __version__:
        findings.append(
            f"written by modelops {sources.modelops}, this is {__version__}: write it again"
        )
        return findings
    return findings + _line_findings(expected, text)


def _render(sources: CardSources, folder: Path) -> str:
    return (render_model_card if sources.card == "model" else render_dataset_card)(sources, folder)


def _changed_inputs(sources: CardSources, folder: Path) -> list[str]:
    findings = []
    for role, reference in sources.inputs.items():
        path = folder / reference.path
        if not path.is_file():
            findings.append(f"{reference.path}: missing ({role})")
        elif sha256_file(path) != reference.sha256:
            findings.append(f"{reference.path}: changed since the card was written ({role})")
    for role, reference in sources.watched.items():
        path = folder / reference.path
        if path.is_file() and sha256_file(path) != reference.sha256:
            findings.append(f"{reference.path}: changed since it was counted ({role})")
    return findings


def _changed_pictures(sources: CardSources, folder: Path) -> list[str]:
    findings = []
    for picture in sources.pictures:
        path = folder / picture.file
        original = folder / picture.original.path if picture.original else None
        if not path.is_file():
            findings.append(f"{picture.file}: the image is missing")
        elif sha256_file(path) != picture.sha256:
            findings.append(f"{picture.file}: the image was changed")
        if (
            original is not None
            and picture.original is not None
            and original.is_file()
            and sha256_file(original) != picture.original.sha256
        ):
            findings.append(f"{picture.original.path}: changed since {picture.file} was copied")
    return findings


def _line_findings(expected: str, text: str) -> list[str]:
    """One finding per line of the card that its records would print otherwise."""
    wanted = with_notes(expected, split_notes(text)[1]).split("\n")
    given = text.replace("\r\n", "\n").split("\n")
    findings: list[str] = []
    matcher = difflib.SequenceMatcher(a=wanted, b=given, autojunk=False)
    for what, a0, a1, b0, b1 in matcher.get_opcodes():
        if what == "equal":
            continue
        for offset in range(max(a1 - a0, b1 - b0)):
            old = wanted[a0 + offset] if a0 + offset < a1 else None
            new = given[b0 + offset] if b0 + offset < b1 else None
            line = min(b0 + offset, b1 - 1 if b1 > b0 else b0) + 1
            findings.append(_line_finding(line, old, new))
    if len(findings) > MOST_LINES:
        left = len(findings) - MOST_LINES
        findings = [*findings[:MOST_LINES], f"and {left} more lines"]
    return findings


def _line_finding(line: int, old: str | None, new: str | None) -> str:
    if new is None:
        return f"line {line}: removed: {_short(old)}"
    if old is None:
        return f"line {line}: added: {_short(new)}"
    return f"line {line}: {_short(new)} (the records say: {_short(old)})"


def _short(line: str | None) -> str:
    text = (line or "").strip()
    return text if len(text) <= 160 else f"{text[:159]}…"
