"""Fréchet distance against closed forms and reference decompositions."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from modelops.errors import EvaluationError
from modelops.metrics.frechet import (
    Statistics,
    features_to_frechet_distance,
    features_to_statistics,
    frechet_distance,
    frechet_interval,
    merge_statistics,
    rank_warning,
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
    """n = 30 and m = 40 in 48 dimensions; 100 repetitions of a nominal 95 % interval."""
    scale = np.arange(1, 49) ** -0.6
    generator = np.random.default_rng(7)

    def draw(n: int, shift: float) -> np.ndarray:
        return generator.normal(size=(n, 48)) * scale + shift * scale

    truth = np.mean([features_to_frechet_distance(draw(30, 0.15), draw(40, 0)) for _ in range(300)])
    hits = 0
    for index in range(100):
        made = frechet_interval(draw(30, 0.15), draw(40, 0), seed=index, groups=10)
        hits += made.low <= truth <= made.high
    assert 90 <= hits <= 100


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
