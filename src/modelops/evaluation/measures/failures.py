"""Images that could not be made."""

from __future__ import annotations

from modelops.evaluation.workbench import Workbench
from modelops.metrics.intervals import clopper_pearson

KEYS = ("failed_image_rate",)


def measure(bench: Workbench) -> None:
    """Share of planned images that could not be made."""
    plan, failures = len(bench.samples.plan), len(bench.samples.failures)
    bench.put(
        "failed_image_rate", clopper_pearson(failures, plan),
        {"metric": "failed images", "sampling": dict(bench.sampling)}, n=plan, better=False,
        unit="rate", details={"failed": failures, "blocked_by_source": len(bench.samples.blocked)},
    )  # fmt: skip
