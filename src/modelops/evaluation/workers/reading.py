"""Reading of images by extractors and filters, in one process or divided among several.

Processes take runs of whole batches, so that every image is in the same batch as if one process
read them all. So the result does not depend on the number of processes. It does depend, by rounding
(1e-6 and less was seen), on the number of threads of each.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelops.base.errors import EvaluationError, IntegrityError, ModelopsError
from modelops.base.files import atomic_path, remove_leftovers, write_json
from modelops.base.images import read_image
from modelops.evaluation.reference import RealPictures
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.workers.tasks import Failure, OnRead, Share, Workers
from modelops.metrics.feature_files import (
    FeatureCache,
    map_features,
    release,
    row_chunks,
    write_features,
)
from modelops.metrics.features import (
    Extractor,
    Features,
    Lite0Extractor,
    features_key,
)
from modelops.metrics.protocol import protocol_id
from modelops.safety.image import (
    ImageFilter,
    ImageVerdict,
    SafetyFilterError,
    checked_verdicts,
    score_to_verdict,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Image = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 64  # images; a multiple of every reader's batch, and a divisor of a file's chunks
FILTER_BATCH = 16  # images in memory at once


def extractor_opening(settings: EvaluationSettings, name: str) -> dict[str, Any]:
    """Return the arguments with which `open_reader` opens an extractor.

    Args:
        name: "lite0", "inception", "clip" or "dinov2".

    Raises:
        EvaluationError: its weights were not given.
    """
    chosen: dict[str, tuple[str, Path | None, dict[str, Any]]] = {
        "lite0": ("", Path(), {}),
        "inception": ("--inception-weights", settings.inception_weights,
                      {"mode": settings.fid_mode, "dtype": settings.extractor_dtype}),
        "clip": ("--clip-weights", settings.clip_weights, {"model": settings.clip_model}),
        "dinov2": ("--dinov2-weights", settings.dinov2_weights, {}),
    }  # fmt: skip
    option, weights, more = chosen[name]
    if weights is None:
        title = {"inception": "Inception", "clip": "CLIP", "dinov2": "DINOv2"}[name]
        raise EvaluationError(f"no {title} weights were given ({option})")
    return {"extractor": name, "weights": str(weights), "device": settings.extractor_device, **more}


def open_reader(opening: Mapping[str, Any]) -> Any:
    """Open an extractor from the arguments that `extractor_opening` returned, or an image filter
    from {"filter": its name, "threshold": score}.

    Raises:
        ModelopsError: its weights are missing, or not the expected ones.
    """
    chosen = dict(opening)
    if "filter" in chosen:
        from modelops.safety.registry import open_image_filter

        return open_image_filter(chosen["filter"], threshold=chosen["threshold"])
    weights, device = Path(chosen["weights"]), chosen["device"]
    if chosen["extractor"] == "inception":
        from modelops.metrics.inception import InceptionExtractor

        more = {"mode": chosen["mode"], "dtype": chosen["dtype"]}
        return InceptionExtractor(weights, device=device, **more)
    if chosen["extractor"] == "clip":
        from modelops.metrics.clip import ClipModel

        return ClipModel(weights, chosen["model"], device=device)
    if chosen["extractor"] == "dinov2":
        from modelops.metrics.dinov2 import Dinov2Extractor

        return Dinov2Extractor(weights, device=device)
    return Lite0Extractor(device=device)


def read_share(share: Share, reader: Extractor | ImageFilter, on_read: OnRead | None) -> None:
    """Read the images of a share and write the result: features [N, D] as `.npy`, or
    [score, blocked] of each image as `.json`. Existing features are kept.

    Raises:
        EvaluationError: features are not finite, or an image has no usable verdict.
        ModelopsError: an image cannot be read, or a file cannot be written.
    """
    count = len(share.paths)
    if "filter" in share.reader:
        verdicts = check_images(cast(ImageFilter, reader), share.paths, on_read)
        write_json(share.out, [[verdict.score, verdict.blocked] for verdict in verdicts])
        return
    extractor = cast(Extractor, reader)
    if map_features(share.out, count, extractor.dim) is None:
        write_features(
            extractor, count, lambda row: read_image(share.paths[row]), share.out,
            on_progress=(lambda done, _: on_read(min(done, count))) if on_read else None,
        )  # fmt: skip


def check_images(
    image_filter: ImageFilter, paths: Sequence[Path], on_read: OnRead | None = None
) -> list[ImageVerdict]:
    """Return a filter's verdicts on images; only a few images are in memory at a time.

    Raises:
        SafetyFilterError: the filter failed, or an answer is missing or unusable.
        ImageError: an image cannot be read.
    """
    verdicts: list[ImageVerdict] = []
    for start in range(0, len(paths), FILTER_BATCH):
        images = [read_image(path) for path in paths[start : start + FILTER_BATCH]]
        verdicts += checked_verdicts(image_filter, images)
        if on_read:
            on_read(len(verdicts))
    return verdicts


def divide_rows(count: int, processes: int) -> list[range]:
    """Divide rows into runs of whole blocks, one for each process that gets any, nearly equal."""
    blocks = -(-count // BLOCK)
    runs = np.array_split(np.arange(blocks), min(processes, blocks)) if blocks else []
    return [range(int(run[0]) * BLOCK, min((int(run[-1]) + 1) * BLOCK, count)) for run in runs]


def read_divided(
    workers: Workers | None,
    opening: Mapping[str, Any],
    reader: Extractor | ImageFilter,
    paths: Sequence[Path],
    folder: Path,
    name: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path] | None:
    """Return the answers of several processes, one file each, in the order of the images. None if
    one process reads everything: without workers, or with no more than one block of images.

    Args:
        opening, reader: arguments with which other processes open the reader, and the open reader.
        folder: folder of the files, called `name` and a part. They stay after an error, and the
            same number of processes does not read those features again.

    Raises:
        ModelopsError: see `Workers.read`.
    """
    if workers is None or workers.processes < 2:
        return None
    runs = divide_rows(len(paths), workers.processes)
    if len(runs) < 2:
        return None
    suffix = "json" if "filter" in opening else "npy"
    shares = [
        Share(opening, tuple(paths[rows.start : rows.stop]),
              folder / f"{name}.{rows.start}-{rows.stop}.{suffix}")
        for rows in runs
    ]  # fmt: skip

    remove_leftovers(folder)  # of a process that was killed
    wanted = {share.out for share in shares}
    _remove([part for part in folder.glob(f"{name}.*-*.{suffix}") if part not in wanted])

    def shown(done: int) -> None:
        if on_progress:  # the others are about as far
            on_progress(min(len(paths), done * len(shares)), len(paths))

    workers.read(shares, lambda share: failure_of(share, reader, shown))
    return [share.out for share in shares]


def join_features(parts: Sequence[Path], dim: int, path: Path) -> None:
    """Join feature files into one, atomically; the parts are removed.

    Raises:
        EvaluationError: a part is damaged.
        ModelopsError: the file cannot be written.
    """
    found = [map_features(part, None, dim) for part in parts]
    count = sum(len(part) for part in found if part is not None)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
        np.lib.format.write_array_header_1_0(handle, header)
        for where, part in zip(parts, found, strict=True):
            if part is None:
                raise EvaluationError(f"{where}: written, and cannot be read")
            for rows in row_chunks(len(part)):
                handle.write(np.ascontiguousarray(part[rows]).data)
                release(part)
    _remove(parts)


def stack_features(parts: Sequence[Path], dim: int) -> Features:
    """Read the features [N, dim] of several files into memory; the files are removed.

    Raises:
        EvaluationError: a part is damaged.
    """
    found = []
    for path in parts:
        part = map_features(path, None, dim)
        if part is None:
            raise EvaluationError(f"{path}: written, and cannot be read")
        found.append(np.array(part))
    _remove(parts)
    return np.concatenate(found)


def read_verdicts(path: Path, n: int | None = None) -> list[ImageVerdict] | None:
    """Read the verdicts of a file; None if they are not usable, or not n of them."""
    if not path.is_file():
        return None
    try:
        found = [
            ImageVerdict(score_to_verdict(float(score), 0.5).score, bool(blocked))
            for score, blocked in json.loads(path.read_text("utf-8"))
        ]
    except (OSError, ValueError, TypeError, RecursionError, SafetyFilterError):
        return None
    return found if n is None or len(found) == n else None


def join_verdicts(parts: Sequence[Path]) -> list[ImageVerdict]:
    """Read the verdicts of several files, which are removed.

    Raises:
        SafetyFilterError: a part is damaged.
    """
    verdicts: list[ImageVerdict] = []
    for path in parts:
        part = read_verdicts(path)
        if part is None:
            raise SafetyFilterError(f"{path}: written, and cannot be read")
        verdicts += part
    _remove(parts)
    return verdicts


def _remove(parts: Sequence[Path]) -> None:
    for part in parts:
        with contextlib.suppress(OSError):
            part.unlink()


def failure_of(
    share: Share, reader: Extractor | ImageFilter | None = None, on_read: OnRead | None = None
) -> Failure | None:
    """Process one share; return its failure, or None. Opens the reader if none is given."""
    try:
        read_share(share, reader or _opened(json.dumps(dict(share.reader))), on_read)
    except ModelopsError as error:
        return Failure.of(error)
    return None


@lru_cache(maxsize=1)  # for a process that reads one share after another with the same reader
def _opened(opening: str) -> Any:
    chosen = json.loads(opening)
    reader = open_reader(chosen)
    if "protocol" in chosen and protocol_id(reader.protocol) != chosen["protocol"]:
        raise IntegrityError(
            f"{chosen['weights']}: other weights than those of the process that asked",
            hint="give all machines the same files",
        )
    return reader


def real_features_by_workers(
    pictures: RealPictures,
    extractor: Extractor,
    own_cache: Path,
    *,
    use_cache: bool,
    divide: Callable[[Sequence[Path], Sequence[str]], list[Path] | None],
) -> Features | None:
    """Return features [N, D] of real images that workers have read, or None if none did.

    They come from the cache beside the images' manifest or, where that cannot be written, from the
    evaluation's own.

    Args:
        pictures: the real images.
        extractor: the one that reads them.
        own_cache: the evaluation's own cache folder.
        use_cache: whether the cache beside the manifest may be used.
        divide: has files with these digests read; returns files of features, in order.
    """
    n, dim = len(pictures.samples), extractor.dim
    name = f"{features_key(extractor, pictures.digests)}.npy"
    own = own_cache / name
    shared = FeatureCache(pictures.cache_dir if use_cache else None)
    places = [shared.folder / name, own] if shared.folder else [own]
    for path in places:
        if (found := map_features(path, n, dim)) is not None:
            with contextlib.suppress(OSError):  # the cache forgets what was used longest ago
                os.utime(path)
            return found
    parts = divide(pictures.paths, pictures.digests)
    if parts is None:
        return None
    if shared.folder:
        with contextlib.suppress(ModelopsError, OSError):
            join_features(parts, dim, shared.folder / name)
            shared.tidy(keep=shared.folder / name)
            return map_features(shared.folder / name, n, dim)
    join_features(parts, dim, own)
    return map_features(own, n, dim)
