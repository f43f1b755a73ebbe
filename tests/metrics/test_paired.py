"""Paired differences against brute force and by simulation: coverage, width, power."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from modelops.base.errors import EvaluationError
from modelops.evaluation.compare.margins import detectable, prompts_needed, within_margin
from modelops.metrics.frechet import features_to_frechet_distance, frechet_interval
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.multiple import independent_difference
from modelops.metrics.paired import exact_sign_flip_p, paired_mean, paired_median, paired_rate
from modelops.metrics.paired_sets import (
    _FrechetSide,
    _Radii,
    paired_frechet,
    paired_kernel,
    paired_prdc,
)
from modelops.metrics.prdc import prdc

NONE = np.zeros(0, np.int64)


def sources(
    generator: np.random.Generator, n: int, d: int, *, shared: float = 0.8, replicates: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, reference, owner): two equal sources, alike on the same prompt, that are
    both off the reference."""
    reference = generator.normal(size=(n, d))
    content = np.repeat(generator.normal(size=(n, d)), replicates, axis=0)
    first, second = (
        1.2
        * (np.sqrt(shared) * content + np.sqrt(1 - shared) * generator.normal(size=content.shape))
        + 1.0
        for _ in range(2)
    )
    return first, second, reference, np.repeat(np.arange(n), replicates)


def test_the_sign_flip_test_is_exact() -> None:
    from scipy.stats import binomtest

    mcnemar = np.array([1] * 6 + [-1] + [0] * 40)
    assert exact_sign_flip_p(mcnemar) == pytest.approx(binomtest(1, 7).pvalue, rel=1e-12)
    clustered = np.array([3, -1, 2, 0, 1, 1])
    sums = [abs(np.dot(signs, np.abs(clustered))) for signs in itertools.product((1, -1), repeat=6)]
    brute = np.mean(np.array(sums) >= abs(clustered.sum()))
    assert exact_sign_flip_p(clustered) == pytest.approx(brute, rel=1e-12)
    assert exact_sign_flip_p(np.zeros(5, np.int64)) == 1.0


def test_a_paired_rate_is_bonett_and_prices_interval() -> None:
    first, second = np.zeros(100, np.int64), np.zeros(100, np.int64)
    first[:10] = 1
    second[7:12] = 1  # 7 only in the first, 2 only in the second
    made = paired_rate(first, second, np.ones(100, np.int64))
    p21, p12 = 3 / 102, 8 / 102
    half = 1.959964 * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert made.value == pytest.approx(-0.05)
    assert made.low == pytest.approx(p21 - p12 - half, abs=1e-6)
    assert made.high == pytest.approx(p21 - p12 + half, abs=1e-6)
    assert (made.first, made.second) == (0.10, 0.05)


def test_nobody_disagreeing_is_not_certainty() -> None:
    nothing = np.zeros(395, np.int64)
    made = paired_rate(nothing, nothing, np.ones(395, np.int64))
    assert made.low == -made.high
    assert 0.005 < made.high < 0.01  # 0 of 395 alone allows 0.0093
    assert made.p == 1.0


def test_images_of_one_prompt_count_as_one() -> None:
    single = np.array([1, 0, 0, 1, 0, 0, 1, 0] * 10)
    other = np.array([0, 0, 1, 1, 1, 0, 1, 0] * 10)
    one = paired_rate(single, other, np.ones(80, np.int64))
    four = paired_rate(4 * single, 4 * other, np.full(80, 4))
    assert four.value == one.value
    assert four.low == pytest.approx(one.low)
    assert four.p == pytest.approx(one.p)


def test_the_kernel_jackknife_leaves_out_whole_prompts() -> None:
    first, second, reference, owner = sources(np.random.default_rng(0), 8, 5, replicates=2)
    made = paired_kernel(first, second, reference, owner_first=owner, owner_second=owner)

    def difference(a: np.ndarray, b: np.ndarray, r: np.ndarray) -> float:
        return kernel_distance(b, r).value - kernel_distance(a, r).value

    assert made.value == pytest.approx(difference(first, second, reference), rel=1e-9)
    prompts = [difference(first[owner != i], second[owner != i], reference) for i in range(8)]
    pictures = [difference(first, second, np.delete(reference, i, axis=0)) for i in range(8)]
    for left, variance in ((prompts, made.variance), (pictures, made.fixed_variance)):
        assert variance == pytest.approx(7 / 8 * np.sum((left - np.mean(left)) ** 2), rel=1e-7)


