"""Model source that is a folder of ready-made images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelops.base.errors import EvaluationError, UsageError
from modelops.base.files import read_json, safe_join
from modelops.models.request import Image, ImageRequest
from modelops.models.sources import ModelSource
from modelops.records.evaluation import SourceInfo

SAMPLES = "samples.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FolderSource(ModelSource):
    """Ready-made images, one per file; requests beyond them fail.

    Files are in the natural order of their names, 2.png before 10.png. Where `modelops sample` has
    left a samples.json, its images are taken, in its order, and their prompts are known. Hidden
    files are left out, as macOS' ._ files are. Seeds are not used: image k answers request k of the
    source's life.

    Attributes:
        files: the images.
        prompts: of each image, if samples.json says so; None otherwise.

    Raises:
        UsageError: images in subfolders too, or a samples.json that does not fit the folder.
    """

    scheduler_name = "none"
    batch_size = 16

    def __init__(self, folder: Path) -> None:
        from modelops.base.files import sha256_file, sha256_json

        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
        deeper = [path for path in found if path.is_dir() and any(map(is_image, path.rglob("*")))]
        if deeper:
            raise UsageError(
                f"{folder}: images in the folder and in {deeper[0].name}/ below it",
                hint="name the one folder whose images are to be measured",
            )
        self.files = sorted(
            filter(is_image, found), key=lambda path: (natural_key(path.name), path.name)
        )
        self.prompts: list[str] | None = None
        if (folder / SAMPLES).is_file():
            self.files, self.prompts = _read_samples(folder)
        self.n_images = len(self.files)
        digest = sha256_json({file.name: sha256_file(file) for file in self.files})
        self.info = SourceInfo(
            kind="folder", uri=str(folder), sha256=digest, runtime="none", precision="uint8",
            details={"images": len(self.files), "other_files": len(found) - len(self.files)},
        )  # fmt: skip

    @property
    def defaults(self) -> ImageRequest:
        return ImageRequest(prompt="", seed=0)

    def read(self, index: int) -> Image:
        """Read image `index` [H, W, 3] uint8.

        Raises:
            EvaluationError: there are fewer images.
            ImageError: the file cannot be read.
        """
        from modelops.data.images import read_image

        if index >= len(self.files):
            raise EvaluationError(f"{self.info.uri}: only {len(self.files)} images")
        return read_image(self.files[index])

    def generate(self, requests: Sequence[ImageRequest]) -> list[Image]:
        """Return images by position; the seed of a request is its position in the folder."""
        return [self.read(request.seed) for request in requests]


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
        made = [(str(item["file"]), str(item["prompt"])) for item in listed if item["file"]]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not what `modelops sample` writes",
            hint="move it away, and the images are taken in the order of their names",
        ) from error
    files = [safe_join(folder, name) for name, _ in made]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{path}: names {file.name}, which is not there")
    return files, [prompt for _, prompt in made]
