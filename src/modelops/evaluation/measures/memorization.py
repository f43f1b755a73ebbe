"""Nearest training pictures of samples against those of held-out pictures."""

from __future__ import annotations

from modelops.errors import EvaluationError
from modelops.evaluation.workbench import Workbench
from modelops.metrics.memorization import memorization_intervals, nearest_neighbours

KEYS = (
    "nearest_train_distance", "nearest_train_distance_heldout", "nearest_train_distance_gap",
    "near_copy_rate", "near_copy_rate_heldout",
)  # fmt: skip


def measure(bench: Workbench) -> None:
    """Nearest training pictures of samples and of real held-out pictures."""
    settings, lite0 = bench.settings, bench.extractor.protocol
    if bench.reference is None or bench.training is None:
        raise EvaluationError("no training and held-out pictures to compare with")
    training = bench.training
    samples = nearest_neighbours(bench.features, training.features)
    heldout = nearest_neighbours(bench.reference.features, training.features)
    made = memorization_intervals(
        samples, heldout, seed=settings.seed,
        near_copy_cosine=settings.near_copy_cosine, resamples=settings.resamples,
    )  # fmt: skip
    protocol = bench.set_protocol(
        lite0, "nearest training picture, 1 - cosine",
        training={"sha256": training.digest, "n": len(training.samples)},
        near_copy_cosine=settings.near_copy_cosine,
    )  # fmt: skip
    n_heldout = len(bench.reference.samples)
    counts: dict[str, tuple[str, int, bool | None, str]] = {
        "nearest_train_distance": ("samples", bench.n, None, "1 - cosine"),
        "nearest_train_distance_heldout": ("heldout", n_heldout, None, "1 - cosine"),
        "nearest_train_distance_gap": ("gap", bench.n, True, "1 - cosine"),
        "near_copy_rate": ("near_copies", bench.n, False, "rate"),
        "near_copy_rate_heldout": ("near_copies_heldout", n_heldout, None, "rate"),
    }
    for key, (part, n, better, unit) in counts.items():
        bench.put(key, made[part], protocol, n=n, better=better, unit=unit)
    bench.per_image["nearest_train_distance"] = samples.distance.tolist()
    bench.per_image["nearest_train_id"] = [training.samples[i].id for i in samples.index]
