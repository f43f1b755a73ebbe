"""The tests hold their level where nothing drifted, and find what they are for."""

from __future__ import annotations

import numpy as np
import pytest

import drift_lab
from modelops.base.errors import EvaluationError
from modelops.monitoring.pictures import picture_shifts
from modelops.monitoring.shifts import (
    Latencies,
    latency_shift,
    mix_shift,
    rank_shift,
    rate_shift,
)


def correlated(generator: np.random.Generator, n: int, dim: int = 60) -> np.ndarray:
    """Skewed features of falling spread, more of them than a quarter of the rows."""
    return (generator.gamma(2.0, size=(n, dim)) - 2) * np.geomspace(3, 0.1, dim)


def test_picture_tests_hold_their_level_below_full_rank() -> None:
    hits = np.zeros(2)
    for repetition in range(150):
        generator = np.random.default_rng(repetition)
        found = picture_shifts(
            correlated(generator, 70), correlated(generator, 40), seed=repetition,
            permutations=199, bootstrap=9,
        )  # fmt: skip
        hits += [found.mean.p <= 0.1, found.covariance.p <= 0.1]
    # 15 expected of 150; a test that holds its level has more than 28 with probability 0.0004
    assert (hits <= 28).all() and (hits >= 4).all(), hits


def test_picture_tests_tell_a_mean_from_a_covariance() -> None:
    generator = np.random.default_rng(0)
    old, new = correlated(generator, 400), correlated(generator, 300)
    same = picture_shifts(old, new, seed=0, permutations=499)
    assert same.mean.p > 0.01 and same.covariance.p > 0.01
    moved = picture_shifts(old, new + 1.0 * old.std(axis=0)[0] * np.eye(60)[0], seed=0)
    assert moved.mean.p < 0.001 and moved.mean.effect == pytest.approx(0.9, abs=0.2)
    assert moved.mean.low < moved.mean.effect < moved.mean.high
    wider = picture_shifts(old, new * 1.8, seed=0)
    assert wider.covariance.p < 0.001 and wider.covariance.effect > 0.5
    assert wider.mean.effect < 0.3


def test_a_shift_outside_the_principal_directions_shows_in_what_they_leave_over() -> None:
    """Noise in a thousand new directions, each too small to be a principal one."""
    generator = np.random.default_rng(1)
    old = np.concatenate([correlated(generator, 200), np.zeros((200, 1000))], axis=1)
    new = np.concatenate(
        [correlated(generator, 200), generator.normal(0, 0.1, (200, 1000))], axis=1
    )
    assert picture_shifts(old, new, seed=0).covariance.p < 0.001


def test_pictures_all_alike_and_too_few() -> None:
    same = picture_shifts(np.ones((50, 8)), np.ones((50, 8)), seed=0, permutations=99)
    assert same.covariance.p == 1.0 and same.covariance.effect == 0.0
    assert same.mean.p == 1.0 and same.mean.effect == 0.0
    with pytest.raises(EvaluationError, match="too few"):
        picture_shifts(np.ones((50, 8)), np.ones((19, 8)), seed=0)
    with pytest.raises(EvaluationError, match="finite"):
        picture_shifts(np.full((50, 8), np.nan), np.ones((50, 8)), seed=0)


def test_no_drift_stays_small_at_any_n() -> None:
    """The effect has no part that grows as n falls: a Fréchet distance does."""
    made = [
        picture_shifts(drift_lab.features(1, n), drift_lab.features(2, n), seed=0, permutations=199)
        for n in (40, 200, 1500)
    ]
    assert all(found.mean.effect < 0.6 for found in made)
    assert made[-1].mean.high < 0.3 and made[-1].covariance.high < 0.3


def test_rates_by_fisher() -> None:
    found = rate_shift((0, 395), (9, 100))
    assert found.p == pytest.approx(4.06e-7, rel=0.5) and found.effect == pytest.approx(0.09)
    assert found.low > 0.03
    assert rate_shift((0, 395), (0, 100)).p == 1.0


def test_rank_test_and_delong() -> None:
    generator = np.random.default_rng(0)
    covered, hits = 0, 0
    for _ in range(300):
        a, b = generator.normal(0, 1, 60), generator.normal(0.5, 1, 40)
        found = rank_shift(a, b)
        covered += found.low <= 0.1382 <= found.high  # P(b > a) - 1/2 = Phi(0.5 / sqrt 2) - 1/2
        hits += rank_shift(a, generator.normal(0, 1, 40)).p <= 0.05
    assert covered >= 275 and hits <= 28
    assert rank_shift(np.zeros(50), np.zeros(50)).p == 1.0


def test_script_mix() -> None:
    latin, han = np.eye(12)[[0] * 200], np.eye(12)[[7] * 200]
    same = mix_shift(latin, latin[:100], seed=0, permutations=199)
    assert same.p == 1.0 and same.effect == 0.0
    some = mix_shift(latin, np.concatenate([latin[:80], han[:20]]), seed=0, permutations=1999)
    assert some.p < 0.001 and some.effect == pytest.approx(0.2)


def waits(seed: int, n: int = 600, slower: float = 1.0) -> Latencies:
    """Answers of one server whose requests wait for one another, over a day."""
    generator = np.random.default_rng(seed)
    arrived = np.sort(generator.uniform(0, 86400, n))
    work, free, took = slower * 0.7 * 86400 / n, 0.0, np.zeros(n)
    for i in range(n):
        free = max(free, arrived[i]) + work * generator.exponential()
        took[i] = free - arrived[i]
    return Latencies(arrived, took)


def test_latencies_hold_their_level_though_requests_wait_for_one_another() -> None:
    """A test that takes requests for independent finds a difference in most of these."""
    hits = naive = 0
    for seed in range(25):
        first, second = waits(2 * seed), waits(2 * seed + 1)
        found = latency_shift(first, second, 0.5, seed=seed, permutations=199)
        assert found is not None
        hits += found.p <= 0.1
        naive += rank_shift(first.seconds, second.seconds).p <= 0.1
    assert hits <= 8 and naive > 10, (hits, naive)  # of 25; 2.5 expected
    slow = latency_shift(waits(1), waits(2, slower=1.35), 0.5, seed=0, permutations=1999)
    assert slow is not None and slow.p < 0.01 and slow.effect > 0.5
    assert latency_shift(waits(1), Latencies(np.zeros(5), np.ones(5)), 0.5, seed=0,
                         permutations=99) is None  # fmt: skip
