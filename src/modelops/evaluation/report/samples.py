"""The images of an evaluation, found again on disk and put into a page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.base.errors import ModelopsError
from modelops.base.files import read_json, safe_join, sha256_file
from modelops.evaluation.grids import image_to_inline
from modelops.evaluation.prompts import image_name
from modelops.records.base import InputRef
from modelops.records.evaluation import EvaluationRecord

LARGEST = 320  # pixels a side in the page
SMALL = 160  # up to here pixels are shown as they are, without smoothing


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in the page, or why it is not there.

    Attributes:
        src: a data URI; None when the image is not there.
        missing: the reason, when it is not.
        width, height: of the image that was measured, pixels.
        small: whether its pixels are to be shown without smoothing.
        shrunk: whether it was made smaller for the page.
    """

    src: str | None = None
    missing: str = ""
    width: int = 0
    height: int = 0
    small: bool = False
    shrunk: bool = False


class Pictures:
    """Images of one record, by the rows of its per_image.json; each is read once."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.found = self.unverified = 0
        self._known: dict[int, Picture] = {}

    def of(self, place: int, row: Mapping[str, Any]) -> Picture:
        """The image of the row at `place`."""
        if place not in self._known:
            self._known[place] = self._find(place, row)
        return self._known[place]

    def _find(self, place: int, row: Mapping[str, Any]) -> Picture:
        if row.get("failure"):
            return Picture(missing=f"failed: {row['failure']}")
        try:
            path = self._path(place, row)
        except (ModelopsError, ValueError):  # a ValueError: characters that have no bytes
            path = None
        if path is None or not path.is_file():
            return Picture(missing="no longer in the samples folder")
        digest = row.get("image_sha256")
        if digest is None:
            self.unverified += 1
        elif sha256_file(path) != digest:
            return Picture(missing="changed since it was measured")
        try:
            data, media, width, height = image_to_inline(path, LARGEST)
        except ModelopsError as error:
            return Picture(missing=error.message)
        self.found += 1
        largest = max(width, height)
        src = f"data:{media};base64,{base64.b64encode(data).decode('ascii')}"
        return Picture(src, "", width, height, largest <= SMALL, largest > LARGEST)

    def _path(self, place: int, row: Mapping[str, Any]) -> Path | None:
        """Return the path in the row; in older records, the only file of that prompt and seed."""
        named = row.get("image")
        if isinstance(named, str):
            return safe_join(self.workdir, named)
        for at in dict.fromkeys((0, place)):
            name = image_name(str(row.get("prompt")), row.get("seed", 0), at)
            found = sorted(self.workdir.glob(f"samples/*/{name}"))
            if len(found) == 1:
                return found[0]
        return None


@dataclass(frozen=True, slots=True)
class FileState:
    """A file that the record names, and whether it is still what it was."""

    name: str
    path: Path
    sha256: str
    state: str  # as recorded, missing, changed


def read_rows(path: Path, record: EvaluationRecord) -> tuple[list[dict[str, Any]], str]:
    """The rows of per_image.json, or none and the reason."""
    entry = record.files.get("per_image")
    if entry is None:
        return [], "The record names no per-image values."
    state = _file_state(path, "per_image", entry)
    if state.state != "as recorded":
        return [], f"The per-image values in {entry.path} are {state.state}."
    try:
        rows = read_json(state.path)
    except ModelopsError as error:
        return [], f"The per-image values cannot be used: {error.message}."
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return [], "The per-image values are not a list of rows."
    return rows, ""


def _file_state(path: Path, name: str, entry: InputRef) -> FileState:
    place = path.parent / entry.path
    if "\0" in entry.path or not place.is_file():
        return FileState(name, place, entry.sha256, "missing")
    same = sha256_file(place) == entry.sha256
    return FileState(name, place, entry.sha256, "as recorded" if same else "changed")
