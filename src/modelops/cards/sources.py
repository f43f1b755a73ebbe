"""Sources of a card, NAME.sources.json: the files it was rendered from, to check it later."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from modelops import __version__
from modelops.base.errors import UsageError
from modelops.base.files import (
    read_json,
    read_text,
    sha256_bytes,
    sha256_file,
    sha256_json,
    write_bytes,
    write_json,
)
from modelops.records.base import InputRef

NOTES_BEGIN, NOTES_END = "<!-- notes:begin -->", "<!-- notes:end -->"
_DIGEST = re.compile(r"Sources: sha256 ([0-9a-f]{64}) -->\s*$")
NO_NOTES = "None yet. What is written between these marks is kept when the card is written again."
_PICTURE_HEADS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PictureRef(_Model):
    """An image beside the card; `original` is where it was copied from."""

    file: str
    sha256: str
    alt: str
    original: InputRef | None = None


class CardSources(_Model):
    """Sources that a card was rendered from. Paths are relative to the card's folder.

    Attributes:
        inputs: files that the text is rendered from; without them the card cannot be checked.
        watched: files that the inputs or the words of `about` come from; compared when present.
        body_sha256: of the card without its notes.
    """

    kind: Literal["card_sources"] = "card_sources"
    schema_version: Literal[1] = 1
    card: Literal["model", "dataset"]
    modelops: str = __version__
    about: dict[str, Any]
    options: dict[str, str] = {}
    inputs: dict[str, InputRef]
    watched: dict[str, InputRef] = {}
    pictures: list[PictureRef] = []
    body_sha256: str = ""
    _elsewhere: dict[str, Path] = PrivateAttr(default_factory=dict)

    def look_in(self, files: Mapping[str, Path]) -> None:
        """Find inputs that are not where they were by their digest in {sha256: file}."""
        self._elsewhere = dict(files)

    def place(self, role: str, folder: Path) -> Path:
        """Return the file of an input of a card in `folder`."""
        path = folder / self.inputs[role].path
        return path if path.is_file() else self._elsewhere.get(self.inputs[role].sha256, path)

    @property
    def digest(self) -> str:
        """sha256 of everything but `body_sha256`; the card itself carries it."""
        return sha256_json(self.model_dump(mode="json", exclude={"body_sha256"}))


def sources_path(card: str | Path) -> Path:
    """cards/model_card.md -> cards/model_card.sources.json"""
    return Path(card).with_suffix(".sources.json")


def read_sources(card: str | Path) -> CardSources:
    """Read the sources of a card.

    Raises:
        UsageError: the file is missing or damaged.
    """
    path = sources_path(card)
    if not path.is_file():
        raise UsageError(
            f"{card}: no {path.name} beside it, so nothing says what it was made from",
            hint="write the card with `modelops card model` or `modelops card dataset`",
        )
    data = read_json(path)
    try:
        sources = CardSources.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {where}: {first['msg']}") from error
    named = [*sources.inputs.values(), *sources.watched.values()]
    if any(Path(reference.path).is_absolute() for reference in named):
        raise UsageError(f"{path}: holds an absolute path")
    if any(Path(picture.file).name != picture.file for picture in sources.pictures):
        raise UsageError(f"{path}: an image lies outside the card's folder")
    return sources


def write_sources(card: str | Path, sources: CardSources) -> None:
    """Write NAME.sources.json."""
    write_json(sources_path(card), sources.model_dump(mode="json"))


def reference(path: str | Path, folder: Path) -> InputRef:
    """A file by its digest and its path as seen from the card's folder.

    Raises:
        UsageError: it is missing.
    """
    relative = os.path.relpath(Path(path).resolve(), folder.resolve())
    return InputRef(path=Path(relative).as_posix(), sha256=sha256_file(path))


def about_file(about: object, folder: Path) -> dict[str, InputRef]:
    """Return the file that an about was read from, to be watched; nothing if it was not."""
    return {"about": reference(about, folder)} if isinstance(about, str | Path) else {}


def copy_picture(picture: str | Path, alt: str, folder: Path, taken: set[str]) -> PictureRef:
    """Copy an image beside the card, if it is not there yet, under a unique name.

    Raises:
        UsageError: it is missing or not a PNG, JPEG, GIF or WebP file.
    """
    source = Path(picture)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise UsageError(f"{picture}: {error.strerror or error}") from error
    suffix = next((end for head, end in _PICTURE_HEADS.items() if data.startswith(head)), None)
    if suffix is None:
        raise UsageError(f"{picture}: not a PNG, JPEG, GIF or WebP image")
    digest = sha256_bytes(data)
    if source.resolve().parent == folder.resolve():
        taken.add(source.name)
        return PictureRef(file=source.name, sha256=digest, alt=alt)
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", source.stem).strip("._") or "picture"
    name, count = f"{stem}{suffix}", 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}{suffix}"
    taken.add(name)
    write_bytes(folder / name, data)
    return PictureRef(file=name, sha256=digest, alt=alt, original=reference(source, folder))


def split_notes(text: str) -> tuple[str, str]:
    """A card as (body with an empty notes region, notes).

    Raises:
        UsageError: the two marks are not there exactly once and in order.
    """
    text = text.replace("\r\n", "\n")
    lines = text.split("\n")
    begins = [number for number, line in enumerate(lines) if line.strip() == NOTES_BEGIN]
    ends = [number for number, line in enumerate(lines) if line.strip() == NOTES_END]
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise UsageError(
            f"the notes should lie between one {NOTES_BEGIN} and one {NOTES_END}",
            hint="mend the marks, or move the file and write the card again",
        )
    begin, end = begins[0], ends[0]
    body = "\n".join([*lines[: begin + 1], *lines[end:]])
    return body, "\n".join(lines[begin + 1 : end])


def stated_digest(text: str) -> str | None:
    """Return the digest of its sources that a card carries at its end."""
    found = _DIGEST.search(text)
    return found[1] if found else None


def existing_notes(card: Path, *, force: bool) -> str:
    """Return the notes of the card that is about to be written again.

    Raises:
        UsageError: the file is not such a card, and `force` is not given.
    """
    if not card.exists():
        return NO_NOTES
    try:
        return split_notes(read_text(card))[1]
    except UsageError as error:
        if force:
            return NO_NOTES
        raise UsageError(
            f"{card}: {error.message}", hint=f"{error.hint}, or use --force"
        ) from error


def with_notes(body: str, notes: str) -> str:
    """Put notes into a body with an empty region."""
    return body.replace(f"{NOTES_BEGIN}\n", f"{NOTES_BEGIN}\n{notes}\n", 1) if notes else body
