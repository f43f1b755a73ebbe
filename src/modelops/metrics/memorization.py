"""Memorization: nearest training images of samples, compared with those of held-out images.

A sample close to a training image proves nothing alone: held-out images have close training
neighbours too. The difference to their base rate counts, and whether the features could have shown
a copy at all. Distances are cosine distances, 1 - cosine, in [0, 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.metrics.intervals import (
    Interval,
    bootstrap_median,
    bootstrap_median_difference,
    clopper_pearson,
)

ALPHA = 0.05  # of all tests together
POWER = 0.8
COPY_RATE = 0.05  # share of copies that must be detectable before their absence means something
ROUNDING = 1e-6  # of a cosine in float32
SINGLED_OUT = 1.5  # ratio of two distances
BLOCK = 1 << 24  # similarities held in memory at a time

Distances = npt.NDArray[np.float64]
TestName = Literal["near_copies", "unauthentic", "closer"]
Answer = Literal["copies", "no sign of copying", "cannot tell"]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Nearest training image of each query.

    Attributes:
        distance: [N] in [0, 2].
        index: [N] row of the training features.
        second: [N] distance of the next nearest one; None if it was not searched.
    """

    distance: Distances
    index: npt.NDArray[np.int64]
    second: Distances | None = None

    def __len__(self) -> int:
        return len(self.distance)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Neighbours:
        """Those of some of the queries."""
        second = None if self.second is None else self.second[rows]
        return Neighbours(self.distance[rows], self.index[rows], second)


@dataclass(frozen=True, slots=True)
class CopyingTest:
    """One one-sided test of samples against held-out images.

    Attributes:
        name: "near_copies", "unauthentic" or "closer".
        hits, heldout_hits: counts behind a rate; None where a rank test has none.
        p_value, p_adjusted: unadjusted, and by Holm's method over the tests made together.
    """

    name: TestName
    hits: int | None
    n: int
    heldout_hits: int | None
    n_heldout: int
    method: str
    p_value: float
    p_adjusted: float

    @property
    def found(self) -> bool:
        return self.p_adjusted <= ALPHA


@dataclass(frozen=True, slots=True)
class CopyingVerdict:
    """Verdict of all tests together.

    Attributes:
        answer: "copies", "no sign of copying" or "cannot tell".
        detectable_rate: smallest share of copies that the near-copy test finds with 80 % power;
            None if it finds none however many there are.
    """

    answer: Answer
    reason: str
    tests: tuple[CopyingTest, ...]
    detectable_rate: float | None


