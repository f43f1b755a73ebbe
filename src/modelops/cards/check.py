"""Check of cards against the records that they print."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from modelops import __version__
from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import read_text, sha256_bytes, sha256_file
from modelops.cards.about import load_about
from modelops.cards.dataset import render_dataset_card
from modelops.cards.model import render_model_card
from modelops.cards.sources import (
    NOTES_BEGIN,
    NOTES_END,
    CardSources,
    read_sources,
    sources_path,
    split_notes,
    stated_digest,
    with_notes,
)

MOST_LINES = 20
_MARKS = (NOTES_BEGIN, NOTES_END, "<!-- Written by modelops from")
_NO_DIGEST = (
    "carries no digest of its sources at its end: it was written by an older modelops, or edited; "
    "write it again"
)
_AGAIN = "write it with `modelops card` and build the release again"


def find_cards(path: str | Path) -> list[Path]:
    """Find the card at `path`, or every card below a folder.

    These are the Markdown files with sources or with anything that a card has: a notes mark, front
    matter, the last comment, or a name with "card". A card from which some of it was removed is
    found all the same, and then not passed.

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
    found = sorted(with_sources | {item for item in top.rglob("*.md") if _looks_like_a_card(item)})
    if not found:
        raise UsageError(f"{path}: no card here", hint="name a card or a folder of cards")
    return found


def _looks_like_a_card(path: Path) -> bool:
    if "card" in path.name.lower():
        return True
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return False
    return text.lstrip("\ufeff \r\n").startswith("---") or any(mark in text for mark in _MARKS)


def check_card(path: str | Path) -> list[str]:
    """Compare a card with the records and images that it was rendered from.

    Returns:
        One line per finding, each naming the file or line: a record or image that changed or is
        missing, a line that was edited outside the notes, or sources that are missing or were
        edited. Empty when the card is up to date.
    """
    card = Path(path)
    try:
        text, sources = read_text(card), read_sources(card)
    except UsageError as error:
        return [str(error)]
    return _check(card, text, sources)


def check_released_cards(release: str | Path, files: Mapping[str, str], *, apart: set[str]) -> None:
    """Check the cards of a release against the records in it, which are found by their digest.

    A card whose records are not in the release, or that another version of modelops wrote, is only
    compared with the digests that it and its sources carry.

    Args:
        release: its folder.
        files: its files, {path: sha256}.
        apart: top folders with files of others, such as the model's.

    Raises:
        IntegrityError: names the first card that is not as it was written, and why.
    """
    root = Path(release)
    inside = {name: root / name for name in files if name.partition("/")[0] not in apart}
    found = {files[name]: path for name, path in inside.items()}
    for name, card in sorted(inside.items()):
        if not name.endswith(".md") or not (name.startswith("cards/") or _looks_like_a_card(card)):
            continue
        try:
            text, sources = read_text(card), read_sources(card)
        except UsageError as error:
            raise IntegrityError(str(error), hint=_AGAIN) from error
        sources.look_in(found)
        whole = sources.modelops == __version__ and all(
            sources.place(role, card.parent).is_file() for role in sources.inputs
        )
        findings = _check(card, text, sources) if whole else _check_digests(card, text, sources)
        if findings:
            raise IntegrityError(f"{card}: {findings[0]}", hint=_AGAIN)


def _check(card: Path, text: str, sources: CardSources) -> list[str]:
    folder = card.parent
    changed = _changed_inputs(sources, folder)
    findings = [*changed, *_changed_pictures(sources, folder), *_changed_words(sources, folder)]
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
    if stated_digest(text) is None and not edited:
        return [*findings, _NO_DIGEST]
    if stated_digest(text) != sources.digest:
        findings.append(f"{sources_path(card).name} is not the one that the card was written with")
    return findings + _line_findings(expected, text)


def _check_digests(card: Path, text: str, sources: CardSources) -> list[str]:
    """Compare a card whose records are not here with what it and its sources say of each other."""
    try:
        body, _ = split_notes(text)
    except UsageError as error:
        return [error.message]
    if sha256_bytes(body.encode()) != sources.body_sha256:
        return ["edited outside the notes"]
    if stated_digest(text) is None:
        return [_NO_DIGEST]
    if stated_digest(text) != sources.digest:
        return [f"{sources_path(card).name} is not the one that the card was written with"]
    return _changed_pictures(sources, card.parent)


def _render(sources: CardSources, folder: Path) -> str:
    return (render_model_card if sources.card == "model" else render_dataset_card)(sources, folder)


def _changed_inputs(sources: CardSources, folder: Path) -> list[str]:
    findings = []
    for role, reference in sources.inputs.items():
        path = sources.place(role, folder)
        if not path.is_file():
            findings.append(f"{reference.path}: missing ({role})")
        elif sha256_file(path) != reference.sha256:
            findings.append(f"{reference.path}: changed since the card was written ({role})")
    for role, reference in sources.watched.items():
        path = folder / reference.path
        if path.is_file() and sha256_file(path) != reference.sha256:
            since = "the card was written" if role == "about" else "it was counted"
            findings.append(f"{reference.path}: changed since {since} ({role})")
    return findings


def _changed_words(sources: CardSources, folder: Path) -> list[str]:
    """Compare the words in the sources with the about file that they were read from, if here."""
    reference = sources.watched.get("about")
    path = folder / reference.path if reference is not None else None
    if reference is None or path is None or not path.is_file():
        return []
    if sha256_file(path) != reference.sha256:
        return []  # told by `_changed_inputs`
    try:
        words = load_about(path).model_dump(mode="json")
    except ModelopsError as error:
        return [error.message]
    other = sorted(key for key in words if sources.about.get(key, words[key]) != words[key])
    return [f"{reference.path} says otherwise about {', '.join(other)}"] if other else []


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
