"""Early checks: are a few samples closer to training images than new images are, and does the
held-out loss still follow the training loss? By the same code as the evaluation's verdict.

They run between two steps, in the process and thread of the training, because a second thread would
bring its own OpenMP workers. They change nothing that a step depends on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelops.base.errors import ModelopsError
from modelops.base.pixels import pixels_sha256
from modelops.metrics.features import Lite0Extractor, cached_features
from modelops.metrics.memorization import (
    CopyingVerdict,
    judge_copying,
    memorization_intervals,
    nearest_neighbours,
    own_neighbour_distances,
)
from modelops.metrics.overfitting import Overfitting, find_overfitting, rows_to_losses
from modelops.training.config import TrainConfig

from .grids import prompts_to_images
from .pictures import Pictures, PictureSet
from .stats import event, warn

PROMPTS = 8  # training captions, and as many held-out ones
TRAIN_PICTURES, HELDOUT_PICTURES = 128, 64  # at most, to compare with; the prompts' own are in them
STEPS = 12  # sampler steps at most
SHARE = 0.03  # of the training time, when the config does not say how often
LOADING_S, PICTURE_S = 5.0, 0.05  # guesses of what the first check costs
RESAMPLES = 200


class EarlyChecks:
    """Samples from fixed training and held-out captions against their nearest training images.

    Args:
        images: with a validation split.
        pipeline: of the averaged weights.
        cache: folder for the features of the images.
    """

    def __init__(self, pictures: Pictures, config: TrainConfig, pipeline: Any, cache: Path) -> None:
        assert pictures.validation is not None
        self.training = pictures.train.subset(spread(len(pictures.train), TRAIN_PICTURES))
        self.heldout = pictures.validation.subset(
            spread(len(pictures.validation), HELDOUT_PICTURES)
        )
        self.config = config
        self.pipeline = pipeline
        self.cache = cache
        self.prompts = [_captions(part) for part in (self.training, self.heldout)]
        self.steps = min(STEPS, config.training.sample_steps)
        self.spent = 0.0
        self.last: float | None = None  # seconds of the last check
        self.broken = False
        self._extractor: Lite0Extractor | None = None

    def due(self, step: int, *, validated: bool, training_seconds: float, images: int) -> bool:
        """Return whether a check belongs here.

        Args:
            validated: whether the losses were just measured.
            training_seconds, images: so far, from which the cost of a first check is guessed.
        """
        every = self.config.training.early_check_every_steps
        if self.broken or step < 1:
            return False
        if every is not None:
            return step % every == 0
        expected = self.expected(training_seconds / max(1, images))
        return validated and self.spent + expected <= SHARE * training_seconds

    def expected(self, per_image: float) -> float:
        """Seconds of the next check.

        Args:
            per_image: seconds of training on one image, from which those of a first are guessed.
        """
        if self.last is not None:
            return self.last
        made = sum(map(len, self.prompts))
        passes = 2 / 3 * self.steps * made  # guided, forward only, in trained images
        pictures = made + len(self.training) + len(self.heldout)
        return LOADING_S + passes * per_image + PICTURE_S * pictures

    def reserve(self, limit: float, per_image: float) -> float:
        """Return the seconds that these checks may still take in a run of `limit` seconds."""
        if self.broken or self.config.training.early_check_every_steps is not None:
            return 0.0
        left = SHARE * limit - self.spent
        return left if left >= self.expected(per_image) else 0.0

    def measure(self) -> tuple[dict[str, float], CopyingVerdict | None]:
        """(numbers for stats.jsonl, verdict); neither, and a line why, if it cannot be done."""
        clock = time.monotonic()
        try:
            with torch.random.fork_rng(devices=[]):  # loading a network draws random weights
                return self._measure()
        except ModelopsError as error:
            self.broken = True
            line = f"no early checks of samples: {error}"
            if self.config.training.early_check_every_steps is None:
                event("note", text=line)
            else:
                warn(line)
            return {}, None
        finally:
            seconds = time.monotonic() - clock
            self.spent += seconds
            self.last = seconds

    def _measure(self) -> tuple[dict[str, float], CopyingVerdict]:
        extractor = self._extractor = self._extractor or Lite0Extractor()
        training, heldout = (self._features(part) for part in (self.training, self.heldout))
        seed = self.config.training.seed
        images = prompts_to_images(
            self.pipeline, [text for part in self.prompts for text in part], seed, steps=self.steps
        )
        near = nearest_neighbours(extractor.images_to_features(images), training)
        real = nearest_neighbours(heldout, training)
        made = memorization_intervals(near, real, seed=seed, resamples=RESAMPLES)
        own = own_neighbour_distances(training, np.concatenate([near.index, real.index]))
        verdict = judge_copying(
            near, real, own_samples=own[: len(near)], own_heldout=own[len(near) :]
        )
        seen = np.arange(len(near)) < len(self.prompts[0])
        return {
            "early_nearest_train_distance": made["samples"].value,
            "early_nearest_train_distance_heldout": made["heldout"].value,
            "early_nearest_train_gap": made["gap"].value,
            "early_near_copy_rate": made["near_copies"].value,
            "early_seen_prompt_gap": float(
                np.median(near.distance[seen]) - np.median(near.distance[~seen])
            ),
        }, verdict

    def _features(self, part: PictureSet) -> Any:
        assert self._extractor is not None
        images = part.images(np.arange(len(part)))
        return cached_features(
            self._extractor,
            [pixels_sha256(image) for image in images],
            images.__getitem__,
            self.cache,
        )


def make_early_checks(
    pictures: Pictures, config: TrainConfig, pipeline: Any, run_dir: Path
) -> EarlyChecks | None:
    """The checks of a run, or None if the config turns them off or nothing is held out."""
    every = config.training.early_check_every_steps
    validation = pictures.validation
    if every == 0:
        return None
    if validation is None or len(validation) < 2 or len(pictures.train) < 2:
        if every:
            warn("no early checks of samples: there are no held-out images to compare with")
        return None
    return EarlyChecks(pictures, config, pipeline, run_dir / ".cache")


def new_overfitting(rows: Sequence[Mapping[str, Any]]) -> Overfitting | None:
    """Return overfitting that the last check of these rows of stats.jsonl shows and the one before
    did not, to report it once. It depends on the rows only, so a resumed run reports the same."""
    losses = rows_to_losses(rows)
    now, before = find_overfitting(losses), find_overfitting(losses[:-1])
    return now if now and (before is None or before.kind != now.kind) else None


def say_overfitting(step: int, found: Overfitting) -> None:
    """Warn a person, and tell the launching process."""
    event("overfitting", step=step, kind=found.kind, since=found.since.step)
    warn(f"step {step}: {found}")


def say_copies(step: int, verdict: CopyingVerdict) -> None:
    """Warn a person, and tell the launching process."""
    event("copies", step=step)
    warn(f"step {step}: copies of training images: {verdict.reason}")


def spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices, evenly over `count`."""
    if count <= limit:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def _captions(part: PictureSet) -> list[str]:
    different = list(dict.fromkeys(part.captions))
    return [different[index] for index in spread(len(different), PROMPTS)]
