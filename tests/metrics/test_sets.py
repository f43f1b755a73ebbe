"""Kernel distance, precision and recall, memorization, alignment against brute force."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import t

from modelops.base.errors import EvaluationError
from modelops.metrics.alignment import (
    alignment_intervals,
    embeddings_to_alignment,
    paired_difference,
    retrieval_rate,
)
from modelops.metrics.cmmd import cmmd, statistics_to_cmmd
from modelops.metrics.frechet import features_to_statistics
from modelops.metrics.kernel import (
    _kernel_sums,
    _leave_one_out,
    _orders,
    kernel_distance,
    kernel_variance,
    sums_to_variance,
)
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


def brute_variance(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased variance term by term: means over all tuples of distinct images."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def mean(terms: Iterable[float]) -> float:
        return float(np.mean(list(terms)))

    def distinct(a: np.ndarray, count: int) -> Iterable[tuple[np.ndarray, ...]]:
        return permutations(list(a), count)

    pairs = list(product(distinct(x, 2), distinct(y, 2)))
    between = mean(k(a, c) * k(b, d) for (a, b), (c, d) in pairs)
    far, total = [], 0.0
    for u, v in ((x, y), (y, x)):
        n = len(u)
        whole = mean(k(a, b) ** 2 for a, b in distinct(u, 2))
        own = mean(k(a, b) * k(a, c) for a, b, c in distinct(u, 3))
        own_mean = mean(k(a, b) * k(c, d) for a, b, c, d in distinct(u, 4))
        mixed = mean(k(a, b) * k(a, c) for (a, b), c in product(distinct(u, 2), v))
        mixed_mean = mean(k(a, b) * k(c, d) for (a, b, c), d in product(distinct(u, 3), v))
        far.append(mean(k(a, b) * k(a, c) for a, (b, c) in product(u, distinct(v, 2))))
        slope = own - own_mean - 2 * (mixed - mixed_mean) + far[-1] - between
        total += 4 / n * slope + 2 / (n * (n - 1)) * (whole - 2 * own + own_mean)
    square = mean(k(a, b) ** 2 for a, b in product(x, y))
    return total + 4 / (len(x) * len(y)) * (square - sum(far) + between)


def test_kernel_distance_and_its_variance_equal_loops_over_tuples() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(6, 5)), generator.normal(size=(7, 5)) + 0.9
    made = kernel_distance(x, y, block=4)
    assert made.value == pytest.approx(brute_kernel(x, y), rel=1e-10)
    variance = sums_to_variance(_kernel_sums(x, y, 3, 1.0, 4))
    assert variance == pytest.approx(brute_variance(x, y), rel=1e-9)
    assert kernel_variance(x, y) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_variance_is_unbiased_and_the_jackknife_is_not(shift: float) -> None:
    """1,000 pairs of sets of 12 and 17. Without a shift the jackknife gives twice the variance."""
    generator = np.random.default_rng(1)
    values, analytic, jackknife = [], [], []
    for _ in range(1000):
        x, y = generator.normal(size=(12, 6)), generator.normal(size=(17, 6)) + shift
        sums = _kernel_sums(x, y, 3, 1.0, 1024)
        values.append(kernel_distance(x, y).value)
        analytic.append(sums_to_variance(sums))
        jackknife.append(sum((len(v) - 1) * v.var() for v in _leave_one_out(sums)))
    assert np.mean(analytic) == pytest.approx(np.var(values), rel=0.15)
    assert np.mean(jackknife) / np.var(values) > (1.8 if shift == 0 else 1.1)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_ends_of_the_kernel_interval_are_as_far_off_as_their_own_error_allows(
    shift: float,
) -> None:
    """Both ends d solve (value - d)^2 = t^2 (slope d + fixed), with both parts from loops."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(9, 5)), generator.normal(size=(11, 5)) + shift
    made = kernel_distance(x, y, block=4)

    jackknife = 0.0
    for data, other, flip in ((x, y, False), (y, x, True)):
        left = np.array(
            [
                brute_kernel(*((other, kept) if flip else (kept, other)))
                for kept in (np.delete(data, i, 0) for i in range(len(data)))
            ]
        )
        jackknife += (len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()
    kernels = [(a @ b.T / 5 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    with_diagonals = kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean()
    fixed = 2.0 * np.clip(_orders(_kernel_sums(x, y, 3, 1.0, 1024))[1], 0, jackknife / 2)
    squared = t.ppf(0.975, 8) ** 2
    for end in (made.low, made.high):
        allowed = squared * (jackknife / with_diagonals * end + fixed)
        assert (made.value - end) ** 2 == pytest.approx(allowed, rel=1e-8)
    assert made.low < made.value < made.high


def test_the_kernel_interval_of_constant_sets_is_a_point() -> None:
    same = kernel_distance(np.ones((6, 3)), np.ones((7, 3)))
    assert (same.low, same.value, same.high) == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.35])
def test_the_kernel_interval_holds_the_distance_about_as_often_as_it_says(shift: float) -> None:
    """400 repetitions with and without a distance; three standard errors wide around 92 to 98 %."""
    generator = np.random.default_rng(5)
    values = []
    for _ in range(400):
        x, y = generator.normal(size=(40, 12)), generator.normal(size=(60, 12)) + shift
        values.append(kernel_distance(x, y))
    truth = float(np.mean([v.value for v in values])) if shift else 0.0
    held = np.mean([v.low <= truth <= v.high for v in values])
    assert 0.89 <= held <= 0.99


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


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def reference_cmmd(x: np.ndarray, y: np.ndarray, *, diagonal: bool) -> float:
    """The definition by loops: sigma 10, times 1000."""

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        terms = [
            np.exp(-((u - v) ** 2).sum() / 200)
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if diagonal or not same or i != j
        ]
        return float(np.mean(terms))

    return 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))


