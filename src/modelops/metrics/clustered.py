"""Intervals of a rate over images of which several belong to one prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.metrics.intervals import Interval, clopper_pearson, exact_bounds

PRIOR_CLUSTERS = 4  # weight of the worst case, in prompts that were hit


@dataclass(frozen=True, slots=True)
class ClusteredRate:
    """Interval of a rate, and the numbers behind it.

    Attributes:
        design_effect: variance of the rate over that of the same number of independent images, at
            least 1.
        effective_n: number of independent images with the same information.
    """

    interval: Interval
    clusters: int
    design_effect: float
    effective_n: float


def clustered_rate(
    hits: npt.NDArray[np.bool_] | list[bool],
    owners: npt.NDArray[np.int64] | list[int],
    *,
    confidence: float = 0.95,
) -> ClusteredRate:
    """Interval of the share of hits among images [n] that belong to prompts `owners` [n].

    One image a prompt, or one prompt only: the exact interval of Clopper and Pearson. Else theirs
    on the effective sample size n / deff (Korn and Graubard, 1998, "Confidence intervals for
    proportions with small expected number of positive counts estimated from survey data"), where
    deff comes from the between-prompt variance of the ratio estimator. A few hits cannot tell how
    alike a prompt's images are, and none cannot at all; so deff is averaged with that of images
    which are all alike, as if `PRIOR_CLUSTERS` more prompts had been hit and were so.

    Raises:
        EvaluationError: no images.
    """
    hit, owner = np.asarray(hits, bool), np.asarray(owners)
    n = len(hit)
    if n == 0 or len(owner) != n:
        raise EvaluationError(f"{n} images of {len(owner)} prompts give no rate")
    names, places = np.unique(owner, return_inverse=True)
    clusters, total = len(names), int(hit.sum())
    if clusters in (1, n):
        return ClusteredRate(
            clopper_pearson(total, n, confidence=confidence), clusters, 1.0, float(n)
        )
    sizes = np.bincount(places, minlength=clusters).astype(np.float64)
    found = np.bincount(places, weights=hit.astype(np.float64), minlength=clusters)
    rate = total / n
    all_alike = float((sizes**2).sum()) / n
    observed = all_alike
    if 0 < total < n:
        spread = float(((found - rate * sizes) ** 2).sum()) * clusters / (clusters - 1)
        observed = max(1.0, spread / n**2 / (rate * (1.0 - rate) / n))
    told = min(int((found > 0).sum()), int((found < sizes).sum()))
    effect = (told * observed + PRIOR_CLUSTERS * all_alike) / (told + PRIOR_CLUSTERS)
    effective = n / max(1.0, effect)
    low, high = exact_bounds(rate * effective, effective, confidence=confidence)
    method = "Clopper-Pearson on the effective sample size, clustered by prompt (Korn-Graubard)"
    return ClusteredRate(Interval(rate, low, high, method), clusters, effect, effective)
