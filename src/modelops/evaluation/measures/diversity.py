"""Diversity of the images of one prompt."""

from __future__ import annotations

from modelops.base.errors import EvaluationError
from modelops.evaluation.workbench import Workbench
from modelops.metrics.diversity import diversity, within_prompts

KEYS = ("diversity_lite0", "diversity_lite0_between")


def measure(bench: Workbench) -> None:
    """Measure the mean pairwise distance within prompts and between them. Neither has a better
    direction: noise is diverse, and a prompt may allow only one image."""
    if bench.record.source.kind == "folder" and bench.settings.prompts_file is None:
        raise EvaluationError("the images have no prompts")
    if bench.sampling["replicates"] < 2:
        raise EvaluationError("each prompt has one image (--replicates 2)")
    made = diversity(
        bench.features, bench.owner, seed=bench.settings.seed, resamples=bench.settings.resamples
    )
    names, _ = within_prompts(bench.features, bench.owner)
    counts = {"within": len(names), "between": len(set(bench.owner.tolist()))}
    single = counts["between"] - counts["within"]
    warnings = [f"{single} prompts have one image only and are left out"] if single else []
    for key, part in zip(KEYS, ("within", "between"), strict=True):
        protocol = {
            "metric": f"diversity, {part} prompts, 1 - cosine", "n": bench.n,
            "features": dict(bench.extractor.protocol), "sampling": dict(bench.sampling),
        }  # fmt: skip
        bench.put(
            key, made[part], protocol, n=counts[part], unit="1 - cosine",
            warnings=warnings if part == "within" else [],
        )  # fmt: skip
