"""CLIPScore, when CLIP weights are given."""

from __future__ import annotations

import numpy as np

from modelops.errors import EvaluationError
from modelops.evaluation.workbench import Workbench
from modelops.metrics.alignment import per_prompt
from modelops.metrics.clip import ClipScorer
from modelops.metrics.intervals import bootstrap_mean

KEYS = ("clipscore",)


def measure(bench: Workbench) -> None:
    """CLIPScore in its paper's definition, averaged over prompts."""
    settings = bench.settings
    if settings.clip_weights is None:
        raise EvaluationError("no CLIP weights were given (--clip-weights)")
    scorer = ClipScorer(settings.clip_weights, settings.clip_model)
    scores = [
        float(scorer.scores([bench.image(row)], [prompt])[0])
        for row, prompt in enumerate(bench.made_prompts)
    ]
    bench.per_image["clipscore"] = scores
    interval = bootstrap_mean(
        per_prompt(np.array(scores), bench.owner), seed=settings.seed,
        resamples=settings.resamples, purpose="clipscore",
    )  # fmt: skip
    protocol = {
        "metric": "clipscore", **scorer.protocol, "n": bench.n, "sampling": dict(bench.sampling),
    }  # fmt: skip
    bench.put("clipscore", interval, protocol, better=True, unit="2.5 max(0, cosine)")
