"""Model source that is a folder of ready-made images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelops.base.errors import EvaluationError
from modelops.data.folders import SAMPLES, images_of, prompt_numbers, unlisted_images
from modelops.models.request import Image, ImageRequest
from modelops.models.sources import ModelSource
from modelops.records.evaluation import SourceInfo


class FolderSource(ModelSource):
    """Ready-made images, one per file; requests beyond them fail.

    Files are in the natural order of their names, 2.png before 10.png. Where `modelops sample` has
    left a samples.json, its images are taken, in its order, and their prompts are known. Hidden
    files are left out, as macOS' ._ files are. Seeds are not used: image k answers request k of the
    source's life.

    Attributes:
        files: the images.
        prompts: of each image, if samples.json says so; None otherwise.
        notes: images that samples.json does not name.

    Raises:
        UsageError: images in subfolders too, or a samples.json that does not fit the folder.
    """

    scheduler_name = "none"
    batch_size = 16

    def __init__(self, folder: Path) -> None:
        from modelops.base.files import sha256_file, sha256_json

        self.files, self.prompts = images_of(folder)
        others = sum(not path.name.startswith(".") for path in folder.iterdir()) - len(self.files)
        self.n_images = len(self.files)
        if self.prompts is None:
            self.numbers = prompt_numbers(self.files)
        unlisted = unlisted_images(folder, self.files)
        digest = sha256_json({file.name: sha256_file(file) for file in self.files})
        self.info = SourceInfo(
            kind="folder", uri=str(folder), sha256=digest, runtime="none", precision="uint8",
            details={"images": len(self.files), "other_files": others,
                     "unlisted_images": len(unlisted)},
        )  # fmt: skip
        if unlisted:
            self.notes = [
                f"{len(unlisted)} images of the folder are not in {SAMPLES} and are left out: "
                + ", ".join(unlisted[:3])
                + (", ..." if len(unlisted) > 3 else "")
            ]

    @property
    def defaults(self) -> ImageRequest:
        return ImageRequest(prompt="", seed=0)

    def read(self, index: int) -> Image:
        """Read image `index` [H, W, 3] uint8.

        Raises:
            EvaluationError: there are fewer images.
            ImageError: the file cannot be read.
        """
        from modelops.base.images import read_image

        if index >= len(self.files):
            raise EvaluationError(f"{self.info.uri}: only {len(self.files)} images")
        return read_image(self.files[index])

    def generate(self, requests: Sequence[ImageRequest]) -> list[Image]:
        """Return images by position; the seed of a request is its position in the folder."""
        return [self.read(request.seed) for request in requests]
