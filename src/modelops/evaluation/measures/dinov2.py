"""Fréchet and kernel distance on DINOv2 features, when its weights are given."""

from __future__ import annotations

from modelops.evaluation.workbench import Workbench
from modelops.metrics.frechet import DDOF, rank_warning
from modelops.metrics.kernel import kernel_distance

KEYS = ("frechet_distance_dinov2", "kernel_distance_dinov2")


def measure(bench: Workbench) -> None:
    """Measure distances to the reference images."""
    if bench.settings.dinov2_weights is not None:
        bench.real()  # without it there is no need to open them
    extractor = bench.open_extractor("dinov2")
    reference = bench.real()
    fake, real = bench.features_of(extractor), bench.real_features_of(reference, extractor)
    details = {"n_reference": len(real)}
    bench.put(
        KEYS[0],
        bench.frechet(fake, real, known=bench.real_statistics_of(reference, extractor)),
        bench.set_protocol(extractor.protocol, "frechet distance", ddof=DDOF), better=False,
        warnings=rank_warning(bench.n, len(real), extractor.dim), details=details,
    )  # fmt: skip
    bench.put(
        KEYS[1], kernel_distance(fake, real),
        bench.set_protocol(
            extractor.protocol, "kernel distance", kernel="(x.y/d + 1)^3, unbiased"
        ),
        better=False, details=details,
    )  # fmt: skip
