"""Images, features and results of one evaluation while it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.files import sha256_file, sha256_json
from modelops.evaluation.prompts import PromptSet
from modelops.evaluation.reference import RealPictures, shared_pictures
from modelops.evaluation.samples import Samples
from modelops.evaluation.settings import STREAM_FROM, EvaluationSettings
from modelops.evaluation.workers.reading import (
    check_images,
    extractor_opening,
    join_features,
    join_verdicts,
    open_reader,
    read_divided,
    real_features_by_workers,
    stack_features,
)
from modelops.evaluation.workers.tasks import Workers
from modelops.metrics.feature_files import (
    map_features,
    row_chunks,
    write_features,
)
from modelops.metrics.features import Extractor, Lite0Extractor, cached_features, features_key
from modelops.metrics.frechet import Statistics, frechet_interval
from modelops.metrics.intervals import Interval
from modelops.metrics.known import KnownStatistics
from modelops.metrics.protocol import protocol_id
from modelops.metrics.streaming import cached_statistics, streamed_frechet_interval
from modelops.records.base import Measurement
from modelops.records.evaluation import EvaluationRecord
from modelops.safety.image import ImageFilter, ImageVerdict

Image = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


@dataclass(slots=True)
class Workbench:
    """State of one evaluation: what has been made so far, and the results.

    Attributes:
        record: collects inputs, metrics and protocols; status and files are set at the end.
        workdir: folder beside the record: samples, cache, pages.
        sampling: the part of every protocol that says how images were sampled.
        reference, training: real held-out and training images; None without a manifest.
        known: statistics of real images, in place of them.
        per_image: one value for each image that was made, in the order of `samples.made`.
        problems: reasons why the record is `failed`.
        pages: further files for the record, by name.
        on_progress: called with (done, total) while images are processed one by one.
        workers: other processes that read images too.
        source_files: files of a folder that is measured, by place in the plan.
        source_notes: remarks of the source on its images.
        n_cut: number of prompts that the source is known not to read to their ends.
        has_prompts: whether somebody said what the images are of.
    """

    settings: EvaluationSettings
    record: EvaluationRecord
    workdir: Path
    prompts: PromptSet
    samples: Samples
    sampling: Mapping[str, Any]
    reference: RealPictures | None
    training: RealPictures | None
    known: KnownStatistics | None = None
    per_image: dict[str, list[Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    pages: dict[str, Path] = field(default_factory=dict)
    on_progress: Callable[[int, int], None] | None = None
    workers: Workers | None = None
    source_files: Sequence[Path] = ()
    n_cut: int = 0
    source_notes: Sequence[str] = ()
    has_prompts: bool = True
    _openings: dict[str, dict[str, Any]] = field(default_factory=dict)
    _lite0: Lite0Extractor | None = None
    _features: dict[str, Features] = field(default_factory=dict)
    _digests: list[str] = field(default_factory=list)
    _reference_notes: list[str] | None = None

    @property
    def n(self) -> int:
        """Images that were made."""
        return len(self.samples.paths)

    @property
    def owner(self) -> npt.NDArray[np.int64]:
        """Index of the prompt of each image that was made, [n]."""
        return np.array([self.samples.plan[i].owner for i in self.samples.made], np.int64)

    @property
    def made_prompts(self) -> list[str]:
        """The prompt of each image that was made, [n]."""
        return [self.samples.plan[place].prompt for place in self.samples.made]

    def image(self, row: int) -> Image:
        """Read the image of a row of `per_image`, uint8 [H, W, 3]."""
        return self.samples.read(self.samples.made[row])

    def open_extractor(self, name: str) -> Any:
        """Open an extractor with the settings' weights: "lite0", "inception", "clip" or "dinov2".

        Raises:
            EvaluationError: the weights were not given.
            MissingWeightsError: the weights are missing, or do not fit.
        """
        opening = extractor_opening(self.settings, name)
        extractor = open_reader(opening)
        identity = protocol_id(extractor.protocol)
        self._openings[identity] = {**opening, "protocol": identity}
        return extractor

    @property
    def extractor(self) -> Lite0Extractor:
        """Extractor that needs no further weights, Lite0."""
        if self._lite0 is None:
            self._lite0 = self.open_extractor("lite0")
        return self._lite0

    @property
    def features(self) -> Features:
        """Lite0 features of the images, [n, 1280]."""
        return self.features_of(self.extractor)

    @property
    def streams(self) -> bool:
        """Return whether features stay in files and are read chunk by chunk."""
        asked = self.settings.stream
        return self.n > STREAM_FROM if asked is None else asked

    def chunks(self) -> list[slice]:
        """Slices over the images; a single one where features are in memory."""
        return list(row_chunks(self.n)) if self.streams else [slice(0, self.n)]

    def features_path(self, extractor: Extractor) -> Path:
        """The file of the images' features where they are streamed."""
        return self.workdir / "cache" / f"{features_key(extractor, self.digests)}.npy"

    @property
    def digests(self) -> list[str]:
        """sha256 of each image that was made."""
        if not self._digests:
            self._digests = [sha256_file(self.samples.paths[p]) for p in self.samples.made]
        return self._digests

    def features_of(self, extractor: Extractor) -> Features:
        """Return features of the images by an extractor, [n, D]; cached by content. Streamed ones
        are a new memory map each time, so that its pages can be freed after use."""
        if self.streams:
            return self._mapped_features(extractor)
        key = protocol_id(extractor.protocol)
        if key not in self._features:
            self._features[key] = cached_features(
                extractor, self.digests, self.image, self.workdir / "cache",
                on_progress=self.on_progress, compute=lambda: self._divided_features(extractor),
            )  # fmt: skip
        return self._features[key]

    def _divided_features(self, extractor: Extractor) -> Features | None:
        parts = self._divide(extractor, self._paths, self.digests)
        return None if parts is None else stack_features(parts, extractor.dim)

    def _divide(
        self, extractor: Extractor, paths: Sequence[Path], digests: Sequence[str]
    ) -> list[Path] | None:
        """Return feature files of the workers' shares, in order; None if one process reads all."""
        opening = self._openings.get(protocol_id(extractor.protocol))
        if opening is None:
            return None
        return read_divided(
            self.workers, opening, extractor, paths, self.workdir / "cache",
            features_key(extractor, digests), on_progress=self.on_progress,
        )  # fmt: skip

    @property
    def _paths(self) -> list[Path]:
        return [self.samples.paths[place] for place in self.samples.made]

    def check_images(
        self, name: str, image_filter: ImageFilter, threshold: float
    ) -> list[ImageVerdict]:
        """Return an image filter's verdicts on the images, in their order.

        Args:
            name, threshold: arguments that the filter was opened with.

        Raises:
            SafetyFilterError: the filter failed, or an answer is missing or unusable.
        """
        opening = {"filter": name, "threshold": threshold}
        identity = sha256_json([opening, dict(image_filter.info), self.digests])
        parts = read_divided(
            self.workers, opening, image_filter, self._paths, self.workdir / "cache", identity
        )
        return check_images(image_filter, self._paths) if parts is None else join_verdicts(parts)

    def _mapped_features(self, extractor: Extractor) -> Features:
        path = self.features_path(extractor)
        found = map_features(path, self.n, extractor.dim)
        if found is None:
            parts = self._divide(extractor, self._paths, self.digests)
            if parts is None:
                write_features(extractor, self.n, self.image, path, on_progress=self.on_progress)
            else:
                join_features(parts, extractor.dim, path)
            found = map_features(path, self.n, extractor.dim)
        if found is None:
            raise EvaluationError(f"{path}: written, and cannot be read")
        return found

    def real_features_of(self, pictures: RealPictures, extractor: Extractor) -> Features:
        """Return features of real images by an extractor, [N, D]; cached by content."""
        if isinstance(extractor, Lite0Extractor):
            return pictures.features
        found = None
        if self.workers:
            found = real_features_by_workers(
                pictures, extractor, self.workdir / "cache",
                use_cache=self.settings.cache, divide=partial(self._divide, extractor),
            )  # fmt: skip
        if found is not None:
            return found
        return pictures.features_of(extractor, use_cache=self.settings.cache)

    def frechet(
        self, first: Features, second: Features, *, known: Statistics | None = None
    ) -> Interval:
        """Compute the Fréchet distance with its interval, streamed or not.

        Args:
            known: statistics of the second set, see `real_statistics_of`.
        """
        settings = self.settings
        options = {"seed": settings.seed, "groups": settings.jackknife_groups}
        if self.streams:
            return streamed_frechet_interval(first, second, known=known, **options)
        return frechet_interval(first, second, **options)

    def real_statistics_of(self, pictures: RealPictures, extractor: Extractor) -> Statistics | None:
        """Return mean and covariance of real images, cached by content; None if features are in
        memory and nothing needs them."""
        if not self.streams:
            return None
        return cached_statistics(
            extractor, pictures.digests, lambda: self.real_features_of(pictures, extractor),
            pictures.cache_dir if self.settings.cache else None,
        )  # fmt: skip

    def real(self) -> RealPictures:
        """Return the reference images.

        Raises:
            EvaluationError: there are none, or too few images to compare with them.
        """
        if self.known is not None:
            raise EvaluationError("the reference is statistics alone, without its images")
        if self.reference is None:
            raise EvaluationError("no real images were given")
        if self.n < 4:
            raise EvaluationError(f"{self.n} images are too few")
        return self.reference

    def set_protocol(self, features: Mapping[str, Any], metric: str, **more: Any) -> dict[str, Any]:
        """Return the protocol of a measure of the images against the reference images."""
        reference = self.reference
        return {
            "metric": metric, "features": dict(features), "n": self.n,
            "reference": {"sha256": reference.digest, "n": len(reference.samples)}
            if reference else {},
            "sampling": dict(self.sampling), **more,
        }  # fmt: skip

    def reference_notes(self) -> list[str]:
        """Remarks on reference and training images: some cannot be used, or some are in both."""
        if self._reference_notes is None:
            notes = []
            for what, pictures in (("reference", self.reference), ("training", self.training)):
                if pictures and pictures.unusable:
                    total = len(pictures.samples) + len(pictures.unusable)
                    notes.append(
                        f"{len(pictures.unusable)} of {total} {what} images cannot be used and "
                        "are left out"
                    )
            if self.reference and self.training:
                shared = int(shared_pictures(self.reference, self.training).sum())
                if shared:
                    notes.append(
                        f"{shared} of {len(self.reference.samples)} reference images are "
                        "training images"
                    )
            self._reference_notes = notes
        return self._reference_notes

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
        """Add one measurement under its protocol, with the problems of its inputs."""
        identity = protocol_id(protocol)
        self.record.protocols[identity] = dict(protocol)
        notes = _notes(self, interval, protocol)
        self.record.metrics[key] = Measurement(
            value=interval.value, low=interval.low, high=interval.high, method=interval.method,
            n=self.n if n is None else n, unit=unit, higher_is_better=better, protocol=identity,
            warnings=[*warnings, *notes], details=dict(details or {}),
        )  # fmt: skip

    def missing(self, reason: str, *keys: str) -> None:
        """Record the reason why these were not measured."""
        for key in keys:
            self.record.metrics[key] = Measurement.missing(reason)

    def attempt(self, measure: Callable[[Workbench], None], keys: Sequence[str]) -> None:
        """Run one family of measurements; those that cannot be made get the reason.

        Only an EvaluationError is such a reason: a named model that cannot be loaded ends the
        evaluation.
        """
        try:
            measure(self)
        except EvaluationError as error:
            self.missing(error.message, *(key for key in keys if key not in self.record.metrics))


def _notes(bench: Workbench, interval: Interval, protocol: Mapping[str, Any]) -> list[str]:
    """Remarks on a measurement's inputs: failed images, cut prompts, unusable real images."""
    notes: list[str] = []
    if "sampling" in protocol:
        notes += bench.source_notes
        failed, of = len(bench.samples.failures), len(bench.samples.plan)
        notes += [f"{failed} of {of} images failed"] if failed else []
        cut, of = bench.n_cut, len(bench.prompts)
        if cut:
            notes.append(f"{cut} of {of} prompts are longer than the model reads, and are cut")
    if protocol.get("reference"):
        notes += bench.reference_notes()
    if interval.method.startswith("constant"):
        notes.append("all values are equal, so the interval has no width and says nothing")
    return notes
