"""Settings of an evaluation: what it measures, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelops.base.errors import UsageError
from modelops.safety.registry import check_image_filter, check_prompt_filter

FID_MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
EXTRACTOR_DTYPES = ("float32", "float64")
STREAM_FROM = 10_000  # images


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Settings of `modelops.evaluation.evaluate.evaluate`.

    Attributes:
        manifest, splits: the images and their splits; without them no distance to real images
            is measured.
        reference: in place of a manifest, a folder of real images, or an .npz file with the mean
            and covariance of their Inception features.
        split: the reference images, and the prompts when there is no prompts_file.
        train_split: the training images, which samples must not copy.
        prompts_file: UTF-8, one prompt a line, in place of the split's captions.
        input_images: folder of images for a pipeline that changes images; see
            `prompts.plan_with_inputs`.
        n: number of images; None makes `replicates` of every prompt.
        replicates: images per prompt, when n is None.
        seed: seed of images, resampling and choices.
        steps, guidance, height, width: None takes the source's own.
        lit: directory of the alignment model; None leaves alignment out.
        inception_weights: a state dict of the FID Inception, or clean-fid's TorchScript archive;
            without it there is no FID, KID or Inception Score.
        fid_mode: how images come to Inception's size: "clean", "legacy_pytorch" or
            "legacy_tensorflow".
        extractor_dtype: "float64" runs Inception in double precision, for audits.
        extractor_device: of torch, where extractors of features run; not part of any protocol, for
            it changes features by rounding only.
        clip_weights, clip_model: an open_clip state dict and its architecture, for CLIPScore.
        dinov2_weights: a directory with DINOv2 as transformers saves it, for distances on it.
        safety: image filter by name (see `modelops.safety.registry`), or "none".
        safety_threshold: score from which an image is unsafe.
        serve_threshold: score from which an image would be withheld when served.
        prompt_filter: prompt filter by name, or "none".
        audit_safety: a second image filter, which judges what the first would let through.
        audit_threshold: its score from which an image is unsafe.
        blocklist: images that must not be made again, as a directory or a file of hashes.
        near_copy_cosine: similarity from which the nearest training image counts as a copy.
        known_copies: number of training images that are slightly changed to test whether the
            features recognise a copy; 0 leaves this control out.
        closest_pairs: pairs a side on the page of the closest training images.
        train_record: train.json of the run that made the source; found automatically beside a
            checkpoint that it names.
        neighbours: k of precision, recall, density and coverage.
        resamples: bootstrap resamples behind each interval.
        jackknife_groups: groups a side behind the Fréchet intervals.
        slice_by: "tags", "words" (about people, in the prompt) or manifest columns; prompts with
            each of their values are compared with the others.
        slice_min: independent groups of prompts that a slice and the rest need to be judged.
        stream: read features from files, chunk by chunk, so that memory does not grow with the
            number of images; None does so from `STREAM_FROM` images on.
        cache: keep features of the reference images beside their manifest, for the next
            evaluation against them, and use what is kept.
        max_failures: number of images that may fail before the record is `failed`.
        grid: images in the unselected grid; best and worst show a quarter of them each.
    """

    manifest: Path | None = None
    splits: Path | None = None
    reference: Path | None = None
    split: str = "test"
    train_split: str = "train"
    prompts_file: Path | None = None
    input_images: Path | None = None
    n: int | None = None
    replicates: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    lit: Path | None = None
    inception_weights: Path | None = None
    fid_mode: str = "clean"
    extractor_dtype: str = "float32"
    extractor_device: str = "cpu"
    clip_weights: Path | None = None
    clip_model: str = "ViT-B-32-quickgelu"
    dinov2_weights: Path | None = None
    safety: str = "open_nsfw"
    safety_threshold: float = 0.5
    serve_threshold: float = 0.5
    prompt_filter: str = "words"
    audit_safety: str | None = None
    audit_threshold: float = 0.5
    blocklist: Path | None = None
    near_copy_cosine: float = 0.95
    known_copies: int = 48
    closest_pairs: int = 12
    train_record: Path | None = None
    neighbours: int = 5
    resamples: int = 2000
    jackknife_groups: int = 40
    slice_by: tuple[str, ...] = ()
    slice_min: int = 10
    stream: bool | None = None
    cache: bool = True
    max_failures: int = 0
    grid: int = 64

    def __post_init__(self) -> None:
        if (self.manifest is None) != (self.splits is None):
            raise UsageError("a manifest and its splits belong together", hint="give both")
        if self.reference is not None and self.manifest is not None:
            raise UsageError(
                "a reference and a manifest: the real images come from one of them",
                hint="leave one out; with a reference, prompts come from --prompts",
            )
        if self.manifest is None and (self.split, self.train_split) != ("test", "train"):
            raise UsageError("a split without a manifest has no effect", hint="give the manifest")
        if self.input_images is not None and self.prompts_file is None:
            raise UsageError(
                "input images without a file of prompts",
                hint="give --prompts: one line for each image, or one for all of them",
            )
        if self.has_statistics and self.inception_weights is None:
            raise UsageError(
                f"{self.reference}: statistics of Inception features, and no Inception weights",
                hint="give --inception-weights",
            )
        self._check_safety()
        for name, allowed in (("fid_mode", FID_MODES), ("extractor_dtype", EXTRACTOR_DTYPES)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} {getattr(self, name)!r}: one of {', '.join(allowed)}")
        for name, low in (("n", 2), ("replicates", 1), ("steps", 1), ("height", 1), ("width", 1),
                          ("resamples", 20), ("neighbours", 1), ("jackknife_groups", 2),
                          ("max_failures", 0), ("grid", 1), ("known_copies", 0),
                          ("closest_pairs", 1), ("slice_min", 2)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} is {value}; it must be at least {low}")

    @property
    def has_statistics(self) -> bool:
        """Whether the reference is a file of statistics, not images."""
        return self.reference is not None and self.reference.suffix.lower() == ".npz"

    def _check_safety(self) -> None:
        """Check that filters are known and their files are there, before any image is made."""
        if self.safety != "none":
            check_image_filter(self.safety)
        if self.prompt_filter != "none":
            check_prompt_filter(self.prompt_filter)
        if self.audit_safety is not None:
            check_image_filter(self.audit_safety)
            if self.audit_safety == self.safety:
                raise UsageError(
                    f"{self.safety!r} cannot audit itself", hint="name another filter to audit with"
                )
        if self.blocklist is not None:
            check_image_filter(f"blocklist:{self.blocklist}")
        for name in ("safety_threshold", "serve_threshold", "audit_threshold"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in (0, 1]")
