"""Diversity of the images of one prompt, beside that of different prompts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.metrics.intervals import Interval, bootstrap_mean, jackknife_interval

Floats = npt.NDArray[np.float64]


def within_prompts(
    features: npt.NDArray[np.floating], owner: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Mean pairwise 1 - cosine of the images of each prompt that has two or more.

    Args:
        features: [N, D], finite, not zero.
        owner: the prompt of each image [N].

    Returns:
        The prompts [P'] in order and their values [P'], float64, in [0, 2].
    """
    total, count, names = _prompt_sums(features, owner)
    several = count > 1
    pairs = count[several] * (count[several] - 1)
    cosine = ((total[several] ** 2).sum(axis=1) - count[several]) / pairs
    return names[several], np.maximum(0.0, 1.0 - cosine)


def diversity(
    features: npt.NDArray[np.floating],
    owner: npt.NDArray[np.integer],
    *,
    seed: int,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """{"within", "between"}: mean 1 - cosine of two images of one prompt, and of two prompts.

    "within" averages over prompts with two or more images, prompts being resampled. "between"
    averages over pairs of prompts; its interval leaves out one prompt at a time, because a prompt
    is part of many pairs (a U-statistic: resampling the prompts' means would halve the variance).

    Raises:
        EvaluationError: fewer than two prompts have two images.
    """
    names, within = within_prompts(features, owner)
    if len(names) < 2:
        raise EvaluationError("fewer than two prompts have two images or more")
    total, count, _ = _prompt_sums(features, owner)
    mean = total / count[:, None]
    everything, n = mean.sum(axis=0), len(mean)
    own = (mean**2).sum(axis=1)
    value = 1.0 - float((everything**2).sum() - own.sum()) / (n * (n - 1))
    method = "delete-a-prompt jackknife"
    if n < 3:
        raise EvaluationError("fewer than three prompts: no interval between prompts")
    left = ((everything - mean) ** 2).sum(axis=1) - (own.sum() - own)
    between = jackknife_interval(value, [1.0 - left / ((n - 1) * (n - 2))], method=method)
    return {
        "within": bootstrap_mean(within, seed=seed, resamples=resamples, purpose="diversity"),
        "between": between,
    }


def _prompt_sums(
    features: npt.NDArray[np.floating], owner: npt.NDArray[np.integer]
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Unit features' sum [P, D] and count [P] by prompt; the prompts [P]."""
    names, place = np.unique(owner, return_inverse=True)
    total = np.zeros((len(names), features.shape[1]))
    for start in range(0, len(features), 1024):  # which may lie in a file
        data = np.asarray(features[start : start + 1024], np.float64)
        lengths = np.linalg.norm(data, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or (lengths == 0).any():
            raise EvaluationError("an image has features that are zero or not finite")
        np.add.at(total, place[start : start + 1024], data / lengths)
    return total, np.bincount(place).astype(np.float64), names.astype(np.int64)