def test_taking_rows_away_is_the_distance_without_them() -> None:
    generator = np.random.default_rng(1)
    for n, d in ((60, 4), (12, 30)):  # by moments, and from the features
        x, y = generator.normal(size=(n, d)) + 1, generator.normal(size=(n + 3, d))
        rows, gone = np.array([0, 5, 7]), np.array([1, 2])
        expected = features_to_frechet_distance(np.delete(x, rows, 0), np.delete(y, gone, 0))
        assert _FrechetSide(x, y).without(rows, gone) == pytest.approx(expected, rel=1e-9)


def test_radii_without_points_are_those_of_the_rest() -> None:
    points = np.random.default_rng(2).normal(size=(60, 3))
    radii = _Radii(points, 3)
    for rows in (NONE, np.arange(5), np.arange(50)):  # the last needs more than it has kept
        kept = np.delete(points, rows, axis=0)
        distances = ((kept[:, None] - kept[None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(radii.without(rows), np.sort(distances, axis=1)[:, 3])
    with pytest.raises(EvaluationError, match="too few"):
        radii.without(np.arange(57))


def test_paired_neighbourhoods_are_those_of_prdc() -> None:
    first, second, reference, owner = sources(np.random.default_rng(3), 60, 4)
    made = paired_prdc(
        first, second, reference, owner_first=owner, owner_second=owner, seed=0, draws=10
    )
    for side, name in ((first, "first"), (second, "second")):
        for key, interval in prdc(reference, side, seed=0, resamples=50).items():
            assert getattr(made[key], name) == pytest.approx(interval.value)


def test_a_source_against_itself_differs_by_nothing() -> None:
    first, _, reference, owner = sources(np.random.default_rng(4), 40, 3)
    owners = {"owner_first": owner, "owner_second": owner}
    for made in (
        paired_frechet(first, first, reference, seed=0, **owners),
        paired_kernel(first, first, reference, **owners),
        paired_mean(first[:, 0], first[:, 0], seed=0),
        paired_median(first[:, 0], first[:, 0], owner, seed=0, resamples=50),
    ):
        assert (made.value, made.low, made.high, made.p) == (0.0, 0.0, 0.0, 1.0)


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(EvaluationError, match="paired"):
        paired_mean(np.zeros(3), np.zeros(4), seed=0)
    with pytest.raises(EvaluationError, match="not finite"):
        paired_mean(np.array([0.0, np.nan]), np.zeros(2), seed=0)
    x = np.zeros((3, 2))
    with pytest.raises(EvaluationError, match="vectors"):
        paired_frechet(x, x, x, owner_first=np.arange(3), owner_second=np.arange(3), seed=0)


def covers(intervals: list[tuple[float, float]]) -> float:
    return float(np.mean([low <= 0 <= high for low, high in intervals]))


def test_paired_distances_cover_and_are_narrower_than_independent_ones() -> None:
    generator = np.random.default_rng(5)
    made: dict[str, list[tuple[float, float]]] = {"frechet": [], "kernel": []}
    widths: dict[str, list[float]] = {"frechet": [], "kernel": []}
    for trial in range(150):
        first, second, reference, owner = sources(generator, 150, 4)
        owners = {"owner_first": owner, "owner_second": owner}
        pairs = {
            "frechet": paired_frechet(first, second, reference, seed=trial, groups=20, **owners),
            "kernel": paired_kernel(first, second, reference, **owners),
        }
        for name, pair in pairs.items():
            made[name].append((pair.low, pair.high))
            if trial >= 20:
                continue
            each = [
                frechet_interval(side, reference, seed=trial, groups=20)
                if name == "frechet"
                else kernel_distance(side, reference)
                for side in (first, second)
            ]
            apart = independent_difference(each[1], each[0])
            widths[name].append((pair.high - pair.low) / (apart.high - apart.low))
    for name, intervals in made.items():
        assert 0.92 <= covers(intervals) <= 0.98, name
        assert np.mean(widths[name]) < 0.6, name


@pytest.mark.slow
def test_paired_neighbourhoods_cover() -> None:
    generator = np.random.default_rng(6)
    made: dict[str, list[tuple[float, float]]] = {}
    for trial in range(150):
        first, second, reference, owner = sources(generator, 200, 6)
        found = paired_prdc(
            first, second, reference, owner_first=owner, owner_second=owner, seed=trial
        )
        for name, pair in found.items():
            made.setdefault(name, []).append((pair.low, pair.high))
    for name, intervals in made.items():
        assert 0.91 <= covers(intervals) <= 0.99, name


def test_paired_rates_cover_where_hits_are_rare_and_where_they_are_not() -> None:
    generator = np.random.default_rng(7)
    for n, disagree, replicates in ((395, 0.01, 1), (200, 0.2, 1), (100, 0.3, 4)):
        intervals, errors = [], []
        for _ in range(600):
            changed = generator.random(n) < disagree
            up = generator.random(n) < 0.5
            size = generator.integers(1, replicates + 1, n)
            first, second = changed * ~up * size, changed * up * size
            pair = paired_rate(first, second, np.full(n, replicates))
            intervals.append((pair.low, pair.high))
            errors.append(pair.p <= 0.05)
        assert 0.92 <= covers(intervals) <= 1.0, (n, disagree)
        assert np.mean(errors) <= 0.06, (n, disagree)


def test_paired_means_and_medians_cover() -> None:
    generator = np.random.default_rng(8)
    means, medians, errors = [], [], []
    for trial in range(200):
        content = generator.normal(size=120)
        first, second = (content + 0.5 * generator.normal(size=120) for _ in range(2))
        mean = paired_mean(first, second, seed=trial, resamples=1000)
        median = paired_median(first, second, np.arange(120), seed=trial, resamples=150)
        means.append((mean.low, mean.high))
        medians.append((median.low, median.high))
        errors.append(mean.p <= 0.05)
    assert 0.92 <= covers(means) <= 0.98
    assert 0.92 <= covers(medians) <= 0.99
    assert 0.02 <= np.mean(errors) <= 0.08


def test_the_detectable_difference_is_detected_in_four_of_five() -> None:
    generator = np.random.default_rng(9)
    pilot = generator.normal(size=(2, 100))
    smallest = detectable(paired_mean(pilot[0], pilot[1], seed=0, resamples=100))
    error = (pilot[1] - pilot[0]).std(ddof=1)
    found = []
    for trial in range(400):
        second = generator.normal(size=100) * error + smallest
        found.append(paired_mean(np.zeros(100), second, seed=trial, resamples=20).p <= 0.05)
    assert 0.74 <= np.mean(found) <= 0.86


def test_so_many_prompts_show_an_equal_source_to_be_within_the_margin() -> None:
    generator = np.random.default_rng(10)
    pilot = generator.normal(size=(2, 100))
    pair, margin = paired_mean(pilot[0], pilot[1], seed=0, resamples=100), 0.25
    needed = prompts_needed(pair, margin)
    assert needed is not None
    error = (pilot[1] - pilot[0]).std(ddof=1)
    answers = [
        within_margin(
            paired_mean(
                np.zeros(needed), generator.normal(size=needed) * error, seed=trial, resamples=200
            ),
            margin, higher_is_better=True,
        )
        for trial in range(300)
    ]  # fmt: skip
    assert 0.73 <= answers.count("yes") / 300 <= 0.87


def test_no_number_of_prompts_makes_up_for_few_reference_pictures() -> None:
    first, second, reference, owner = sources(np.random.default_rng(11), 40, 4)
    pair = paired_kernel(first, second, reference, owner_first=owner, owner_second=owner)
    assert prompts_needed(pair, 0.0) is None
    assert prompts_needed(pair, 2.0 * np.sqrt(pair.fixed_variance)) is None
    many, few = prompts_needed(pair, 0.5), prompts_needed(pair, 1.0)
    assert many is not None and few is not None and many > 3 * few