def nearest_neighbours(
    queries: npt.NDArray[np.floating], training: npt.NDArray[np.floating]
) -> Neighbours:
    """Nearest row of training [M, D] by cosine for each of queries [N, D]; exact.

    Raises:
        EvaluationError: no training features, or a feature that is zero or not finite.
    """
    if len(training) == 0:
        raise EvaluationError("no training images to compare with")
    # Plain products in blocks: an exact search gains nothing from FAISS, whose threads would spin
    # beside a training step when the trainer's early checks call this.
    known = _unit(training)
    distance, index = np.empty(len(queries), np.float64), np.empty(len(queries), np.int64)
    second = np.full(len(queries), 2.0)
    block = max(1, BLOCK // len(known))
    for start in range(0, len(queries), block):
        similarity = _unit(queries[start : start + block]) @ known.T
        best = similarity.argmax(axis=1)
        index[start : start + block] = best
        distance[start : start + block] = 1.0 - similarity[np.arange(len(best)), best]
        if len(known) > 1:
            similarity[np.arange(len(best)), best] = -np.inf
            second[start : start + block] = 1.0 - similarity.max(axis=1)
    return Neighbours(np.clip(distance, 0.0, 2.0), index, np.clip(second, 0.0, 2.0))


def own_neighbour_distances(
    training: npt.NDArray[np.floating], rows: npt.NDArray[np.int64]
) -> Distances:
    """Distance [K] of each of the training images `rows` [K] to its nearest other one.

    Raises:
        EvaluationError: fewer than two training images.
    """
    if len(training) < 2:
        raise EvaluationError("one training image has no training neighbour")
    known = _unit(training)
    chosen, place = np.unique(rows, return_inverse=True)
    found = np.empty(len(chosen), np.float64)
    block = max(1, BLOCK // len(known))
    for start in range(0, len(chosen), block):
        part = chosen[start : start + block]
        similarity = known[part] @ known.T
        similarity[np.arange(len(part)), part] = -np.inf
        found[start : start + block] = 1.0 - similarity.max(axis=1)
    return np.clip(found, 0.0, 2.0)[place]


def is_authentic(neighbours: Neighbours, own: Distances) -> npt.NDArray[np.bool_]:
    """[N] whether each query is farther from its nearest training image than that image is from
    its own nearest training neighbour (Alaa et al., 2022, "How faithful is your synthetic data?").

    Args:
        own: [N] distance of each query's nearest training image to its own nearest neighbour.
    """
    authentic: npt.NDArray[np.bool_] = neighbours.distance > own + ROUNDING
    return authentic


def is_singled_out(neighbours: Neighbours) -> npt.NDArray[np.bool_]:
    """[N] whether the next training image is at least `SINGLED_OUT` times as far as the nearest:
    an image made from one training image is close to that one alone, an average of many is
    about as close to several (as in Carlini et al., 2023, "Extracting training data")."""
    if neighbours.second is None:
        return np.zeros(len(neighbours), np.bool_)
    singled: npt.NDArray[np.bool_] = (
        neighbours.second >= SINGLED_OUT * neighbours.distance + ROUNDING
    )
    return singled


def memorization_intervals(
    samples: Neighbours,
    heldout: Neighbours,
    *,
    seed: int,
    near_copy_cosine: float = 0.95,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """{"samples", "heldout", "gap"}: median distances and samples minus held-out;
    {"near_copies", "near_copies_heldout"}: rates of cosine >= near_copy_cosine."""
    options = {"seed": seed, "resamples": resamples}
    return {
        "samples": bootstrap_median(samples.distance, purpose="nearest/samples", **options),
        "heldout": bootstrap_median(heldout.distance, purpose="nearest/heldout", **options),
        "gap": bootstrap_median_difference(
            samples.distance, heldout.distance, purpose="nearest/gap", **options
        ),
        "near_copies": rate(is_near_copy(samples, near_copy_cosine)),
        "near_copies_heldout": rate(is_near_copy(heldout, near_copy_cosine)),
    }


def is_near_copy(neighbours: Neighbours, near_copy_cosine: float) -> npt.NDArray[np.bool_]:
    """Return [N] whether the nearest training image has at least this cosine."""
    hits: npt.NDArray[np.bool_] = neighbours.distance <= 1.0 - near_copy_cosine
    return hits


def rate(hits: npt.NDArray[np.bool_]) -> Interval:
    """Share of hits [N] with its exact interval."""
    return clopper_pearson(int(hits.sum()), len(hits))


def first_of_each(owner: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Row of the first image of each prompt, in order: images of one prompt are not independent.

    Images that all belong to one prompt are told apart by nothing but their seeds, so all are kept.
    """
    _, first = np.unique(owner, return_index=True)
    return np.sort(first) if len(first) > 1 else np.arange(len(owner))


def judge_copying(
    samples: Neighbours,
    heldout: Neighbours,
    *,
    own_samples: Distances,
    own_heldout: Distances,
    near_copy_cosine: float = 0.95,
    control: tuple[int, int] | None = None,
) -> CopyingVerdict:
    """Test whether samples copy training images more often than held-out images seem to.

    Three one-sided tests, corrected together by Holm's method: near copies and unauthentic samples
    by Fisher's exact test, and whether samples lie closer to the training images as a whole by
    Mann and Whitney's test (Meehan et al., 2020, "A non-parametric test to detect data-copying").
    The last is a sign of overfitting and alone does not make the answer "copies". Unauthentic
    samples do not either: images with less variety than the training images are closer to them than
    these are to each other (80 % of the spread is enough) without copying any. They count as copies
    if they are also closest to a single training image more often than held-out images are;
    otherwise the question stays open.

    Args:
        samples, heldout: independent samples and held-out images that are not training images.
        own_samples, own_heldout: as `own` of `is_authentic`.
        control: (recognised as near copies, known copies tried); None if that was not tried.

    Raises:
        EvaluationError: no samples or no held-out images.
    """
    from scipy.stats import mannwhitneyu

    n, m = len(samples), len(heldout)
    if not n or not m:
        raise EvaluationError(f"{n} samples and {m} held-out images cannot be compared")
    near = [int(is_near_copy(each, near_copy_cosine).sum()) for each in (samples, heldout)]
    not_authentic = [
        ~is_authentic(each, own) for each, own in ((samples, own_samples), (heldout, own_heldout))
    ]
    unauthentic = [int(each.sum()) for each in not_authentic]
    singled = [
        int((flags & is_singled_out(each)).sum())
        for flags, each in zip(not_authentic, (samples, heldout), strict=True)
    ]
    closer = float(mannwhitneyu(samples.distance, heldout.distance, alternative="less").pvalue)
    raw = [
        fisher_greater(near[0], n, near[1], m),
        fisher_greater(unauthentic[0], n, unauthentic[1], m),
    ]
    adjusted = holm([*raw, closer])
    exact = "Fisher's exact test, one-sided"
    tests = (
        CopyingTest("near_copies", near[0], n, near[1], m, exact, raw[0], adjusted[0]),
        CopyingTest(
            "unauthentic", unauthentic[0], n, unauthentic[1], m, exact, raw[1], adjusted[1]
        ),
        CopyingTest(
            "closer", None, n, None, m, "Mann-Whitney test, one-sided", closer, adjusted[2]
        ),
    )
    sensitivity = control[0] / control[1] if control and control[1] else 1.0
    detectable = detectable_rate(n, near[1], m, alpha=ALPHA / len(tests), sensitivity=sensitivity)
    made_from_one = fisher_greater(singled[0], n, singled[1], m) <= ALPHA
    answer, reason = _answer(tests, detectable, control, made_from_one)
    return CopyingVerdict(answer, reason, tests, detectable)


def _answer(
    tests: Sequence[CopyingTest],
    detectable: float | None,
    control: tuple[int, int] | None,
    made_from_one: bool,
) -> tuple[Answer, str]:
    """Return (answer, reason); `made_from_one`: unauthentic samples are singled out more often than
    held-out images."""
    words = {"near_copies": "near copies", "unauthentic": "not authentic"}
    found = {
        test.name: f"{test.hits} of {test.n} samples are {words[test.name]} against "
        f"{test.heldout_hits} of {test.n_heldout} held-out images "
        f"(adjusted p {test.p_adjusted:.2g})"
        for test in tests
        if test.found and test.name in words
    }
    if "near_copies" in found or (found and made_from_one):
        return "copies", "; ".join(found.values())
    if found:
        return "cannot tell", (
            f"{found['unauthentic']}, yet close to several training images: changed copies, or "
            "images with less variety than the training images; look at the closest pairs"
        )
    near = tests[0]
    counts = (
        f"{near.hits} of {near.n} samples and {near.heldout_hits} of {near.n_heldout} held-out "
        "images are near copies"
    )
    if control and 2 * control[0] < control[1]:
        counts += f", the features recognise only {control[0]} of {control[1]} known copies"
    if detectable is None:
        return "cannot tell", f"{counts}; not even copies alone would be told from these"
    if detectable > COPY_RATE:
        return "cannot tell", (
            f"{counts}; so measured, only a share of copies from {detectable:.0%} on would show"
        )
    return "no sign of copying", f"{counts}; a share of {detectable:.1%} copies would have shown"


def fisher_greater(hits: int, n: int, heldout_hits: int, n_heldout: int) -> float:
    """One-sided p-value of Fisher's exact test that the first rate is not above the second."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(hits - 1, n + n_heldout, hits + heldout_hits, n))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being tested together (Holm, 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, which in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[which]))
        adjusted[which] = highest
    return adjusted


def detectable_rate(
    n: int,
    heldout_hits: int,
    n_heldout: int,
    *,
    alpha: float,
    power: float = POWER,
    sensitivity: float = 1.0,
) -> float | None:
    """Smallest share of copies among n samples for which Fisher's test rejects with this power.

    Samples that are not copies are taken to be near copies as often as held-out images are.

    Args:
        sensitivity: share of copies that count as near copies.

    Returns:
        The share, or None if even samples that are all copies would not be found.
    """
    from scipy.stats import beta

    low, high = 0, n + 1  # the fewest hits that are significant: the p-value falls with them
    while low < high:
        middle = (low + high) // 2
        if fisher_greater(middle, n, heldout_hits, n_heldout) <= alpha:
            high = middle
        else:
            low = middle + 1
    if low > n or sensitivity <= 0:
        return None
    # P(Binomial(n, r) >= c) = I_r(c, n - c + 1), so the rate with this power is a beta quantile.
    hits = float(beta.ppf(power, low, n - low + 1))
    base = heldout_hits / n_heldout
    if base >= sensitivity:
        return None
    share = max(0.0, (hits - base) / (sensitivity - base))
    return share if share <= 1.0 else None


def _unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    data = np.ascontiguousarray(vectors, np.float32)
    lengths = np.linalg.norm(data, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise EvaluationError("a feature vector is zero or not finite")
    return np.ascontiguousarray(data / lengths)
