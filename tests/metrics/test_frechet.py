"""Fréchet distance against closed forms and reference decompositions."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy.stats import t

from modelops.base.errors import EvaluationError
from modelops.base.seeding import numpy_generator
from modelops.metrics.frechet import (
    Statistics,
    extrapolation_warning,
    features_to_frechet_distance,
    features_to_statistics,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
    merge_statistics,
    rank_warning,
    tridiagonal_trace_of_root,
)


def exact_covariance(data: np.ndarray) -> mpmath.matrix:
    """In 50 digits, because rounding alone lifts the rank of a singular covariance."""
    rows = mpmath.matrix(data.tolist())
    means = [sum(rows[:, j]) / rows.rows for j in range(rows.cols)]
    centred = mpmath.matrix(
        [[rows[i, j] - means[j] for j in range(rows.cols)] for i in range(rows.rows)]
    )
    return centred.T * centred / (rows.rows - 1)


def reference_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The definition in 50 digits: eigenvalues of S1 S2 by way of S1^(1/2) S2 S1^(1/2)."""
    with mpmath.workdps(50):
        a, b = exact_covariance(x), exact_covariance(y)
        values, vectors = mpmath.eigsy(a)
        root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T
        inner = mpmath.eigsy(root * b * root, eigvals_only=True)
        trace = sum(mpmath.sqrt(max(v, 0)) for v in inner)
        mean = mpmath.matrix((x.mean(0) - y.mean(0)).tolist())
        total = sum(v * v for v in mean) - 2 * trace
        total += sum(a[i, i] + b[i, i] for i in range(a.rows))
        return float(total)


def test_commuting_gaussians_have_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    first = Statistics(np.array([1.0, 0.0, 2.0]), np.diag(a), 10)
    second = Statistics(np.zeros(3), np.diag(b), 10)
    assert frechet_distance(first, second) == pytest.approx(5.0 + 1.0 + 0.0 + 4.0, rel=1e-12)


def test_zero_covariance_leaves_the_distance_of_the_means() -> None:
    zero = np.zeros((2, 2))
    first, second = Statistics(np.array([3.0, 4.0]), zero, 5), Statistics(np.zeros(2), zero, 5)
    assert frechet_distance(first, second) == pytest.approx(25.0)


@pytest.mark.parametrize(("n", "m"), [(6, 7), (6, 40), (40, 6), (40, 50), (13, 12)])
def test_every_form_equals_the_definition_in_50_digits(n: int, m: int) -> None:
    generator = np.random.default_rng(n + m)
    x = generator.normal(size=(n, 12)) @ np.diag(np.linspace(0.1, 3, 12)) + 0.3
    y = generator.normal(size=(m, 12))
    assert features_to_frechet_distance(x, y) == pytest.approx(reference_distance(x, y), rel=1e-9)


def test_a_set_is_at_distance_zero_from_itself_and_the_distance_is_symmetric() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(9, 20)), generator.normal(size=(30, 20)) * 2
    assert features_to_frechet_distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-9)
    forward, back = features_to_frechet_distance(x, y), features_to_frechet_distance(y, x)
    assert forward == pytest.approx(back, rel=1e-10)


def test_merged_statistics_are_those_of_the_union() -> None:
    data = np.random.default_rng(1).normal(size=(50, 4)) * [1, 2, 3, 4]
    merged = merge_statistics(features_to_statistics(data[:13]), features_to_statistics(data[13:]))
    whole = features_to_statistics(data)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    assert merged.n == 50


def test_the_interval_holds_the_expected_distance_about_as_often_as_it_says() -> None:
    """n = 30 and m = 40 in 48 dimensions; 150 repetitions of a nominal 95 % interval."""
    scale = np.arange(1, 49) ** -0.6
    generator = np.random.default_rng(7)

    def draw(n: int, shift: float) -> np.ndarray:
        return generator.normal(size=(n, 48)) * scale + shift * scale

    truth = np.mean([features_to_frechet_distance(draw(30, 0.15), draw(40, 0)) for _ in range(600)])
    hits = 0
    for index in range(150):
        made = frechet_interval(draw(30, 0.15), draw(40, 0), seed=index, groups=12)
        hits += made.low <= truth <= made.high
    assert 0.90 * 150 <= hits <= 0.99 * 150


@pytest.mark.parametrize("dimension", [1, 5])
def test_the_variance_behind_the_interval_comes_from_halves_and_quarters(dimension: int) -> None:
    """One round of 9 and 14 images, redone by hand; also where there are fewer than dimensions."""
    generator = np.random.default_rng(8)
    x, y = generator.normal(size=(9, dimension)), generator.normal(size=(14, dimension)) + 1
    made = frechet_interval(x, y, seed=3, groups=3)
    parts = [
        np.array_split(numpy_generator(3, "frechet-parts", side).permutation(count), 4)
        for side, count in enumerate((9, 14))
    ]

    def part(*which: int) -> float:
        rows = [np.concatenate([parts[side][k] for k in which]) for side in (0, 1)]
        return features_to_frechet_distance(x[rows[0]], y[rows[1]])

    pairs = [(part(0, 1), part(2, 3)), (part(0, 2), part(1, 3)), (part(0, 3), part(1, 2))]
    half = np.mean([np.var(pair, ddof=1) for pair in pairs])
    quarter = np.var([part(k) for k in range(4)], ddof=1)
    second_order = np.clip((quarter - 2 * half) / 8, 0, half / 4)
    error = np.sqrt(half / 2 - second_order / 2)
    assert made.high - made.value == pytest.approx(t.ppf(0.975, 3) * error, rel=1e-8)


