"""The images and captions of one split, decoded once where they fit into memory.

One rule for images that cannot be decoded, whether they are kept in memory or not: they are found
before the first step, left out of the splits, and counted in the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError, ModelopsError, TrainingError
from modelops.base.images import resize_image
from modelops.training.config import TrainConfig
from modelops.training.launch import splits_path

Reader = Callable[[int], npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class PictureSet:
    """Images with captions and groups; `read` decodes one when they are not cached.

    Attributes:
        ids, captions, groups: one per image.
        cached: all images [N, H, W, 3] uint8, or None.
        read: index to image [H, W, 3] uint8.
    """

    ids: list[str]
    captions: list[str]
    groups: list[str]
    cached: npt.NDArray[np.uint8] | None
    read: Reader

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """A fresh array [N, H, W, 3] of the images at `indices`.

        Raises:
            TrainingError: an image that is decoded on demand is no longer what it was.
        """
        if self.cached is not None:
            picked: npt.NDArray[np.uint8] = self.cached[indices]
            return picked
        try:
            return np.stack([self.read(int(index)) for index in indices])
        except ModelopsError as error:
            raise TrainingError(
                f"an image changed while training: {error.message}",
                hint="put it back, or remove it, then go on with --resume",
            ) from error

    def subset(self, indices: Sequence[int]) -> PictureSet:
        """Some of the images, cached."""
        chosen = list(indices)
        images = self.images(np.array(chosen, np.int64))
        return PictureSet(
            [self.ids[i] for i in chosen],
            [self.captions[i] for i in chosen],
            [self.groups[i] for i in chosen],
            images,
            images.__getitem__,
        )


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images that a run reads: the splits, and the samples left out with the reason."""

    train: PictureSet
    validation: PictureSet | None
    quarantined: dict[str, str]

    @property
    def warning(self) -> str:
        """A line for a reader, or an empty one if nothing was left out."""
        if not self.quarantined:
            return ""
        named = "; ".join(f"{name}: {why}" for name, why in list(self.quarantined.items())[:3])
        return f"{len(self.quarantined)} samples are left out, as they cannot be used: {named}"


def load_pictures(config: TrainConfig, root: Path) -> Pictures:
    """Read the training and validation splits that a config names.

    Args:
        root: the folder that the config's paths are relative to.

    Raises:
        UsageError: a file is missing or does not fit.
        TrainingError: no image is left to train on.
    """
    if config.data.shards is not None:
        return _load_shards(config, root)
    return _load_manifest(config, root)


def read_groups(path: Path) -> dict[str, str]:
    """{sample id: group} of a splits.parquet."""
    from pyarrow import parquet

    table = parquet.read_table(path, columns=["id", "group"])
    return dict(
        zip(
            map(str, table["id"].to_pylist()),
            map(str, table["group"].to_pylist()),
            strict=True,
        )
    )


def _load_manifest(config: TrainConfig, root: Path) -> Pictures:
    from modelops.data.manifest import Sample, read_manifest
    from modelops.data.split import read_splits

    manifest = read_manifest(root / str(config.data.manifest))
    quarantined = dict(manifest.quarantined)
    splits_file = splits_path(config, root)
    splits = read_splits(splits_file) if splits_file else None
    groups = read_groups(splits_file) if splits_file else {}

    def make(split: str) -> PictureSet | None:
        if splits is None:
            rows: list[Sample] = manifest.rows if split == "train" else []
        else:
            rows = [row for row in manifest.rows if splits.get(row.id) == split]
        picture_set, bad = _cache(
            [row.id for row in rows],
            [row.caption for row in rows],
            [groups.get(row.id, row.group) for row in rows],
            lambda index: manifest.read_image(rows[index]),
            config,
        )
        quarantined.update(bad)
        return picture_set if len(picture_set) else None

    train, validation = make("train"), make("val")
    return _checked(train, validation, quarantined, f"{config.data.manifest}")


def _load_shards(config: TrainConfig, root: Path) -> Pictures:
    from modelops.data.shards import ShardDataset, read_shard_manifest

    path = root / str(config.data.shards)
    there = {row.split for row in read_shard_manifest(path)}
    splits_file = splits_path(config, root)
    groups = read_groups(splits_file) if splits_file else {}
    quarantined: dict[str, str] = {}

    def make(split: str) -> PictureSet | None:
        if split not in there:
            return None
        data = ShardDataset(path, split)
        ids = data.ids
        picture_set, bad = _cache(
            ids,
            data.captions(),
            [groups.get(name, name) for name in ids],
            lambda index: data[index].image,
            config,
        )
        quarantined.update(bad)
        return picture_set if len(picture_set) else None

    train, validation = make("train"), make("val")
    return _checked(train, validation, quarantined, f"{config.data.shards}")


def _checked(
    train: PictureSet | None,
    validation: PictureSet | None,
    quarantined: dict[str, str],
    name: str,
) -> Pictures:
    if train is None:
        first = next(iter(quarantined.items()), None)
        reason = f"; {len(quarantined)} left out, first {first[0]}: {first[1]}" if first else ""
        raise TrainingError(f"{name}: no image to train on{reason}", hint="modelops data check")
    return Pictures(train, validation, quarantined)


def _cache(
    ids: list[str],
    captions: list[str],
    groups: list[str],
    open_picture: Reader,
    config: TrainConfig,
) -> tuple[PictureSet, dict[str, str]]:
    """Decode every image once, and keep them if they fit; leave out those that cannot be decoded,
    with the reason.

    `open_picture` gives images of any size; they are cut and scaled to the config's resolution.
    """
    side = config.model.resolution
    keep = len(ids) * side * side * 3 <= config.data.cache_gb * 1e9

    def read(index: int) -> npt.NDArray[np.uint8]:
        return resize_image(open_picture(index), side)

    def attempt(index: int) -> npt.NDArray[np.uint8] | str | None:
        try:
            image = read(index)
        except ImageError as error:
            return error.message
        return image if keep else None

    with ThreadPoolExecutor(4) as pool:
        decoded = list(pool.map(attempt, range(len(ids))))
    bad = {ids[index]: found for index, found in enumerate(decoded) if isinstance(found, str)}
    good = [index for index, found in enumerate(decoded) if not isinstance(found, str)]
    cached = None
    if keep:
        images = [found for found in decoded if isinstance(found, np.ndarray)]
        cached = np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8)
    picture_set = PictureSet(
        [ids[index] for index in good],
        [captions[index] for index in good],
        [groups[index] for index in good],
        cached,
        (lambda place: read(good[place])) if cached is None else cached.__getitem__,
    )
    return picture_set, bad
