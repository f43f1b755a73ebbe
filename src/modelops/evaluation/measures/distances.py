"""Fréchet and kernel distance on features that need no download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelops.base.seeding import numpy_generator
from modelops.evaluation.reference import RealPictures
from modelops.evaluation.workbench import Features, Workbench
from modelops.metrics.frechet import (
    DDOF,
    extrapolation_warning,
    frechet_infinity,
    rank_warning,
)
from modelops.metrics.kernel import kernel_distance

INFINITY_IMAGES = 4000  # that the extrapolation takes where features are streamed
KEYS = (
    "frechet_distance_lite0", "frechet_distance_lite0_floor", "kernel_distance_lite0",
    "kernel_distance_lite0_floor", "frechet_distance_infinity_lite0",
)  # fmt: skip


def measure(bench: Workbench) -> None:
    """Measure Fréchet and kernel distance on Lite0 features, also of the training images."""
    reference, lite0 = bench.real(), bench.extractor.protocol
    real, fake = reference.features, bench.features
    warnings = rank_warning(bench.n, len(real), real.shape[1])
    frechet = bench.set_protocol(lite0, "frechet distance", ddof=DDOF)
    kernel = bench.set_protocol(lite0, "kernel distance", kernel="(x.y/d + 1)^3, unbiased")
    bench.put(
        "frechet_distance_lite0",
        bench.frechet(
            fake, real, known=bench.real_statistics_of(reference, bench.extractor)
        ),
        frechet, better=False, warnings=warnings, details={"n_reference": len(real)},
    )  # fmt: skip
    bench.put(
        "kernel_distance_lite0", kernel_distance(fake, real), kernel,
        better=False, details={"n_reference": len(real)},
    )  # fmt: skip
    if bench.training is None:
        bench.missing("no training split", *(k for k in KEYS if k.endswith("floor")))
    else:
        _floor(bench, bench.training, frechet, kernel, warnings)
    put_infinity(  # last: it alone needs a few dozen images
        bench, "frechet_distance_infinity_lite0", bench.extractor.protocol, fake, real
    )


def _floor(
    bench: Workbench, training: RealPictures, frechet: Mapping[str, Any],
    kernel: Mapping[str, Any], warnings: Sequence[str],
) -> None:  # fmt: skip
    """Measure the distances of as many training images from the reference."""
    settings, reference = bench.settings, bench.real()
    real = reference.features
    count = min(bench.n, len(training.samples))
    rows = numpy_generator(settings.seed, "floor").permutation(len(training.samples))[:count]
    subset = training.features[rows]
    less = [f"only {count} training images for {bench.n} samples"] if count < bench.n else []
    floor = {"images": "training images", "n": count, "sampling": {"seed": settings.seed}}
    bench.put(
        "frechet_distance_lite0_floor",
        bench.frechet(subset, real, known=bench.real_statistics_of(reference, bench.extractor)),
        {**frechet, **floor}, n=count, better=False, warnings=[*warnings, *less],
        details={"n_reference": len(real)},
    )  # fmt: skip
    bench.put(
        "kernel_distance_lite0_floor", kernel_distance(subset, real), {**kernel, **floor},
        n=count, better=False, warnings=less, details={"n_reference": len(real)},
    )  # fmt: skip


def put_infinity(
    bench: Workbench,
    key: str,
    extractor: Mapping[str, Any],
    fake: Features,
    real: Features,
    *,
    warnings: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> None:
    """Put the distance of features [n, D] to real ones [m, D], extrapolated to infinitely many
    images.

    Args:
        extractor: its protocol.

    Raises:
        EvaluationError: too few images.
    """
    settings = bench.settings
    drawn: dict[str, int] = {}
    if bench.streams and bench.n > INFINITY_IMAGES:
        order = numpy_generator(settings.seed, "infinity-images").permutation(bench.n)
        fake = fake[np.sort(order[:INFINITY_IMAGES])]
        drawn = {"images_drawn": INFINITY_IMAGES}
    found = frechet_infinity(fake, real, seed=settings.seed)
    bench.put(
        key, found.interval,
        bench.set_protocol(
            extractor, "frechet distance, extrapolated to n = infinity", ddof=DDOF,
            sizes=[n for n, _ in found.points], **drawn,
        ),
        better=False,
        warnings=[*warnings, *extrapolation_warning(found, len(real), real.shape[1])],
        details={
            **(details or {}), "n_reference": len(real), "slope": found.slope,
            "points": "; ".join(f"{n}: {value:.4g}" for n, value in found.points),
        },
    )  # fmt: skip
