"""Fit the offline alignment model on the training split, and measure it on held-out images."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.environment import current_environment
from modelops.base.errors import UsageError
from modelops.base.files import atomic_directory, sha256_file
from modelops.base.locks import refuse_foreign
from modelops.data.embeddings import embed_manifest
from modelops.data.manifest import read_manifest
from modelops.data.split import read_splits
from modelops.metrics.intervals import clopper_pearson
from modelops.models import lit
from modelops.models.encoders import LITE0_NAME, MINILM_NAME
from modelops.records.base import InputRef, Measurement
from modelops.records.evaluation import AlignmentModelRecord

RECORD = "lit.json"
_OURS = re.compile("|".join(map(re.escape, (*lit.FILES, RECORD))))
TOP_K = (1, 5)
OnProgress = Callable[[int, int], None]


def fit_lit(
    manifest_path: str | Path,
    splits_path: str | Path,
    out_dir: str | Path,
    *,
    seed: int = 0,
    candidates: Sequence[lit.HeadSettings] = lit.CANDIDATES,
    on_progress: OnProgress | None = None,
) -> AlignmentModelRecord:
    """Fit heads for each candidate on `train`, keep the best on `val`, measure it on `test`.

    Writes an open_clip checkpoint directory with `lit.json` in it. Image features come from the
    cache of the deduplication, if there is one.

    Raises:
        UsageError: the manifest's splits lack one of train, val, test; or `out_dir` holds files
            that are not of an alignment model, which it would replace.
    """
    refuse_foreign(out_dir, _OURS)
    started, clock = datetime.now(UTC), time.monotonic()
    pairs, captions = _split_pairs(Path(manifest_path), Path(splits_path))
    results: list[tuple[float, lit.HeadSettings, Any, Any]] = []
    total = sum(candidate.epochs for candidate in candidates)
    done = 0
    for candidate in candidates:
        heads = lit.fit_heads(
            pairs["train"], candidate, seed=seed,
            on_progress=_offset(on_progress, done, total),
        )  # fmt: skip
        done += candidate.epochs
        ranks = lit.retrieval_ranks(*heads, pairs["val"])
        # Mean reciprocal rank orders candidates with less noise than top-1 of a few hundred.
        results.append((float((1.0 / (ranks + 1)).mean()), candidate, *heads))
    _, chosen, image_head, text_head = max(results, key=lambda result: result[0])

    metrics: dict[str, Measurement] = {}
    for split in ("val", "test"):
        ranks = lit.retrieval_ranks(image_head, text_head, pairs[split])
        metrics |= _retrieval(ranks, "heldout" if split == "test" else "validation")
    with atomic_directory(out_dir) as directory:
        lit.save_lit(directory, image_head, text_head, chosen)
        record = AlignmentModelRecord(
            image_tower=LITE0_NAME,
            text_tower=MINILM_NAME,
            weights_sha256=sha256_file(directory / lit.WEIGHTS),
            settings=lit.settings_as_dict(chosen),
            counts={split: len(pairs[split].images) for split in pairs}
            | {"distinct_test_captions": len(set(captions["test"]))},
            candidates=[
                {**lit.settings_as_dict(candidate), "validation_mrr": score}
                for score, candidate, *_ in results
            ],
            metrics=metrics,
            inputs={
                "manifest": InputRef(path=str(manifest_path), sha256=sha256_file(manifest_path)),
                "splits": InputRef(path=str(splits_path), sha256=sha256_file(splits_path)),
            },
            seeds={"heads": seed},
            environment=current_environment(),
            started_at=started,
            duration_s=time.monotonic() - clock,
        )
        record.write(directory / RECORD)
    return record


def _retrieval(ranks: npt.NDArray[np.int64], name: str) -> dict[str, Measurement]:
    measured = {}
    for k in TOP_K:
        interval = clopper_pearson(int((ranks < k).sum()), len(ranks))
        measured[f"{name}_retrieval_top{k}"] = Measurement(
            value=interval.value, low=interval.low, high=interval.high, method=interval.method,
            n=len(ranks), unit="rate", higher_is_better=True,
            details={"chance": min(1.0, k / len(ranks))},
        )  # fmt: skip
    return measured


def _split_pairs(
    manifest_path: Path, splits_path: Path
) -> tuple[dict[str, lit.TowerFeatures], dict[str, list[str]]]:
    manifest = read_manifest(manifest_path)
    splits = read_splits(splits_path)
    embedded = embed_manifest(manifest)
    texts = lit.texts_to_tower_features([sample.caption for sample in embedded.samples])
    places: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for index, sample in enumerate(embedded.samples):
        if (split := splits.get(sample.id)) in places:
            places[split].append(index)
    for split, rows in places.items():
        if len(rows) < 2:
            raise UsageError(
                f"{splits_path}: {len(rows)} samples in {split}; at least two are needed",
                hint="make the splits again from a larger manifest",
            )
    pairs = {
        split: lit.TowerFeatures(embedded.features[rows], texts[rows])
        for split, rows in places.items()
    }
    captions = {s: [embedded.samples[i].caption for i in rows] for s, rows in places.items()}
    return pairs, captions


def _offset(on_progress: OnProgress | None, done: int, total: int) -> OnProgress | None:
    if on_progress is None:
        return None
    report = on_progress
    return lambda current, _: report(done + current, total)
