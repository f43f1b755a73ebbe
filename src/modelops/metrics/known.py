"""Fréchet distance to statistics that others have published: an .npz file with mu and sigma."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, UsageError
from modelops.base.files import sha256_file
from modelops.base.seeding import numpy_generator
from modelops.metrics.frechet import (
    PAIRINGS,
    Floats,
    covariance_rows,
    distance_to,
    parts_variance,
)
from modelops.metrics.intervals import Interval, normal_interval

MAX_DIM = 8192
_NEGATIVE = -1e-6  # of the largest eigenvalue, which rounding does not reach


@dataclass(frozen=True, slots=True)
class KnownStatistics:
    """Mean [D] and covariance [D, D] of real images' features, float64, with the file's digest."""

    path: Path
    sha256: str
    mean: Floats
    covariance: Floats


def read_statistics(path: Path) -> KnownStatistics:
    """Read `mu` and `sigma`, as pytorch-fid, clean-fid and the ADM suite write them.

    Raises:
        UsageError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = set(stored.files)
            if not {"mu", "sigma"} <= names:
                raise UsageError(
                    f"{path}: no mu and sigma in it, but {', '.join(sorted(names)) or 'nothing'}",
                    hint="give what `python -m pytorch_fid --save-stats` writes",
                )
            shapes = [_shape(path, name) for name in ("mu", "sigma")]
            (dim, *more), square = shapes
            if more or square != (dim, dim) or not 0 < dim <= MAX_DIM:
                raise UsageError(f"{path}: mu {shapes[0]} and sigma {shapes[1]} do not fit")
            mean, covariance = (stored[name].astype(np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not an .npz file of statistics ({error})") from error
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UsageError(f"{path}: mu or sigma is not finite")
    lowest, highest = np.linalg.eigvalsh(covariance)[[0, -1]]
    if not np.allclose(covariance, covariance.T, atol=1e-6 * abs(highest)) or (
        lowest < _NEGATIVE * highest
    ):
        raise UsageError(f"{path}: sigma is no covariance: not symmetric, or not positive")
    return KnownStatistics(path, sha256_file(path), mean, (covariance + covariance.T) / 2)


def _shape(path: Path, name: str) -> tuple[int, ...]:
    """Shape of an array of an .npz file, from its header alone."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, _ = read(member)
    return tuple(int(side) for side in shape)


def known_interval(
    features: npt.NDArray[np.floating],
    known: KnownStatistics,
    *,
    seed: int,
    groups: int = 40,
    confidence: float = 0.95,
) -> Interval:
    """Compute the distance of features [N, D] to known statistics, with an interval for its mean
    over other images; the statistics stay as they are. See `frechet.frechet_interval`.

    Raises:
        EvaluationError: fewer than eight images, another D, or features that are not finite.
    """
    x = np.asarray(features, np.float64)
    if x.shape[1] != len(known.mean):
        raise EvaluationError(
            f"{known.path}: statistics of {len(known.mean)} dimensions, the features have "
            f"{x.shape[1]}"
        )
    if not np.isfinite(x).all():
        raise EvaluationError("features that are not finite")
    if len(x) < 8:
        raise EvaluationError(f"{len(x)} images are too few for an interval")
    distance = distance_to(known.mean, covariance_rows(known.covariance))
    generator = numpy_generator(seed, "frechet-parts", 0)
    rounds = max(1, round(groups / 3))
    halved, quartered = [], []
    for _ in range(rounds):
        parts = np.array_split(generator.permutation(len(x)), 4)
        for pairing in PAIRINGS:
            one, two = (distance(x[np.concatenate([parts[a], parts[b]])]) for a, b in pairing)
            halved.append((one - two) ** 2 / 2)
        quartered.append(float(np.var([distance(x[rows]) for rows in parts], ddof=1)))
    return normal_interval(
        distance(x), parts_variance(halved, quartered), freedom=3 * rounds, confidence=confidence,
        method=f"{3 * rounds} random halvings of the images, with a second-order term from "
        "quarters; the reference is fixed",
    )  # fmt: skip
