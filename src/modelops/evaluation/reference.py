"""Real images that samples are compared with: splits of a manifest, or a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.errors import UsageError
from modelops.base.files import cache_directory, sha256_file, sha256_json
from modelops.base.images import read_image
from modelops.data.embeddings import embed_manifest
from modelops.data.folders import images_of
from modelops.data.manifest import Manifest, Sample, read_manifest
from modelops.data.split import read_splits
from modelops.metrics.feature_files import FeatureCache
from modelops.metrics.features import Extractor

Features = npt.NDArray[np.float32]
CACHE = "reference"  # below the manifest's cache


@dataclass(frozen=True, slots=True)
class RealPictures:
    """Usable images of one split with their Lite0 features, row for row.

    Attributes:
        pixels: sha256 of each decoded image; empty if they were not decoded.
        unusable: {id: reason} of the split's other images.
    """

    manifest: Manifest
    samples: list[Sample]
    features: Features  # [N, 1280]
    pixels: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over the images' own digests, in order."""
        return sha256_json(self.digests)

    @property
    def captions(self) -> list[str]:
        """Caption of each image; empty texts where nobody has written any."""
        return [sample.caption for sample in self.samples]

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Read image `index`, uint8 [H, W, 3]."""
        return read_image(self.manifest.image_path(self.samples[index]))

    @property
    def paths(self) -> list[Path]:
        """File of each image."""
        return [self.manifest.image_path(sample) for sample in self.samples]

    @property
    def digests(self) -> list[str]:
        """sha256 of each image's file."""
        return [sample.sha256 for sample in self.samples]

    @property
    def cache_dir(self) -> Path:
        """Folder of these images' features, kept for other evaluations against them."""
        return self.manifest.cache / CACHE

    def features_of(
        self,
        extractor: Extractor,
        *,
        use_cache: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Features:
        """Return features of another extractor, cached by content beside the manifest."""
        cache = FeatureCache(self.cache_dir if use_cache else None)
        return cache.features(extractor, self.digests, self.read, on_progress=on_progress)


def open_reference(
    manifest_path: Path,
    splits_path: Path,
    wanted: tuple[str, ...],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, RealPictures]:
    """Open {split: its real images}. Features come from the dedup cache.

    A split that is wanted after the first may be missing where all images are in the first.

    Raises:
        UsageError: a wanted split has fewer than two images.
    """
    manifest = read_manifest(manifest_path)
    splits = read_splits(splits_path)
    embedded = embed_manifest(manifest, on_progress=on_progress)
    faults = {**manifest.quarantined, **embedded.faults}
    found = {}
    alone = set(splits.values()) == {wanted[0]}
    for split in wanted[:1] if alone else wanted:
        rows = [i for i, s in enumerate(embedded.samples) if splits.get(s.id) == split]
        if len(rows) < 2:
            raise UsageError(
                f"{splits_path}: {len(rows)} usable images in split {split!r}",
                hint=f"its splits are {', '.join(sorted(set(splits.values())))}",
            )
        found[split] = RealPictures(
            manifest, [embedded.samples[i] for i in rows], embedded.features[rows],
            [embedded.pixels[i] for i in rows],
            {name: why for name, why in faults.items() if splits.get(name) == split},
        )  # fmt: skip
    return found


def open_folder_reference(
    folder: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> RealPictures:
    """Open a folder of real images, which has no splits, and captions only where
    `modelops sample` made it.

    Nothing is written into it: features are kept in modelops' own cache.

    Raises:
        UsageError: images in subfolders too, or fewer than two usable ones.
    """
    files, prompts = images_of(folder)
    rows = [
        Sample(
            id=path.name, filepath=path.name, caption=caption, license="", source="",
            sha256=sha256_file(path), date_collected="",
        )
        for path, caption in zip(files, prompts or [""] * len(files), strict=True)
    ]  # fmt: skip
    digest = sha256_json([[row.filepath, row.sha256] for row in rows])
    manifest = Manifest(folder, folder, digest, rows, {}, caches=cache_directory("images"))
    embedded = embed_manifest(manifest, on_progress=on_progress)
    if len(embedded.samples) < 2:
        raise UsageError(
            f"{folder}: {len(embedded.samples)} usable images to compare with",
            hint="name a folder of real images",
        )
    return RealPictures(
        manifest, embedded.samples, embedded.features, embedded.pixels, embedded.faults
    )


def shared_pictures(first: RealPictures, second: RealPictures) -> npt.NDArray[np.bool_]:
    """Return [N] whether each image of the first is in the second, by its bytes or its pixels."""
    known = {*(sample.sha256 for sample in second.samples), *second.pixels}
    same = [sample.sha256 in known for sample in first.samples]
    if first.pixels:
        same = [a or b in known for a, b in zip(same, first.pixels, strict=True)]
    return np.array(same, np.bool_)
