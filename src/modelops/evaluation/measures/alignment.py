"""Alignment of images with their prompts, by the LiT model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.base.files import sha256_tree
from modelops.evaluation.lit import RECORD
from modelops.evaluation.workbench import Workbench
from modelops.metrics.alignment import (
    Alignment,
    alignment_intervals,
    embeddings_to_alignment,
    retrieval_rate,
)
from modelops.metrics.intervals import bootstrap_mean
from modelops.models.lit import LitModel, load_lit
from modelops.records.base import InputRef, Measurement
from modelops.records.evaluation import AlignmentModelRecord
from modelops.records.read import read_record

KEYS = (
    "lit_alignment", "lit_alignment_shuffled", "lit_alignment_gain", "lit_alignment_real",
    "lit_retrieval_top1", "lit_retrieval_top5", "lit_heldout_retrieval_top1",
    "lit_heldout_retrieval_top5",
)  # fmt: skip


def measure(bench: Workbench) -> None:
    """Measure scores by the named alignment model, beside that model's own held-out rates."""
    record, directory = bench.record, bench.settings.lit
    if directory is None:
        raise EvaluationError("no alignment model was given (--lit)")
    if not bench.has_prompts:
        raise EvaluationError("the images have no prompts")
    model = load_lit(directory)
    record.inputs["lit"] = InputRef(path=str(directory), sha256=sha256_tree(directory))
    heldout: dict[str, Measurement] = {}
    if (directory / RECORD).is_file():
        fitted = read_record(directory / RECORD, AlignmentModelRecord)
        heldout = fitted.metrics
        for name in ("manifest", "splits"):
            ours, theirs = record.inputs.get(name), fitted.inputs.get(name)
            if ours and theirs and ours.sha256 != theirs.sha256:
                for measured in heldout.values():
                    measured.warnings.append(f"fitted on another {name}; may know these images")
    _measure(bench, model, heldout)


def _measure(bench: Workbench, model: LitModel, heldout: Mapping[str, Measurement]) -> None:
    """Measure the alignment of images with their own and with other prompts, by the LiT model.

    Args:
        heldout: the retrieval rates of its own record, repeated beside the scores.
    """
    settings, owner = bench.settings, bench.owner
    for k in (1, 5):
        key = f"lit_heldout_retrieval_top{k}"
        known = heldout.get(f"heldout_retrieval_top{k}")
        bench.record.metrics[key] = known or Measurement.missing(
            "the alignment model has no lit.json"
        )
    texts = model.texts_to_embeddings(bench.prompts.prompts)
    features = bench.features
    parts = [
        embeddings_to_alignment(
            model.features_to_embeddings(np.array(features[rows])),
            texts,
            bench.prompts.prompts,
            owner[rows],
        )
        for rows in bench.chunks()
    ]
    found = Alignment(
        *(np.concatenate([getattr(part, name) for part in parts])
          for name in ("own", "shuffled", "rank"))
    )  # fmt: skip
    protocol = {
        "metric": "alignment", "model_sha256": model.sha256, "prompt_template": "{}",
        "prompts": len(bench.prompts.prompts), "n": bench.n, "sampling": dict(bench.sampling),
    }  # fmt: skip
    made = alignment_intervals(found, owner, seed=settings.seed, resamples=settings.resamples)
    names = {"own": "lit_alignment", "shuffled": "lit_alignment_shuffled",
             "gain": "lit_alignment_gain"}  # fmt: skip
    for part, key in names.items():
        better = None if part == "shuffled" else True
        bench.put(key, made[part], {**protocol, "part": part}, better=better, unit="cosine")
    total = len(bench.samples.plan)
    for k in (1, 5):
        bench.put(
            f"lit_retrieval_top{k}", retrieval_rate(found.rank, k, n=total),
            {**protocol, "part": f"top-{k} among the prompts; a failed image is a miss"},
            n=total, better=True, unit="rate",
            details={"chance": min(1.0, k / len(bench.prompts.prompts))},
        )  # fmt: skip
    bench.per_image |= {
        "alignment": found.own.tolist(), "alignment_shuffled": found.shuffled.tolist(),
        "alignment_rank": found.rank.tolist(),
    }  # fmt: skip
    if bench.reference is None:
        bench.missing("no held-out images", "lit_alignment_real")
        return
    _note_real_gains(bench, model, texts)
    if not all(bench.reference.captions):
        bench.missing("the real images have no captions", "lit_alignment_real")
        return
    captions = model.texts_to_embeddings(bench.reference.captions)
    real = model.features_to_embeddings(bench.reference.features)
    cosines = (captions * real).sum(axis=1)
    bench.put(
        "lit_alignment_real",
        bootstrap_mean(
            cosines, seed=settings.seed, resamples=settings.resamples, purpose="alignment/real"
        ),
        {"metric": "alignment", "model_sha256": model.sha256, "part": "held-out images",
         "reference": bench.reference.digest},
        n=len(cosines), unit="cosine",
    )  # fmt: skip


def _note_real_gains(bench: Workbench, model: LitModel, texts: npt.NDArray[np.floating]) -> None:
    """Keep the alignment gain of the real image of each prompt, if prompts are its captions.

    If the real images of a slice score lower too, that points to the alignment model.

    Args:
        texts: embeddings of the prompts [P, E].
    """
    assert bench.reference is not None
    ids, prompts = bench.prompts.ids, bench.prompts.prompts
    rows = {sample.id: row for row, sample in enumerate(bench.reference.samples)}
    if not ids or not all(name in rows for name in ids):
        return
    pictures = bench.reference.features[[rows[name] for name in ids]]
    real = embeddings_to_alignment(
        model.features_to_embeddings(pictures), texts, prompts, np.arange(len(prompts))
    )
    gains = real.own - real.shuffled
    bench.per_image["alignment_gain_real"] = gains[bench.owner].tolist()
