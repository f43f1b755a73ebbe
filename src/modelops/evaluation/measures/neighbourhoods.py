"""Precision, recall, density and coverage."""

from __future__ import annotations

from modelops.evaluation.workbench import Workbench
from modelops.metrics.prdc import prdc

KEYS = ("precision_lite0", "recall_lite0", "density_lite0", "coverage_lite0")


def measure(bench: Workbench) -> None:
    """Measure precision, recall, density and coverage on Lite0 features."""
    reference, settings, lite0 = bench.real(), bench.settings, bench.extractor.protocol
    made = prdc(
        reference.features, bench.features, seed=settings.seed,
        neighbours=settings.neighbours, resamples=settings.resamples,
    )  # fmt: skip
    for name, interval in made.items():
        protocol = bench.set_protocol(lite0, name, neighbours=settings.neighbours)
        over = len(reference.samples) if name in ("recall", "coverage") else bench.n
        bench.put(f"{name}_lite0", interval, protocol, n=over, better=True)
