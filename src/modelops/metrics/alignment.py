"""Alignment of images with their own prompts, against that with other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.metrics.intervals import Interval, bootstrap_mean, clopper_pearson

Floats = npt.NDArray[np.float64]
MAX_SIMILARITIES = 8_000_000  # float64 values in memory at once


@dataclass(frozen=True, slots=True)
class Alignment:
    """Per-image values [N], float64, of one alignment model."""

    own: Floats  # cosine with the image's own prompt
    shuffled: Floats  # mean cosine with every other prompt
    rank: npt.NDArray[np.int64]  # place of the own prompt among all prompts; 0 is the best


def embeddings_to_alignment(
    images: npt.NDArray[np.floating],
    texts: npt.NDArray[np.floating],
    prompts: Sequence[str],
    owner: npt.NDArray[np.int64],
) -> Alignment:
    """Image embeddings [N, E], text embeddings [P, E] of P distinct prompts, owner [N] in [0, P).

    All embeddings are normalised here. `shuffled` averages over all P - 1 other prompts: the
    expectation of a random shuffle, without its noise. Ties count against the own prompt.

    Raises:
        EvaluationError: fewer than two distinct prompts.
    """
    if len(set(prompts)) != len(prompts):
        raise EvaluationError("prompts must be distinct; give each image its prompt's index")
    if len(prompts) < 2:
        raise EvaluationError("alignment needs at least two distinct prompts")
    left, right = _unit(images), _unit(texts)
    own, total = np.empty(len(left)), np.empty(len(left))
    rank = np.empty(len(left), np.int64)
    block = max(1, MAX_SIMILARITIES // len(right))
    for start in range(0, len(left), block):
        rows = slice(start, start + block)
        similarity = left[rows] @ right.T
        own[rows] = similarity[np.arange(len(similarity)), owner[rows]]
        total[rows] = similarity.sum(axis=1)
        rank[rows] = (similarity >= own[rows, None]).sum(axis=1) - 1
    return Alignment(own, (total - own) / (len(prompts) - 1), rank)


def per_prompt(values: npt.NDArray[np.floating], owner: npt.NDArray[np.int64]) -> Floats:
    """Mean of the values [N] of each prompt, for intervals over prompts; [P'], sorted by prompt."""
    _, place = np.unique(owner, return_inverse=True)
    return np.asarray(np.bincount(place, np.asarray(values, np.float64)) / np.bincount(place))


def alignment_intervals(
    alignment: Alignment, owner: npt.NDArray[np.int64], *, seed: int, resamples: int = 2000
) -> dict[str, Interval]:
    """{"own", "shuffled", "gain"}: means over prompts, prompts being resampled.

    "gain" is own minus shuffled within each image, so its interval is a paired one.
    """
    parts = {
        "own": alignment.own,
        "shuffled": alignment.shuffled,
        "gain": alignment.own - alignment.shuffled,
    }
    return {
        name: bootstrap_mean(
            per_prompt(values, owner), seed=seed, resamples=resamples, purpose=f"alignment/{name}"
        )
        for name, values in parts.items()
    }


def retrieval_rate(rank: npt.NDArray[np.int64], k: int, *, n: int | None = None) -> Interval:
    """Share of images whose own prompt is among their k nearest; n also counts failed images."""
    return clopper_pearson(int((rank < k).sum()), n or len(rank))


def paired_difference(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 2000,
    purpose: str = "paired",
) -> Interval:
    """Mean of first - second over the same prompts [P], prompts being resampled.

    Raises:
        EvaluationError: the two have different lengths.
    """
    if len(first) != len(second):
        raise EvaluationError(f"{len(first)} and {len(second)} values cannot be paired")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return bootstrap_mean(difference, seed=seed, resamples=resamples, purpose=purpose)


def _unit(vectors: npt.NDArray[np.floating]) -> Floats:
    data = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(data, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise EvaluationError("an embedding is zero or not finite")
    return np.asarray(data / lengths)