def test_seven_images_have_an_interval_and_three_do_not() -> None:
    generator = np.random.default_rng(9)
    x = generator.normal(size=(7, 3))
    made = frechet_interval(x, x + 1, seed=0)
    assert made.low < made.value < made.high
    with pytest.raises(EvaluationError, match="3 images are too few"):
        frechet_interval(x[:3], x, seed=0)


@pytest.mark.parametrize("size", [1, 2, 40])
def test_the_root_of_a_tridiagonal_matrix_has_the_trace_of_its_eigenvalues(size: int) -> None:
    """Eigenvalues over twelve orders of magnitude; and an indefinite one, which clips at 0."""
    generator = np.random.default_rng(size)
    lower = np.diag(10.0 ** -generator.uniform(0, 6, size))
    lower += np.diag(0.3 * np.diag(lower)[1:], -1)
    matrix = lower @ lower.T
    diagonal, beside = np.diag(matrix).copy(), np.diag(matrix, 1).copy()
    exact = np.linalg.svd(lower, compute_uv=False).sum()
    assert tridiagonal_trace_of_root(diagonal, beside) == pytest.approx(exact, rel=1e-12)
    values = np.linalg.eigvalsh(matrix - 0.3 * np.eye(size))
    expected = np.sqrt(np.clip(values, 0, None)).sum()
    assert tridiagonal_trace_of_root(diagonal - 0.3, beside) == pytest.approx(expected, abs=1e-9)
    assert tridiagonal_trace_of_root(0 * diagonal, 0 * beside) == 0.0


@pytest.mark.parametrize("orders", [4, 10, 14])
def test_an_ill_conditioned_pair_keeps_nine_digits(orders: int) -> None:
    """Covariances that commute, eigenvalues over so many orders of magnitude."""
    generator = np.random.default_rng(orders)
    turn = np.linalg.qr(generator.normal(size=(60, 60)))[0]
    values = 10.0 ** -np.linspace(0, orders, 60)
    first, second = (
        Statistics(np.zeros(60), (turn * v) @ turn.T, 100) for v in (values, np.sqrt(values))
    )
    exact = float((values + np.sqrt(values) - 2 * values**0.75).sum())
    assert frechet_distance(first, second) == pytest.approx(exact, rel=1e-9)


def test_the_interval_is_the_same_for_the_same_seed_and_holds_the_value() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(20, 300)), generator.normal(size=(25, 300))
    first, again = frechet_interval(x, y, seed=5), frechet_interval(x, y, seed=5)
    assert first == again
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(features_to_frechet_distance(x, y), rel=1e-9)


@pytest.mark.parametrize(
    "features", [np.zeros((1, 4)), np.full((5, 4), np.nan), np.zeros(4), np.zeros((5, 3))]
)
def test_features_that_cannot_be_compared_are_refused(features: np.ndarray) -> None:
    with pytest.raises(EvaluationError):
        features_to_frechet_distance(features, np.zeros((5, 4)))


def test_small_samples_carry_a_warning() -> None:
    assert "biased" in rank_warning(256, 395, 1280)[0]
    assert rank_warning(5000, 5000, 1280) == []


@pytest.mark.parametrize(("n", "m"), [(24, 9), (24, 60), (9, 300)])
def test_the_extrapolated_distance_is_the_intercept_over_one_over_n(n: int, m: int) -> None:
    generator = np.random.default_rng(n)
    x, y = generator.normal(size=(n, 8)) * 1.5, generator.normal(size=(m, 8))
    found = frechet_infinity(x, y, seed=4, splits=2, groups=2)
    order = numpy_generator(4, "frechet-infinity", 0).permutation(n)
    halves = np.array_split(x[order], 2)
    whole = features_to_frechet_distance(x, y)
    half = np.mean([features_to_frechet_distance(part, y) for part in halves])
    inverse = np.mean([1 / len(part) for part in halves])
    slope = (half - whole) / (inverse - 1 / n)
    assert found.slope == pytest.approx(slope, rel=1e-8)
    assert found.interval.value == pytest.approx(whole - slope / n, rel=1e-8)
    assert found.interval.low <= found.interval.value <= found.interval.high


def test_extrapolation_takes_the_bias_of_n_away() -> None:
    """40 draws of 400 images in 24 dimensions, against a reference with exactly known moments."""
    generator = np.random.default_rng(11)
    scale = np.arange(1, 25) ** -0.5
    y = generator.normal(size=(60, 24))
    y -= y.mean(axis=0)
    y = y @ np.linalg.inv(np.linalg.cholesky(np.cov(y.T))).T * scale  # covariance diag(scale^2)
    truth = float((0.04 * scale**2 + (0.1 * scale) ** 2).sum())
    plain, extrapolated = [], []
    for seed in range(40):
        x = generator.normal(size=(400, 24)) * scale * 1.2 + 0.1 * scale
        plain.append(features_to_frechet_distance(x, y))
        extrapolated.append(frechet_infinity(x, y, seed=seed, groups=2).interval.value)
    error = np.std(extrapolated) / np.sqrt(40)
    assert abs(np.mean(extrapolated) - truth) < 3 * error
    assert np.mean(plain) - truth > 10 * error
    assert extrapolation_warning(frechet_infinity(x, y, seed=0), 60, 24) == []


def test_extrapolation_from_too_few_images_is_refused_or_warned_of() -> None:
    generator = np.random.default_rng(12)
    with pytest.raises(EvaluationError, match="too few to extrapolate"):
        frechet_infinity(generator.normal(size=(15, 4)), generator.normal(size=(90, 4)), seed=0)
    found = frechet_infinity(
        generator.normal(size=(40, 64)), generator.normal(size=(50, 64)), seed=0
    )
    notes = extrapolation_warning(found, 50, 64)
    assert "smallest part has 10 images for 64 dimensions" in notes[0]
    assert "reference has 50 images" in notes[1]
