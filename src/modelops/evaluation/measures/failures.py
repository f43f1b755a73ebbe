"""Images that could not be made."""

from __future__ import annotations

from modelops.evaluation.workbench import Workbench
from modelops.metrics.intervals import clopper_pearson

KEYS = ("failed_image_rate",)


def measure(bench: Workbench) -> None:
    """Measure the share of planned images that could not be made; unusable prompts count."""
    plan, failures = len(bench.samples.plan), len(bench.samples.failures)
    dropped = bench.prompts.dropped
    bench.put(
        "failed_image_rate", clopper_pearson(failures, plan),
        {"metric": "failed images", "sampling": dict(bench.sampling)}, n=plan, better=False,
        unit="rate",
        warnings=[f"{count} {what} {'line' if count == 1 else 'lines'} of the prompts left out"
                  for what, count in dropped.items()],
        details={"failed": failures, "blocked_by_source": len(bench.samples.blocked),
                 "unusable_prompts": len(bench.prompts.rejected),
                 **{f"{what}_prompts": count for what, count in dropped.items()},
                 **{f"unusable_{what}_pictures": len(pictures.unusable)
                    for what, pictures in (("reference", bench.reference),
                                           ("training", bench.training)) if pictures}},
    )  # fmt: skip
