"""Are the images of two evaluations the same? What is gated should be what is served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modelops.data.images import read_image
from modelops.errors import EvaluationError
from modelops.evaluation.samples import COMPLETE


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far apart two evaluations' images of the same prompts and seeds are.

    Attributes:
        n: images compared.
        identical: images without any difference.
        largest: largest difference of a pixel, in grey levels 0 to 255.
    """

    n: int
    identical: int
    largest: int


def compare_images(one: str | Path, other: str | Path) -> Agreement:
    """Compare the images that two evaluations share.

    Args:
        one, other: evaluation records that still have their samples beside them.

    Raises:
        EvaluationError: they have no image in common, or two images differ in size.
    """
    ours, theirs = _latest_samples(Path(one)), _latest_samples(Path(other))
    shared = sorted(_png_names(ours) & _png_names(theirs))
    if not shared:
        raise EvaluationError(f"{one} and {other} have no image of the same prompt and seed")
    differences = []
    for name in shared:
        first, second = read_image(ours / name), read_image(theirs / name)
        if first.shape != second.shape:
            raise EvaluationError(f"{name}: {first.shape} and {second.shape}")
        differences.append(int(np.abs(first.astype(np.int16) - second).max()))
    return Agreement(len(shared), differences.count(0), max(differences))


def _png_names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def _latest_samples(record: Path) -> Path:
    done = (record.with_suffix("") / "samples").glob(f"*/{COMPLETE}")
    folders = sorted(done, key=lambda path: path.stat().st_mtime_ns)
    if not folders:
        raise EvaluationError(f"{record}: its samples are gone", hint="run `modelops eval` again")
    return folders[-1].parent
