"""Kernel distance, precision and recall, memorization, alignment against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from modelops.errors import EvaluationError
from modelops.metrics.alignment import (
    alignment_intervals,
    embeddings_to_alignment,
    paired_difference,
    retrieval_rate,
)
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.memorization import memorization_intervals, nearest_neighbours
from modelops.metrics.prdc import prdc


def brute_kernel(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy


def test_kernel_distance_and_its_jackknife_equal_double_loops() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(9, 5)), generator.normal(size=(11, 5)) + 0.4
    made = kernel_distance(x, y, block=4)
    assert made.value == pytest.approx(brute_kernel(x, y), rel=1e-10)

    variance = 0.0
    for data, other, flip in ((x, y, False), (y, x, True)):
        left = np.array(
            [
                brute_kernel(*((other, kept) if flip else (kept, other)))
                for kept in (np.delete(data, i, 0) for i in range(len(data)))
            ]
        )
        variance += (len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()
    from scipy.stats import t

    half = t.ppf(0.975, 8) * np.sqrt(variance)
    assert made.high - made.value == pytest.approx(half, rel=1e-8)


def test_kernel_distance_does_not_depend_on_the_block_size() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(30, 8)), generator.normal(size=(20, 8))
    first, second = (kernel_distance(x, y, block=block) for block in (7, 1000))
    assert first.value == pytest.approx(second.value, rel=1e-10)
    assert first.low == pytest.approx(second.low, rel=1e-10)


def test_prdc_equals_a_brute_force() -> None:
    generator = np.random.default_rng(2)
    real, fake, k = generator.normal(size=(25, 3)), generator.normal(size=(20, 3)) * 0.8 + 0.5, 3
    within = lambda a: np.sort(  # noqa: E731
        np.linalg.norm(a[:, None] - a[None], axis=2), axis=1
    )[:, k]
    cross = np.linalg.norm(real[:, None] - fake[None], axis=2)
    made = prdc(real, fake, seed=0, neighbours=k, resamples=100, block=7)
    inside = cross < within(real)[:, None]
    assert made["precision"].value == pytest.approx(inside.any(0).mean())
    assert made["density"].value == pytest.approx(inside.sum(0).mean() / k)
    assert made["coverage"].value == pytest.approx(inside.any(1).mean())
    assert made["recall"].value == pytest.approx((cross < within(fake)[None]).any(1).mean())


def test_prdc_needs_more_images_than_neighbours() -> None:
    with pytest.raises(EvaluationError, match="too few"):
        prdc(np.zeros((5, 2)), np.zeros((9, 2)), seed=0, neighbours=5)


def test_copies_are_found_and_the_gap_is_below_zero() -> None:
    generator = np.random.default_rng(3)
    training = generator.normal(size=(60, 16))
    copies = training[:20] * 3.0  # cosine does not see the length
    heldout = generator.normal(size=(25, 16))
    samples, real = nearest_neighbours(copies, training), nearest_neighbours(heldout, training)
    np.testing.assert_array_equal(samples.index, np.arange(20))
    made = memorization_intervals(samples, real, seed=0, resamples=200)
    assert made["near_copies"].value == 1.0
    assert made["near_copies_heldout"].value == 0.0
    assert made["gap"].high < 0


def test_nearest_neighbours_refuses_an_empty_training_set() -> None:
    with pytest.raises(EvaluationError, match="no training"):
        nearest_neighbours(np.ones((2, 4)), np.ones((0, 4)))


def test_alignment_averages_over_all_other_prompts() -> None:
    generator = np.random.default_rng(4)
    images, texts = generator.normal(size=(8, 6)), generator.normal(size=(4, 6))
    owner = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    made = embeddings_to_alignment(images, texts, list("abcd"), owner)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    cosine = unit(images) @ unit(texts).T
    for i, own in enumerate(owner):
        assert made.own[i] == pytest.approx(cosine[i, own])
        assert made.shuffled[i] == pytest.approx(np.delete(cosine[i], own).mean())
        assert made.rank[i] == (np.delete(cosine[i], own) >= cosine[i, own]).sum()
    gain = alignment_intervals(made, owner, seed=0, resamples=200)["gain"]
    assert gain.value == pytest.approx((made.own - made.shuffled).mean())


def test_a_failed_image_counts_as_a_miss() -> None:
    assert retrieval_rate(np.array([0, 0, 7]), 1, n=4).value == 0.5


def test_equal_embeddings_do_not_count_as_retrieved() -> None:
    made = embeddings_to_alignment(
        np.ones((3, 2)), np.ones((3, 2)), ["a", "b", "c"], np.array([0, 1, 2])
    )
    assert retrieval_rate(made.rank, 1).value == 0.0


def test_pairing_narrows_the_interval() -> None:
    generator = np.random.default_rng(5)
    hard = generator.normal(size=200) * 10
    made = paired_difference(hard + 1 + generator.normal(size=200) * 0.1, hard, seed=0)
    assert made.low > 0.9
    with pytest.raises(EvaluationError, match="paired"):
        paired_difference(hard, hard[:10], seed=0)
