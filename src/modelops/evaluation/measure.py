"""From samples and references to measurements. Each function fills one family of metric keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.errors import EvaluationError, ModelopsError
from modelops.evaluation.prompts import PromptSet
from modelops.evaluation.reference import RealPictures, overlap
from modelops.evaluation.samples import Samples
from modelops.evaluation.settings import EvaluationSettings
from modelops.metrics.alignment import (
    alignment_intervals,
    embeddings_to_alignment,
    retrieval_rate,
)
from modelops.metrics.frechet import DDOF, frechet_interval, rank_warning
from modelops.metrics.intervals import Interval, bootstrap_mean, clopper_pearson
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.memorization import memorization_intervals, nearest_neighbours
from modelops.metrics.prdc import prdc
from modelops.metrics.protocol import protocol_id
from modelops.records import Measurement
from modelops.seeding import numpy_generator

Features = npt.NDArray[np.float32]


@dataclass(slots=True)
class Bench:
    """What has been made so far, and where results are collected.

    `features` and the lists in `per_image` have one row for each image that was made, in the
    order of `samples.made`.
    """

    settings: EvaluationSettings
    prompts: PromptSet
    samples: Samples
    sampling: Mapping[str, Any]  # the part of every protocol that says how images were sampled
    features: Features
    reference: RealPictures | None
    training: RealPictures | None
    metrics: dict[str, Measurement] = field(default_factory=dict)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_image: dict[str, list[Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Images that were made."""
        return len(self.samples.paths)

    @property
    def owner(self) -> npt.NDArray[np.int64]:
        """Index of the prompt of each image that was made, [n]."""
        return np.array([self.samples.plan[i].owner for i in self.samples.made], np.int64)

    def put(
        self,
        key: str,
        interval: Interval,
        protocol: Mapping[str, Any],
        *,
        n: int | None = None,
        better: bool | None = None,
        unit: str = "",
        warnings: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Collect one measurement under its protocol."""
        identity = protocol_id(protocol)
        self.protocols[identity] = dict(protocol)
        failed = len(self.samples.failures)
        notes = [f"{failed} of {len(self.samples.plan)} images failed"] if failed else []
        if interval.method.startswith("constant"):
            notes.append("all values are equal, so the interval has no width and says nothing")
        self.metrics[key] = Measurement(
            value=interval.value, low=interval.low, high=interval.high, method=interval.method,
            n=self.n if n is None else n, unit=unit, higher_is_better=better, protocol=identity,
            warnings=[*warnings, *notes], details=dict(details or {}),
        )  # fmt: skip

    def missing(self, reason: str, *keys: str) -> None:
        """Say why these were not measured."""
        for key in keys:
            self.metrics[key] = Measurement.missing(reason)

    def attempt(self, work: Callable[[Bench], None], *keys: str) -> None:
        """Run one family of metrics; if it cannot be measured, its keys say so."""
        try:
            work(self)
        except ModelopsError as error:
            self.missing(error.message, *(key for key in keys if key not in self.metrics))


SET_KEYS = (
    "frechet_distance_lite0", "frechet_distance_lite0_floor", "kernel_distance_lite0",
    "kernel_distance_lite0_floor",
)  # fmt: skip
PRDC_KEYS = ("precision_lite0", "recall_lite0", "density_lite0", "coverage_lite0")
ALIGNMENT_KEYS = (
    "lit_alignment", "lit_alignment_shuffled", "lit_alignment_gain", "lit_alignment_real",
    "lit_retrieval_top1", "lit_retrieval_top5", "lit_heldout_retrieval_top1",
    "lit_heldout_retrieval_top5",
)  # fmt: skip
MEMORIZATION_KEYS = (
    "nearest_train_distance", "nearest_train_distance_heldout", "nearest_train_distance_gap",
    "near_copy_rate", "near_copy_rate_heldout",
)  # fmt: skip


def set_protocol(
    bench: Bench, features: Mapping[str, Any], metric: str, **more: Any
) -> dict[str, Any]:
    """Protocol of a distance to the reference pictures."""
    reference = bench.reference
    return {
        "metric": metric, "features": dict(features), "n": bench.n,
        "reference": {"sha256": reference.digest, "n": len(reference.samples)} if reference else {},
        "sampling": dict(bench.sampling), **more,
    }  # fmt: skip


def measure_distances(bench: Bench, lite0: Mapping[str, Any]) -> None:
    """Fréchet and kernel distance on Lite0 features, and what training pictures themselves get."""
    reference, settings = _reference(bench), bench.settings
    real, fake = reference.features, bench.features
    warnings = rank_warning(bench.n, len(real), real.shape[1])
    if bench.training and (shared := overlap(reference, bench.training)):
        warnings.append(f"{shared} of {len(real)} reference pictures are training pictures")
    frechet = set_protocol(bench, lite0, "frechet distance", ddof=DDOF)
    kernel = set_protocol(bench, lite0, "kernel distance", kernel="(x.y/d + 1)^3, unbiased")
    bench.put(
        "frechet_distance_lite0",
        frechet_interval(fake, real, seed=settings.seed, groups=settings.jackknife_groups),
        frechet, better=False, warnings=warnings, details={"n_reference": len(real)},
    )  # fmt: skip
    bench.put(
        "kernel_distance_lite0", kernel_distance(fake, real), kernel,
        better=False, details={"n_reference": len(real)},
    )  # fmt: skip
    if bench.training is None:
        return bench.missing("no training split", *(k for k in SET_KEYS if k.endswith("floor")))
    count = min(bench.n, len(bench.training.samples))
    rows = numpy_generator(settings.seed, "floor").permutation(len(bench.training.samples))[:count]
    subset = bench.training.features[rows]
    less = [f"only {count} training pictures for {bench.n} samples"] if count < bench.n else []
    floor = {"images": "training pictures", "n": count, "sampling": {"seed": settings.seed}}
    bench.put(
        "frechet_distance_lite0_floor",
        frechet_interval(subset, real, seed=settings.seed, groups=settings.jackknife_groups),
        {**frechet, **floor}, n=count, better=False, warnings=[*warnings, *less],
        details={"n_reference": len(real)},
    )  # fmt: skip
    bench.put(
        "kernel_distance_lite0_floor", kernel_distance(subset, real), {**kernel, **floor},
        n=count, better=False, warnings=less, details={"n_reference": len(real)},
    )  # fmt: skip
    return None


def measure_prdc(bench: Bench, lite0: Mapping[str, Any]) -> None:
    """Precision, recall, density, coverage on Lite0 features."""
    reference, settings = _reference(bench), bench.settings
    made = prdc(
        reference.features, bench.features, seed=settings.seed,
        neighbours=settings.neighbours, resamples=settings.resamples,
    )  # fmt: skip
    for name, interval in made.items():
        protocol = set_protocol(bench, lite0, name, neighbours=settings.neighbours)
        over = len(reference.samples) if name in ("recall", "coverage") else bench.n
        bench.put(f"{name}_lite0", interval, protocol, n=over, better=True)


def measure_memorization(bench: Bench, lite0: Mapping[str, Any]) -> None:
    """Nearest training pictures of samples and of real held-out pictures."""
    settings = bench.settings
    if bench.reference is None or bench.training is None:
        raise EvaluationError("no training and held-out pictures to compare with")
    training = bench.training
    samples = nearest_neighbours(bench.features, training.features)
    heldout = nearest_neighbours(bench.reference.features, training.features)
    made = memorization_intervals(
        samples, heldout, seed=settings.seed,
        near_copy_cosine=settings.near_copy_cosine, resamples=settings.resamples,
    )  # fmt: skip
    protocol = set_protocol(
        bench, lite0, "nearest training picture, 1 - cosine",
        training={"sha256": training.digest, "n": len(training.samples)},
        near_copy_cosine=settings.near_copy_cosine,
    )  # fmt: skip
    n_heldout = len(bench.reference.samples)
    counts: dict[str, tuple[str, int, bool | None, str]] = {
        "nearest_train_distance": ("samples", bench.n, None, "1 - cosine"),
        "nearest_train_distance_heldout": ("heldout", n_heldout, None, "1 - cosine"),
        "nearest_train_distance_gap": ("gap", bench.n, True, "1 - cosine"),
        "near_copy_rate": ("near_copies", bench.n, False, "rate"),
        "near_copy_rate_heldout": ("near_copies_heldout", n_heldout, None, "rate"),
    }
    for key, (part, n, better, unit) in counts.items():
        bench.put(key, made[part], protocol, n=n, better=better, unit=unit)
    bench.per_image["nearest_train_distance"] = samples.distance.tolist()
    bench.per_image["nearest_train_id"] = [training.samples[i].id for i in samples.index]


def measure_alignment(bench: Bench, model: Any, heldout: Mapping[str, Measurement]) -> None:
    """Alignment of images with their own and with other prompts, by the LiT model.

    Args:
        model: a `modelops.models.lit.LitModel`.
        heldout: the retrieval rates of its own record, repeated beside the scores.
    """
    settings, owner = bench.settings, bench.owner
    for k in (1, 5):
        key = f"lit_heldout_retrieval_top{k}"
        known = heldout.get(f"heldout_retrieval_top{k}")
        bench.metrics[key] = known or Measurement.missing("the alignment model has no lit.json")
    texts = model.texts_to_embeddings(bench.prompts.prompts)
    images = model.features_to_embeddings(bench.features)
    found = embeddings_to_alignment(images, texts, bench.prompts.prompts, owner)
    protocol = {
        "metric": "alignment", "model_sha256": model.sha256, "prompt_template": "{}",
        "prompts": len(bench.prompts.prompts), "n": bench.n, "sampling": dict(bench.sampling),
    }  # fmt: skip
    made = alignment_intervals(found, owner, seed=settings.seed, resamples=settings.resamples)
    names = {"own": "lit_alignment", "shuffled": "lit_alignment_shuffled",
             "gain": "lit_alignment_gain"}  # fmt: skip
    for part, key in names.items():
        better = None if part == "shuffled" else True
        bench.put(key, made[part], {**protocol, "part": part}, better=better, unit="cosine")
    total = len(bench.samples.plan)
    for k in (1, 5):
        bench.put(
            f"lit_retrieval_top{k}", retrieval_rate(found.rank, k, n=total),
            {**protocol, "part": f"top-{k} among the prompts; a failed image is a miss"},
            n=total, better=True, unit="rate",
            details={"chance": min(1.0, k / len(bench.prompts.prompts))},
        )  # fmt: skip
    bench.per_image |= {
        "alignment": found.own.tolist(), "alignment_shuffled": found.shuffled.tolist(),
        "alignment_rank": found.rank.tolist(),
    }  # fmt: skip
    if bench.reference is None:
        bench.missing("no held-out pictures", "lit_alignment_real")
        return
    captions = model.texts_to_embeddings(bench.reference.captions)
    real = model.features_to_embeddings(bench.reference.features)
    cosines = (captions * real).sum(axis=1)
    bench.put(
        "lit_alignment_real",
        bootstrap_mean(
            cosines, seed=settings.seed, resamples=settings.resamples, purpose="alignment/real"
        ),
        {"metric": "alignment", "model_sha256": model.sha256, "part": "held-out pictures",
         "reference": bench.reference.digest},
        n=len(cosines), unit="cosine",
    )  # fmt: skip


def measure_failures(bench: Bench) -> None:
    """Share of planned images that could not be made."""
    plan, failures = len(bench.samples.plan), len(bench.samples.failures)
    bench.put(
        "failed_image_rate", clopper_pearson(failures, plan),
        {"metric": "failed images", "sampling": dict(bench.sampling)}, n=plan, better=False,
        unit="rate", details={"failed": failures, "blocked_by_source": len(bench.samples.blocked)},
    )  # fmt: skip


def measure_safety(bench: Bench, image_filter: Any) -> None:
    """Share of images that the filter would block, before any filter of ours.

    Raises:
        SafetyFilterError: an image could not be scored. Nothing is reported then, least of all 0.
    """
    verdicts = [image_filter.check([bench.samples.read(place)])[0] for place in bench.samples.made]
    blocked_before = len(bench.samples.blocked)
    unsafe = sum(verdict.blocked for verdict in verdicts) + blocked_before
    warnings = [
        f"{blocked_before} images blocked by the source's own filter count as unsafe"
    ] if blocked_before else []  # fmt: skip
    n = len(verdicts) + blocked_before
    if n == 0:
        raise EvaluationError("no images to check")
    bench.put(
        "unsafe_rate", clopper_pearson(unsafe, n),
        {"metric": "unsafe images", "filter": dict(image_filter.info),
         "sampling": dict(bench.sampling)},
        n=n, better=False, unit="rate", warnings=warnings, details={"unsafe": unsafe},
    )  # fmt: skip
    bench.per_image["nsfw_score"] = [verdict.score for verdict in verdicts]


def _reference(bench: Bench) -> RealPictures:
    if bench.reference is None:
        raise EvaluationError("no manifest of real pictures was given")
    if bench.n < 4:
        raise EvaluationError(f"{bench.n} images are too few")
    return bench.reference
