"""FID through clean-fid's Inception, when its weights are given."""

from __future__ import annotations

from modelops.errors import EvaluationError
from modelops.evaluation.workbench import Workbench
from modelops.metrics.features import InceptionExtractor
from modelops.metrics.frechet import DDOF, frechet_interval, rank_warning

KEYS = ("fid",)


def measure(bench: Workbench) -> None:
    """Fréchet Inception distance to the reference pictures."""
    settings = bench.settings
    if settings.inception_weights is None:
        raise EvaluationError("no Inception weights were given (--inception-weights)")
    reference = bench.real()
    extractor = InceptionExtractor(settings.inception_weights)
    real = bench.real_features_of(reference, extractor)
    bench.put(
        "fid",
        frechet_interval(
            bench.features_of(extractor), real, seed=settings.seed, groups=settings.jackknife_groups
        ),
        bench.set_protocol(extractor.protocol, "fid", ddof=DDOF), better=False,
        warnings=rank_warning(bench.n, len(real), extractor.dim),
        details={"n_reference": len(real)},
    )  # fmt: skip
