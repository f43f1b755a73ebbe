"""Image filters from Hugging Face-style directories: classifiers, and CompVis' concept checker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import UsageError
from modelops.base.files import read_json
from modelops.models.pretrained import (
    directory_digests,
    images_to_inputs,
    load_processor,
    load_whole,
    own_copy,
)
from modelops.safety.image import (
    Image,
    ImageVerdict,
    SafetyFilterError,
    checked_image,
    score_to_verdict,
)
from modelops.safety.probe import probe_images

UNSAFE_LABELS = frozenset(
    {"nsfw", "unsafe", "porn", "pornography", "hentai", "sexy", "sexual", "explicit", "nude",
     "nudity", "gore", "violence", "hate"}
)  # fmt: skip
_HARMLESS = frozenset({"normal", "sfw", "safe", "neutral", "benign"})
SAFE_LABELS = _HARMLESS | {"drawing", "drawings", "other"}
_BATCH = 16  # images at once


class TransformersFilter:
    """An image classifier of transformers, such as Falconsai/nsfw_image_detection.

    The score is the probability of all unsafe labels together; for a multi-label model it is the
    greatest of theirs.

    Args:
        directory: config.json, preprocessor_config.json and model.safetensors.
        threshold: a score at or above it is blocked.
        store: see `private_copy`.
        unsafe: the labels that are unsafe. Left out, each label must have a well-known name, such
            as "nsfw" and "normal".

    Raises:
        UsageError: the labels do not say which is unsafe.
        MissingWeightsError, IntegrityError: it cannot be loaded whole.
    """

    def __init__(
        self,
        directory: Path,
        *,
        threshold: float = 0.5,
        unsafe: Sequence[str] = (),
        store: Path | None = None,
    ) -> None:
        from transformers import AutoModelForImageClassification

        _check_threshold(threshold)
        self.threshold = threshold
        with own_copy(directory, store) as copy:
            self._files = directory_digests(copy.path)
            self._processor = load_processor(copy.path)
            self._model = load_whole(AutoModelForImageClassification, copy.path)
            if store is not None:
                copy.keep_for(self._model)
        config = self._model.config
        labels = [str(config.id2label[index]) for index in range(config.num_labels)]
        self.labels = tuple(labels)
        self.unsafe = unsafe_labels(labels, unsafe, where=str(directory))
        self._columns = [index for index, label in enumerate(labels) if label in self.unsafe]
        self._multi_label = config.problem_type == "multi_label_classification"
        self._architecture = type(self._model).__name__

    @property
    def info(self) -> dict[str, Any]:
        return {
            "filter": "transformers", "architecture": self._architecture, **self._files,
            "labels": list(self.labels), "unsafe_labels": list(self.unsafe),
            "score": "greatest sigmoid" if self._multi_label else "sum of softmax",
            "threshold": self.threshold, "preprocessing": type(self._processor).__name__,
        }  # fmt: skip

    def check(self, images: Sequence[Image]) -> list[ImageVerdict]:
        import torch

        verdicts = []
        for start in range(0, len(images), _BATCH):
            batch = [checked_image(image) for image in images[start : start + _BATCH]]
            try:
                with torch.inference_mode():
                    logits = self._model(**images_to_inputs(self._processor, batch)).logits.double()
                if self._multi_label:
                    scores = logits.sigmoid()[:, self._columns].amax(dim=1)
                else:
                    scores = logits.softmax(dim=1)[:, self._columns].sum(dim=1)
            except Exception as error:
                raise SafetyFilterError(
                    f"{self._architecture} failed: {type(error).__name__}: {error}"
                ) from error
            verdicts += [score_to_verdict(float(score), self.threshold) for score in scores]
        return verdicts


class DiffusersSafetyCheckerFilter:
    """The checker of Stable Diffusion: cosine to 17 concepts of CLIP, each with its own threshold.

    An image's margin is the greatest of its concepts' (cosine − threshold), raised by 0.01 if one
    of the three special concepts is met, and rounded to thousandths as in the original. The score
    is 0.5 + (1000 · margin − 1) / 200, in [0, 1]: at threshold 0.5 the verdicts are the original's,
    and a threshold 0.05 higher or lower moves every concept's by 0.01 (Rando et al., 2022, "Red-
    Teaming the Stable Diffusion Safety Filter").

    Args:
        directory: the checker with its preprocessor_config.json, or with a `feature_extractor`
            beside it, or the pipeline's directory that holds both.
        threshold: a score at or above it is blocked.

    Raises:
        MissingWeightsError, IntegrityError: it cannot be loaded whole.
    """

    def __init__(
        self, directory: Path, *, threshold: float = 0.5, store: Path | None = None
    ) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import (
            StableDiffusionSafetyChecker,
        )

        _check_threshold(threshold)
        self.threshold = threshold
        if (directory / "safety_checker").is_dir():
            directory = directory / "safety_checker"
        own = (directory / "preprocessor_config.json").is_file()
        extractor = directory if own else directory.parent / "feature_extractor"
        with own_copy(directory, store) as copy:
            extractor = copy.path if own else extractor
            self._files = directory_digests(copy.path, extractor)
            self._processor = load_processor(extractor)
            self._model = load_whole(StableDiffusionSafetyChecker, copy.path)
            if store is not None:
                copy.keep_for(self._model)

    @property
    def info(self) -> dict[str, Any]:
        return {
            "filter": "diffusers-safety-checker", **self._files,
            "concepts": len(self._model.concept_embeds),
            "special_concepts": len(self._model.special_care_embeds),
            "score": "0.5 + (1000 margin - 1) / 200", "threshold": self.threshold,
            "preprocessing": type(self._processor).__name__,
        }  # fmt: skip

    def check(self, images: Sequence[Image]) -> list[ImageVerdict]:
        verdicts = []
        for start in range(0, len(images), _BATCH):
            batch = [checked_image(image) for image in images[start : start + _BATCH]]
            try:
                steps = self._margins(batch)
            except Exception as error:
                raise SafetyFilterError(
                    f"the safety checker failed: {type(error).__name__}: {error}"
                ) from error
            scores = 0.5 + (steps - 1.0) / 200.0
            # Clipped, and NaN stays NaN: score_to_verdict refuses it.
            verdicts += [
                score_to_verdict(float(score), self.threshold) for score in np.clip(scores, 0, 1)
            ]
        return verdicts

    def probe(self) -> None:
        """Try the checker on images far from all concepts, of which all scores may be 0.

        Raises:
            SafetyFilterError: the margins are the same for all images, or no numbers.
        """
        margins = self._margins(probe_images())
        if not np.isfinite(margins).all() or np.ptp(margins) == 0:
            raise SafetyFilterError(
                f"has the margin {margins[0]:g} for each of {len(margins)} different images: its "
                "answers do not depend on the image"
            )

    def _margins(self, batch: Sequence[Image]) -> npt.NDArray[np.float64]:
        """Greatest margin of each image [n], in thousandths."""
        import torch
        from torch.nn.functional import normalize

        model = self._model
        with torch.inference_mode():
            pooled = model.vision_model(images_to_inputs(self._processor, batch)["pixel_values"])[1]
            embeds = normalize(model.visual_projection(pooled))
            special = embeds @ normalize(model.special_care_embeds).T
            concept = embeds @ normalize(model.concept_embeds).T
            special_margins = torch.round((special - model.special_care_embeds_weights) * 1000)
            # 0.01, once, as soon as one special concept is met; the original raises the later
            # special scores too, which cannot change whether any is met.
            raised = (special_margins > 0).any(dim=1, keepdim=True) * 0.01
            margins = concept - model.concept_embeds_weights + raised
            return np.asarray(torch.round(margins * 1000).amax(dim=1).double().numpy())


def unsafe_labels(labels: Sequence[str], chosen: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Return the unsafe labels of a classifier, in the classifier's order.

    Raises:
        UsageError: a chosen one is not there or names what is safe, none or all would be unsafe, or
            none was chosen and a name does not say whether it is safe.
    """
    if missing := [label for label in chosen if label not in labels]:
        raise UsageError(f"{where}: no label {missing[0]!r}", hint=f"it has {', '.join(labels)}")
    if safe := [label for label in chosen if label.strip().lower() in _HARMLESS]:
        raise UsageError(
            f"{where}: unsafe={safe[0]}: this label is for harmless images",
            hint=f"add ,unsafe=LABEL for each that is unsafe, of {', '.join(labels)}",
        )
    if not chosen:
        known = UNSAFE_LABELS | SAFE_LABELS
        if unknown := [label for label in labels if label.strip().lower() not in known]:
            raise UsageError(
                f"{where}: label {unknown[0]!r} does not say whether it is unsafe",
                hint=f"add ,unsafe=LABEL for each that is, of {', '.join(labels)}",
            )
        chosen = [label for label in labels if label.strip().lower() in UNSAFE_LABELS]
    if not 0 < len(set(chosen)) < len(labels):
        raise UsageError(
            f"{where}: {len(set(chosen))} of {len(labels)} labels unsafe",
            hint=f"add ,unsafe=LABEL for each that is, of {', '.join(labels)}",
        )
    return tuple(label for label in labels if label in chosen)


def check_labels(directory: Path, chosen: Sequence[str]) -> None:
    """Check the labels of a classifier's directory by its config.json; loads nothing.

    Raises:
        UsageError: see `unsafe_labels`.
    """
    config = directory / "config.json"
    found = read_json(config).get("id2label") if config.is_file() else None
    if isinstance(found, dict):
        unsafe_labels([str(label) for label in found.values()], chosen, where=str(directory))


def _check_threshold(threshold: float) -> None:
    if not 0.0 < threshold <= 1.0:
        raise SafetyFilterError(f"threshold {threshold} is not in (0, 1]")
