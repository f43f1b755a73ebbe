"""Samples of a source, kept on disk: a killed evaluation goes on, a second one is free."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.data.images import encode_png, read_image
from modelops.errors import ImageError, ModelopsError
from modelops.evaluation.prompts import PlannedImage
from modelops.evaluation.sources import ImageBlockedError
from modelops.files import sha256_json, write_bytes
from modelops.models.sources import ImageRequest, ModelSource

Image = npt.NDArray[np.uint8]
COMPLETE = "complete"


@dataclass(slots=True)
class Samples:
    """The images of a plan.

    Attributes:
        plan: what was asked for.
        paths: PNG of each planned image that was made, by its place in the plan.
        failures: reason for each that was not.
        blocked: places that the source's own filter refused; they are failures too.
    """

    plan: Sequence[PlannedImage]
    paths: dict[int, Path] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    blocked: set[int] = field(default_factory=set)

    @property
    def made(self) -> list[int]:
        """Places of the images that were made, in order."""
        return sorted(self.paths)

    def read(self, place: int) -> Image:
        """One image, uint8 [H, W, 3]."""
        return read_image(self.paths[place])


def draw_samples(
    source: ModelSource,
    plan: Sequence[PlannedImage],
    request: ImageRequest,
    directory: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Make the images that are not in the cache yet.

    Args:
        request: steps, guidance and size of every image.
        directory: the cache; images lie in a folder named by source and sampling. A source without
            a digest (a service that does not name its release) may have changed since, so its
            images only serve to finish an evaluation that was cut short.
    """
    cache = directory / _sampling_key(source, request)
    if source.info.sha256 is None and (cache / COMPLETE).exists():
        shutil.rmtree(cache)
    samples = Samples(plan)
    is_folder = source.info.kind == "folder"
    pending = []
    for place, planned in enumerate(plan):
        path = cache / f"{sha256_json([planned.prompt, planned.seed, place * is_folder])[:32]}.png"
        if _usable(path):
            samples.paths[place] = path
        else:
            pending.append((place, planned, path))
    if on_progress:
        on_progress(len(samples.paths), len(plan))

    chunk = max(1, int(getattr(source, "batch_size", 4)))
    for start in range(0, len(pending), chunk):
        part = pending[start : start + chunk]
        requests = [
            ImageRequest(
                prompt=planned.prompt, seed=place if is_folder else planned.seed,
                steps=request.steps, guidance=request.guidance,
                height=request.height, width=request.width,
            )
            for place, planned, _ in part
        ]  # fmt: skip
        for (place, _, path), made in zip(part, generate_each(source, requests), strict=True):
            if isinstance(made, ModelopsError):
                samples.failures[place] = made.message
                if isinstance(made, ImageBlockedError):
                    samples.blocked.add(place)
            else:
                write_bytes(path, encode_png(made))
                samples.paths[place] = path
        if on_progress:
            on_progress(len(samples.paths) + len(samples.failures), len(plan))
    write_bytes(cache / COMPLETE, b"")
    return samples


def generate_each(
    source: ModelSource, requests: Sequence[ImageRequest]
) -> list[Image | ModelopsError]:
    """An image or the reason why not for each request; one bad image does not spoil its batch."""
    if len(requests) > 1:
        try:
            return [_checked(image) for image in source.generate(requests)]
        except ModelopsError:
            pass  # find out below which of them it was
    results: list[Image | ModelopsError] = []
    for request in requests:
        try:
            results.append(_checked(source.generate([request])[0]))
        except ModelopsError as error:
            results.append(error)
    return results


def _checked(image: Image) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ImageError(f"the source gave an array of shape {image.shape}, {image.dtype}")
    return image


def _usable(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_image(path)
    except ImageError:
        return False
    return True


def _sampling_key(source: ModelSource, request: ImageRequest) -> str:
    info = source.info
    identity: dict[str, Any] = {
        "source": info.sha256 or info.uri, "kind": info.kind, "runtime": info.runtime,
        "precision": info.precision, "scheduler": source.scheduler_name, "steps": request.steps,
        "guidance": request.guidance, "height": request.height, "width": request.width,
    }  # fmt: skip
    return sha256_json(identity)[:16]
