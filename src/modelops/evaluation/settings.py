"""What an evaluation measures, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelops.errors import UsageError

SAFETY_FILTERS = ("open_nsfw", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Settings of `modelops.evaluation.evaluate.evaluate`.

    Attributes:
        manifest, splits: the pictures and their splits; without them no distance to real pictures
            is measured.
        split: the reference pictures, and the prompts when there is no prompts_file.
        train_split: what samples must not be copies of.
        prompts_file: UTF-8, one prompt a line, in place of the split's captions.
        n: number of images; None makes `replicates` of every prompt.
        replicates: images per prompt, when n is None.
        seed: of images, resampling and choices.
        steps, guidance, height, width: None takes the source's own.
        lit: directory of the alignment model; None leaves alignment out.
        inception_weights: path of clean-fid's TorchScript Inception; without it there is no FID.
        clip_weights, clip_model: an open_clip state dict and its architecture, for CLIPScore.
        safety: "open_nsfw" or "none".
        safety_threshold: score from which an image is unsafe.
        near_copy_cosine: similarity from which the nearest training picture counts as a copy.
        neighbours: k of precision, recall, density and coverage.
        resamples: bootstrap resamples behind each interval.
        jackknife_groups: groups a side behind the Fréchet intervals.
        max_failures: so many images may fail before the record is `failed`.
        grid: images in the unselected grid; best and worst show a quarter of them each.
    """

    manifest: Path | None = None
    splits: Path | None = None
    split: str = "test"
    train_split: str = "train"
    prompts_file: Path | None = None
    n: int | None = None
    replicates: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    lit: Path | None = None
    inception_weights: Path | None = None
    clip_weights: Path | None = None
    clip_model: str = "ViT-B-32-quickgelu"
    safety: str = "open_nsfw"
    safety_threshold: float = 0.5
    near_copy_cosine: float = 0.95
    neighbours: int = 5
    resamples: int = 2000
    jackknife_groups: int = 40
    max_failures: int = 0
    grid: int = 64

    def __post_init__(self) -> None:
        if (self.manifest is None) != (self.splits is None):
            raise UsageError("a manifest and its splits belong together", hint="give both")
        if self.manifest is None and self.prompts_file is None:
            raise UsageError(
                "nothing says which prompts to evaluate",
                hint="give --manifest and --splits, or --prompts",
            )
        if self.safety not in SAFETY_FILTERS:
            raise UsageError(f"safety {self.safety!r}: one of {', '.join(SAFETY_FILTERS)}")
        for name, low in (("n", 2), ("replicates", 1), ("steps", 1), ("height", 1), ("width", 1),
                          ("resamples", 20), ("neighbours", 1), ("jackknife_groups", 2),
                          ("max_failures", 0), ("grid", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} is {value}; it must be at least {low}")
