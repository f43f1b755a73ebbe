"""Folders of images: their files in the order in which people count, and what they are of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelops.base.errors import UsageError
from modelops.base.files import read_json, safe_join, sha256_file

SAMPLES = "samples.json"
GRID = "grid.png"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def images_of(folder: Path) -> tuple[list[Path], list[str] | None]:
    """Return a folder's image files in their order, and their prompts where samples.json has them.

    Raises:
        UsageError: images in subfolders too, or a samples.json that does not fit the folder: it
            names an image twice, one that is not there, or one whose sha256 differs.
    """
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    deeper = [path for path in found if path.is_dir() and any(map(is_image, path.rglob("*")))]
    if deeper:
        raise UsageError(
            f"{folder}: images in the folder and in {deeper[0].name}/ below it",
            hint="name the one folder whose images are to be measured",
        )
    if (folder / SAMPLES).is_file():
        return _read_samples(folder)
    files = sorted(filter(is_image, found), key=lambda path: (natural_key(path.name), path.name))
    return files, None


def unlisted_images(folder: Path, files: Sequence[Path]) -> list[str]:
    """Return the names of a folder's images that are not in `files`, but for `sample`'s grid."""
    found = {path.name for path in folder.iterdir() if is_image(path)}
    return sorted(found - {file.name for file in files} - {GRID}, key=natural_key)


def prompt_numbers(files: Sequence[Path]) -> list[int] | None:
    """Return the number of each file's prompt, from names as `modelops sample -n` gives them
    (0003-1.png is image 1 of prompt 3); None if any is named otherwise."""
    found = [re.fullmatch(r"([0-9]{1,9})-[0-9]{1,9}", path.stem) for path in files]
    return [int(each[1]) for each in found if each] if files and all(found) else None


def is_image(path: Path) -> bool:
    """Return whether a path is a file with the suffix of an image, and not hidden."""
    named = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return named and path.is_file()


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names as people count: "2.png" before "10.png"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


def _read_samples(folder: Path) -> tuple[list[Path], list[str]]:
    """Images and prompts in the order in which `modelops sample` made them."""
    path = folder / SAMPLES
    try:
        listed: list[dict[str, Any]] = read_json(path)["images"]
        made = [
            (str(item["file"]), str(item["prompt"]), item.get("sha256"))
            for item in listed
            if item["file"]
        ]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not what `modelops sample` writes",
            hint="move it away, and the images are taken in the order of their names",
        ) from error
    files: dict[Path, str] = {}
    for name, prompt, digest in made:
        file = safe_join(folder, name)
        if file in files:
            raise UsageError(f"{path}: names {name} twice", hint="make the samples anew")
        if not file.is_file():
            raise UsageError(f"{path}: names {name}, which is not there")
        if digest is not None and sha256_file(file) != digest:
            raise UsageError(
                f"{path}: {name} is another image than the one it names: the sha256 differs",
                hint="make the samples anew; or move samples.json away and give --prompts",
            )
        files[file] = prompt
    return list(files), list(files.values())
