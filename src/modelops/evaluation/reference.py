"""Real pictures that samples are compared with: held-out and training features of a manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.data.embeddings import embed_manifest
from modelops.data.images import read_image
from modelops.data.manifest import Manifest, Sample, read_manifest
from modelops.data.split import read_splits
from modelops.errors import UsageError
from modelops.files import sha256_json
from modelops.metrics.features import Extractor, cached_features

Features = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RealPictures:
    """The pictures of one split with their Lite0 features, row for row."""

    manifest: Manifest
    samples: list[Sample]
    features: Features  # [N, 1280]

    @property
    def digest(self) -> str:
        """sha256 over the pictures' own digests, in order."""
        return sha256_json([sample.sha256 for sample in self.samples])

    @property
    def captions(self) -> list[str]:
        return [sample.caption for sample in self.samples]

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Picture `index`, uint8 [H, W, 3]."""
        return read_image(self.manifest.image_path(self.samples[index]))

    def features_of(
        self,
        extractor: Extractor,
        cache_dir: Path | None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Features:
        """Features of another extractor, cached by content."""
        digests = [sample.sha256 for sample in self.samples]
        return cached_features(extractor, digests, self.read, cache_dir, on_progress=on_progress)


def open_reference(
    manifest_path: Path,
    splits_path: Path,
    wanted: tuple[str, ...],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, RealPictures], dict[str, str]]:
    """({split: its pictures}, {id: reason} of unusable ones). Features come from the dedup cache.

    Raises:
        UsageError: a wanted split has fewer than two pictures.
    """
    manifest = read_manifest(manifest_path)
    splits = read_splits(splits_path)
    embedded = embed_manifest(manifest, on_progress=on_progress)
    found = {}
    for split in wanted:
        rows = [i for i, s in enumerate(embedded.samples) if splits.get(s.id) == split]
        if len(rows) < 2:
            raise UsageError(
                f"{splits_path}: {len(rows)} usable pictures in split {split!r}",
                hint=f"its splits are {', '.join(sorted(set(splits.values())))}",
            )
        found[split] = RealPictures(
            manifest, [embedded.samples[i] for i in rows], embedded.features[rows]
        )
    return found, {**manifest.quarantined, **embedded.faults}


def overlap(first: RealPictures, second: RealPictures) -> int:
    """How many pictures of the first have the same bytes as one of the second."""
    known = {sample.sha256 for sample in second.samples}
    return sum(sample.sha256 in known for sample in first.samples)
