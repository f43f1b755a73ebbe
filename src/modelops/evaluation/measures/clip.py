"""CLIPScore in both definitions, retrieval and distances, when CLIP or SigLIP weights are given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from modelops.base.errors import EvaluationError
from modelops.evaluation.workbench import Workbench
from modelops.metrics.alignment import embeddings_to_alignment, per_prompt, retrieval_rate
from modelops.metrics.clip import PREFIX, ClipModel, clipscores, torchmetrics_clip_scores
from modelops.metrics.cmmd import cmmd, statistics_to_cmmd
from modelops.metrics.frechet import DDOF, rank_warning
from modelops.metrics.intervals import Interval, bootstrap_mean
from modelops.metrics.streaming import streamed_interval
from modelops.records.base import InputRef

SCORES = ("clipscore", "clip_score_torchmetrics")
RETRIEVAL = ("clip_retrieval_top1", "clip_retrieval_top5")
DISTANCES = ("cmmd", "frechet_distance_clip")
KEYS = SCORES + RETRIEVAL + DISTANCES


def measure(bench: Workbench) -> None:
    """Measure distances to real images, scores and retrieval rates; images are encoded once. A
    CLIPScore needs CLIP, so SigLIP's weights give no score."""
    settings = bench.settings
    if bench.n == 0 and settings.clip_weights is not None:
        raise EvaluationError("no images")
    model: ClipModel = bench.open_extractor("clip")
    bench.record.inputs["clip"] = InputRef(
        path=str(settings.clip_weights), sha256=model.protocol["weights_sha256"]
    )
    bench.attempt(lambda bench: _put_distances(bench, model), DISTANCES)
    if not bench.has_prompts:
        raise EvaluationError("the images have no prompts")
    prompts, owner = list(bench.prompts.prompts), bench.owner
    images = bench.features_of(model)
    texts = model.texts_to_embeddings(prompts)
    if not (all(np.isfinite(images[rows]).all() for rows in bench.chunks())
            and np.isfinite(texts).all()):  # fmt: skip
        raise EvaluationError("the CLIP model gives embeddings that are not finite")
    protocol = {**model.protocol, "n": bench.n, "sampling": dict(bench.sampling)}
    if model.is_siglip:
        bench.missing(
            "the weights are SigLIP's; a CLIPScore is made with CLIP", *SCORES, *RETRIEVAL
        )
    else:
        _put_scores(bench, model, images, texts, protocol)

    prefix = "siglip" if model.is_siglip else "clip"
    if len(prompts) < 2:
        bench.missing("retrieval needs at least two prompts", *RETRIEVAL)
        return
    rank = np.concatenate([
        embeddings_to_alignment(images[rows], texts, prompts, owner[rows]).rank
        for rows in bench.chunks()
    ])  # fmt: skip
    bench.per_image[f"{prefix}_rank"] = rank.tolist()
    total = len(bench.samples.plan)
    for k in (1, 5):
        bench.put(
            f"{prefix}_retrieval_top{k}", retrieval_rate(rank, k, n=total),
            {**protocol, "metric": "retrieval", "prompt_template": "{}", "prompts": len(prompts),
             "part": f"top-{k} among the prompts; a failed image is a miss"},
            n=total, better=True, unit="rate", warnings=_cut(model, prompts),
            details={"chance": min(1.0, k / len(prompts))},
        )  # fmt: skip


def _put_distances(bench: Workbench, model: ClipModel) -> None:
    """Put Gaussian MMD and Fréchet distance to the reference images, on image embeddings."""
    settings, reference = bench.settings, bench.real()
    fake, real = bench.features_of(model), bench.real_features_of(reference, model)
    known = bench.real_statistics_of(reference, model)
    details = {"n_reference": len(real)}
    key = "cmmd" if model.is_vit_l_14_336 else "gaussian_mmd_clip"
    if key != "cmmd":
        bench.missing("CMMD is defined on CLIP ViT-L/14-336; these weights are another's", "cmmd")
    kernel = "exp(-|x - y|^2 / 200), V-statistic"
    if known is None:
        made = cmmd(fake, real)
    else:
        kernel += ", from two moments"
        made = streamed_interval(
            fake, real, lambda x, y: statistics_to_cmmd(x, y).value, known=known,
            seed=settings.seed, groups=settings.jackknife_groups,
        )  # fmt: skip
    bench.put(
        key, made, bench.set_protocol(model.protocol, key, kernel=kernel),
        better=False, unit="1000 MMD^2", details=details,
    )  # fmt: skip
    bench.put(
        "frechet_distance_clip",
        bench.frechet(fake, real, known=known),
        bench.set_protocol(model.protocol, "frechet distance", ddof=DDOF), better=False,
        warnings=rank_warning(bench.n, len(real), model.dim), details=details,
    )  # fmt: skip


def _put_scores(
    bench: Workbench,
    model: ClipModel,
    images: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    texts: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    protocol: dict[str, object],
) -> None:
    """Put the paper's score, averaged over prompts, and torchmetrics', averaged over images."""
    settings, owner = bench.settings, bench.owner
    prefixed = [PREFIX + prompt for prompt in bench.prompts.prompts]
    named = model.texts_to_embeddings(prefixed)
    paper = np.concatenate([
        clipscores(images[rows], named[owner[rows]]) for rows in bench.chunks()
    ])  # fmt: skip
    bench.per_image["clipscore"] = paper.tolist()
    options = {"seed": settings.seed, "resamples": settings.resamples}
    bench.put(
        "clipscore", bootstrap_mean(per_prompt(paper, owner), purpose="clipscore", **options),
        {**protocol, "metric": "clipscore", "prompt_template": PREFIX + "{}",
         "formula": "2.5 * max(0, cos), per image"},
        better=True, unit="2.5 max(0, cosine)", warnings=_cut(model, prefixed),
    )  # fmt: skip
    scaled = np.concatenate([
        torchmetrics_clip_scores(images[rows], texts[owner[rows]]) for rows in bench.chunks()
    ])  # fmt: skip
    bench.per_image["clip_score_torchmetrics"] = scaled.tolist()
    # Prompts are resampled, and weigh by their images: the value is the mean over images.
    _, counts = np.unique(owner, return_counts=True)
    weighed = per_prompt(scaled, owner) * counts / counts.mean()
    made = bootstrap_mean(weighed, purpose="clip_score_torchmetrics", **options)
    bench.put(
        "clip_score_torchmetrics", _clamped(made),
        {**protocol, "metric": "clip_score_torchmetrics", "prompt_template": "{}",
         "formula": "max(0, mean of 100 * cos)"},
        better=True, unit="100 cosine", warnings=_cut(model, list(bench.prompts.prompts)),
    )  # fmt: skip


def _clamped(made: Interval) -> Interval:
    return replace(
        made, value=max(0.0, made.value), low=max(0.0, made.low), high=max(0.0, made.high)
    )


def _cut(model: ClipModel, texts: list[str]) -> list[str]:
    count = model.cut_texts(texts)
    return [f"{count} prompts reach or pass the model's context length and may be cut"] * bool(
        count
    )
