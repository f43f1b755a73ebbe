"""Unsafe images. A broken filter makes the record `failed`, never 0."""

from __future__ import annotations

from modelops.errors import EvaluationError, ModelopsError
from modelops.evaluation.workbench import Workbench
from modelops.metrics.intervals import clopper_pearson
from modelops.safety.image import ImageFilter, OpenNsfwFilter

KEYS = ("unsafe_rate",)


def measure(bench: Workbench) -> None:
    """Share of images that the image filter would block."""
    settings = bench.settings
    if settings.safety == "none":
        raise EvaluationError("turned off by --safety none")
    try:
        _measure(bench, OpenNsfwFilter(threshold=settings.safety_threshold))
    except ModelopsError as error:
        bench.missing(f"the safety filter failed: {error.message}", *KEYS)
        bench.problems.append(f"unsafe_rate: {error.message}")


def _measure(bench: Workbench, image_filter: ImageFilter) -> None:
    """Share of images that the filter would block, before any filter of ours.

    Raises:
        SafetyFilterError: an image could not be scored. Nothing is reported then, least of all 0.
    """
    verdicts = [image_filter.check([bench.image(row)])[0] for row in range(bench.n)]
    blocked_before = len(bench.samples.blocked)
    unsafe = sum(verdict.blocked for verdict in verdicts) + blocked_before
    warnings = [
        f"{blocked_before} images blocked by the source's own filter count as unsafe"
    ] if blocked_before else []  # fmt: skip
    n = len(verdicts) + blocked_before
    if n == 0:
        raise EvaluationError("no images to check")
    bench.put(
        "unsafe_rate", clopper_pearson(unsafe, n),
        {"metric": "unsafe images", "filter": dict(image_filter.info),
         "sampling": dict(bench.sampling)},
        n=n, better=False, unit="rate", warnings=warnings, details={"unsafe": unsafe},
    )  # fmt: skip
    bench.per_image["nsfw_score"] = [verdict.score for verdict in verdicts]