def test_cmmd_equals_its_definition_exactly_and_nearly_from_moments() -> None:
    generator = np.random.default_rng(6)
    x = generator.normal(size=(23, 12)) + np.linspace(0, 2, 12)
    y = generator.normal(size=(31, 12)) - 0.3
    expected = reference_cmmd(unit(x), unit(y), diagonal=True)
    exact = cmmd(x, y, block=7)
    assert exact.value == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, y, unbiased=True, block=7).value == pytest.approx(
        reference_cmmd(unit(x), unit(y), diagonal=False), rel=1e-9
    )
    streamed = statistics_to_cmmd(features_to_statistics(unit(x)), features_to_statistics(unit(y)))
    assert streamed.value == pytest.approx(expected, rel=1e-4)
    assert 0 <= expected - streamed.value <= streamed.error_bound < 1e-3


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_jackknife_of_cmmd_leaves_each_image_out(unbiased: bool) -> None:
    generator = np.random.default_rng(8)
    x, y = generator.normal(size=(6, 4)), generator.normal(size=(7, 4)) + 1
    variance = 0.0
    for data, other in ((x, y), (y, x)):
        left = [
            reference_cmmd(unit(np.delete(data, i, 0)), unit(other), diagonal=not unbiased)
            for i in range(len(data))
        ]
        variance += (len(left) - 1) * float(np.var(left))
    made = cmmd(x, y, unbiased=unbiased)
    assert made.high - made.value == pytest.approx(t.ppf(0.975, 5) * np.sqrt(variance), rel=1e-6)


def test_cmmd_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(EvaluationError, match="zero or not finite"):
        cmmd(np.zeros((4, 3)), np.ones((4, 3)))
    with pytest.raises(EvaluationError, match="too few"):
        cmmd(np.ones((2, 3)), np.ones((4, 3)))
    raw = features_to_statistics(np.random.default_rng(0).normal(size=(9, 4)))
    with pytest.raises(EvaluationError, match="not those of normalised"):
        statistics_to_cmmd(raw, raw)
