"""FID, KID, Inception Score, precision and recall on Inception features, when weights are given."""

from __future__ import annotations

from modelops.evaluation.measures.distances import put_infinity
from modelops.evaluation.workbench import Workbench
from modelops.metrics.frechet import DDOF, rank_warning
from modelops.metrics.inception import (
    SPLITS,
    InceptionExtractor,
    logits_to_inception_score,
    shuffled_order,
    streamed_inception_score,
)
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.known import KnownStatistics, known_interval
from modelops.metrics.prdc import prdc

KEYS = (
    "fid", "fid_infinity", "kid", "inception_score", "precision_inception", "recall_inception",
    "density_inception", "coverage_inception",
)  # fmt: skip


def measure(bench: Workbench) -> None:
    """Measure distances to the reference images, and the score of the images alone."""
    extractor: InceptionExtractor = bench.open_extractor("inception")
    bench.attempt(lambda bench: _measure_score(bench, extractor), ("inception_score",))
    _measure_distances(bench, extractor)


def _measure_score(bench: Workbench, extractor: InceptionExtractor) -> None:
    features, order = bench.features_of(extractor), shuffled_order(bench.n, bench.settings.seed)
    if bench.streams:
        made = streamed_inception_score(extractor, features, order=order)
        whole = streamed_inception_score(extractor, features, splits=1)
    else:
        logits = extractor.features_to_logits(features)
        made = logits_to_inception_score(logits, order=order)
        whole = logits_to_inception_score(logits, splits=1)
    protocol = {
        "metric": "inception score", "features": extractor.protocol, "n": bench.n,
        "logits": "1008, without bias", "splits": SPLITS, "seed": bench.settings.seed,
        "sampling": dict(bench.sampling),
    }  # fmt: skip
    bench.put(
        "inception_score",
        made, protocol, better=True, warnings=extractor.warnings,
        details={"mode": extractor.mode, "images_per_split": bench.n // SPLITS,
                 "one_split": whole.value},
    )  # fmt: skip


def _measure_distances(bench: Workbench, extractor: InceptionExtractor) -> None:
    if bench.known is not None:
        _measure_known(bench, extractor, bench.known)
    settings, reference = bench.settings, bench.real()
    real, fake = bench.real_features_of(reference, extractor), bench.features_of(extractor)
    details = {"mode": extractor.mode, "n_reference": len(real)}
    bench.put(
        "fid",
        bench.frechet(fake, real, known=bench.real_statistics_of(reference, extractor)),
        bench.set_protocol(extractor.protocol, "fid", ddof=DDOF), better=False,
        warnings=[*extractor.warnings, *rank_warning(bench.n, len(real), extractor.dim)],
        details=details,
    )  # fmt: skip
    bench.attempt(
        lambda bench: put_infinity(
            bench,
            "fid_infinity",
            extractor.protocol,
            fake,
            real,
            warnings=extractor.warnings,
            details=details,
        ),
        ("fid_infinity",),
    )
    bench.put(
        "kid", kernel_distance(fake, real),
        bench.set_protocol(extractor.protocol, "kid", kernel="(x.y/d + 1)^3, unbiased"),
        better=False, warnings=extractor.warnings, details=details,
    )  # fmt: skip
    made = prdc(
        real, fake, seed=settings.seed, neighbours=settings.neighbours,
        resamples=settings.resamples,
    )  # fmt: skip
    for name, interval in made.items():
        protocol = bench.set_protocol(extractor.protocol, name, neighbours=settings.neighbours)
        over = len(real) if name in ("recall", "coverage") else bench.n
        bench.put(
            f"{name}_inception", interval, protocol, n=over, better=True,
            warnings=extractor.warnings, details=details,
        )  # fmt: skip


def _measure_known(bench: Workbench, extractor: InceptionExtractor, known: KnownStatistics) -> None:
    """Measure the distance to statistics that others have made of real images."""
    protocol = {
        **bench.set_protocol(extractor.protocol, "fid", ddof=DDOF),
        "reference": {"statistics_sha256": known.sha256},
    }
    found = known_interval(
        bench.features_of(extractor), known,
        seed=bench.settings.seed, groups=bench.settings.jackknife_groups,
    )  # fmt: skip
    bench.put(
        "fid", found, protocol, better=False, details={"mode": extractor.mode},
        warnings=[
            *extractor.warnings,
            f"{known.path.name} does not say how its images were resized, nor how many they are; "
            f"this distance is right only if that was {extractor.mode}",
        ],
    )  # fmt: skip
