"""Clustered rates: closed forms at both ends, order, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from modelops.base.errors import EvaluationError
from modelops.metrics.clustered import clustered_rate
from modelops.metrics.intervals import clopper_pearson


def test_one_image_a_prompt_is_the_exact_interval() -> None:
    hits = np.arange(200) < 3
    found = clustered_rate(hits, np.arange(200))
    assert found.interval == clopper_pearson(3, 200)
    assert (found.clusters, found.design_effect, found.effective_n) == (200, 1.0, 200.0)
    one = clustered_rate(hits, np.zeros(200, int))
    assert one.interval == clopper_pearson(3, 200) and one.clusters == 1


def test_images_that_are_all_alike_count_once_a_prompt() -> None:
    owners = np.repeat(np.arange(100), 4)
    hits = np.isin(owners, np.arange(20))
    found = clustered_rate(hits, owners)
    exact = clopper_pearson(20, 100)
    assert found.effective_n == pytest.approx(100, rel=0.02)
    assert found.interval.low == pytest.approx(exact.low, rel=0.02)
    assert found.interval.high == pytest.approx(exact.high, rel=0.02)


@pytest.mark.parametrize("hits", [0, 400])
def test_no_hits_cannot_tell_how_alike_images_are(hits: int) -> None:
    owners = np.repeat(np.arange(100), 4)
    found = clustered_rate(np.arange(400) < hits, owners).interval
    exact = clopper_pearson(hits // 4, 100)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_neither_order_nor_names_of_prompts_matter() -> None:
    generator = np.random.default_rng(0)
    owners = generator.integers(0, 30, 200)
    hits = generator.random(200) < 0.2
    order = generator.permutation(200)
    found = clustered_rate(hits[order], owners[order] * 7 + 1000)
    assert found.interval == clustered_rate(hits, owners).interval


def test_what_is_no_rate_is_refused() -> None:
    with pytest.raises(EvaluationError, match="0 images"):
        clustered_rate([], [])
    with pytest.raises(EvaluationError, match="2 images of 3 prompts"):
        clustered_rate([True, False], [1, 2, 3])


@pytest.mark.parametrize(("rate", "alike"), [(0.05, 0.0), (0.05, 1.0), (0.3, 0.5)])
def test_the_interval_covers(rate: float, alike: float) -> None:
    """400 simulated evaluations of 100 prompts with 4 images; 92 % of them at the least."""
    generator = np.random.default_rng(1)
    owners = np.repeat(np.arange(100), 4)
    covered = 0
    for _ in range(400):
        if alike == 0.0:
            chances = np.full(100, rate)
        elif alike == 1.0:
            chances = (generator.random(100) < rate).astype(float)
        else:
            spread = 1 / alike - 1
            chances = generator.beta(rate * spread, (1 - rate) * spread, 100)
        hits = generator.random((100, 4)) < chances[:, None]
        found = clustered_rate(hits.ravel(), owners).interval
        covered += found.low <= rate <= found.high
    assert covered / 400 >= 0.92


def test_an_interval_that_ignores_prompts_would_not_cover() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        hits = int((generator.random(100) < 0.3).sum()) * 4
        found = clopper_pearson(hits, 400)
        covered += found.low <= 0.3 <= found.high
    assert covered / 200 < 0.8
