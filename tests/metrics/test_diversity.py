"""Diversity against closed forms, brute force and a simulation of its interval."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from modelops.base.errors import EvaluationError
from modelops.metrics.diversity import diversity, within_prompts


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_against_brute_force() -> None:
    generator = np.random.default_rng(0)
    owner = np.array([2, 0, 0, 2, 5, 2, 7, 7, 0])
    features = generator.normal(size=(9, 6))
    names, within = within_prompts(features, owner)
    assert names.tolist() == [0, 2, 7]  # 5 has one image
    expected = [
        np.mean([distance(features[i], features[j])
                 for i, j in combinations(np.flatnonzero(owner == name), 2)])
        for name in names
    ]  # fmt: skip
    assert within == pytest.approx(expected)
    made = diversity(features, owner, seed=0, resamples=50)
    assert made["within"].value == pytest.approx(np.mean(expected))
    between = [
        np.mean([distance(features[i], features[j])
                 for i in np.flatnonzero(owner == a) for j in np.flatnonzero(owner == b)])
        for a, b in combinations((0, 2, 5, 7), 2)
    ]  # fmt: skip
    assert made["between"].value == pytest.approx(np.mean(between))


def test_closed_forms() -> None:
    axes = np.eye(4)
    made = diversity(np.repeat(axes, 2, axis=0), np.repeat(np.arange(4), 2), seed=0)
    assert (made["within"].value, made["between"].value) == pytest.approx((0.0, 1.0))
    swapped = diversity(np.tile(axes[:2], (3, 1)) * 3, np.repeat([0, 1, 2], 2), seed=0)
    assert (swapped["within"].value, swapped["between"].value) == pytest.approx((1.0, 0.5))


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(EvaluationError, match="two images"):
        diversity(np.eye(3), np.arange(3), seed=0)
    with pytest.raises(EvaluationError, match="zero or not finite"):
        diversity(np.zeros((4, 2)), np.array([0, 0, 1, 1]), seed=0)


def test_interval_between_prompts_covers_by_simulation() -> None:
    generator = np.random.default_rng(1)
    centre = np.r_[1.0, np.zeros(7)]

    def features(n: int) -> np.ndarray:
        prompts = centre + 0.7 * generator.normal(size=(n, 8))
        return np.repeat(prompts, 2, axis=0) + 0.3 * generator.normal(size=(2 * n, 8))

    truth = diversity(features(20_000), np.repeat(np.arange(20_000), 2), seed=0, resamples=20)
    hits = 0
    for index in range(200):
        made = diversity(features(40), np.repeat(np.arange(40), 2), seed=index, resamples=20)
        hits += made["between"].low <= truth["between"].value <= made["between"].high
    assert 180 <= hits <= 198  # 90 to 99 %
