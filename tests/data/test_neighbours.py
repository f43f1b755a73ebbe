"""Pairs, clusters and components against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from modelops.base.errors import UsageError
from modelops.data.neighbours import (
    Pairs,
    all_pairs,
    candidate_pairs,
    connected_components,
    normalize_rows,
    star_clusters,
)
from modelops.data.units import build_units, deal_units


def brute_pairs(unit: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    cosine = unit.astype(np.float64) @ unit.astype(np.float64).T
    rows, columns = np.nonzero(np.triu(cosine >= threshold, 1))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def as_list(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))


def chain(count: int, step: float = 0.2) -> np.ndarray:
    """Unit vectors on a circle, `step` radians apart: cosine 0.98 between neighbours."""
    angles = np.arange(count) * step
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(60, 32))
    noisy = centres[generator.integers(0, 60, 3000)] + 0.25 * generator.normal(size=(3000, 32))
    return normalize_rows(noisy.astype(np.float32))


def test_all_pairs_equals_brute_force(vectors: np.ndarray) -> None:
    assert as_list(all_pairs(vectors, threshold=0.95)) == brute_pairs(vectors, 0.95)


def test_candidates_are_exact_and_among_the_nearest(vectors: np.ndarray) -> None:
    found = set(as_list(candidate_pairs(vectors, threshold=0.95, neighbours=5)))
    assert found <= set(brute_pairs(vectors, 0.95))
    strongest = as_list(all_pairs(vectors, threshold=0.99))
    assert found >= set(strongest)


def test_the_inverted_file_finds_most_of_them(vectors: np.ndarray) -> None:
    exact = set(as_list(candidate_pairs(vectors, threshold=0.95, neighbours=5)))
    approximate = candidate_pairs(vectors, threshold=0.95, neighbours=5, exact_below=100)
    assert len(exact & set(as_list(approximate))) > 0.95 * len(exact)
    assert (approximate.cosine >= 0.95).all()


def test_a_zero_vector_is_like_nothing() -> None:
    unit = normalize_rows(np.zeros((3, 4), np.float32))
    assert np.isfinite(unit).all()
    assert as_list(all_pairs(unit, threshold=0.5)) == []
    assert as_list(candidate_pairs(unit, threshold=0.5, neighbours=2)) == []


def test_a_chain_is_one_component_but_many_stars() -> None:
    unit = chain(15)
    pairs = all_pairs(unit, threshold=0.95)
    assert connected_components(15, pairs) == [list(range(15))]
    clusters = star_clusters(15, pairs)
    assert len(clusters) > 1
    for keeper, *members in clusters:
        assert all(unit[keeper] @ unit[member] >= 0.95 for member in members)
    together = [node for cluster in clusters for node in cluster]
    assert len(together) == len(set(together)), "no image is in two clusters"


def test_a_group_is_never_divided_and_a_long_chain_is_capped() -> None:
    unit = chain(40, step=0.02)  # 40 of 200 samples in one chain; the cap is 10
    vectors = np.zeros((200, 202), np.float32)
    vectors[:40, :2] = unit
    vectors[np.arange(40, 200), np.arange(42, 202)] = 1.0
    groups = [f"g{index // 2}" for index in range(200)]
    pairs = all_pairs(vectors, threshold=0.95)
    units = build_units(groups, pairs, [], fractions=(0.8, 0.1, 0.1))
    assert units.cap == 10 and max(units.sizes) <= 10
    assert units.cut_pairs > 0 and units.warnings()
    for first in range(0, 200, 2):
        assert units.unit_of[first] == units.unit_of[first + 1]


def test_same_pictures_stay_together_whatever_the_cap() -> None:
    empty = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    same = [(0, index) for index in range(1, 15)]
    units = build_units([str(i) for i in range(30)], empty, same, fractions=(0.8, 0.1, 0.1))
    assert len(set(units.unit_of[:15])) == 1 and len(units) == 16


@pytest.mark.parametrize("seed", range(5))
def test_units_are_dealt_near_the_fractions(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 30, 300)
    groups = [f"g{unit}" for unit, size in enumerate(sizes) for _ in range(size)]
    empty = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    units = build_units(groups, empty, [], fractions=(0.8, 0.1, 0.1))
    dealt = deal_units(units, (0.8, 0.1, 0.1), seed=seed)
    shares = np.bincount(dealt, weights=units.sizes, minlength=3) / len(groups)
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.02
    assert dealt == deal_units(units, (0.8, 0.1, 0.1), seed=seed)


def test_every_split_gets_a_unit_or_the_error_says_why() -> None:
    empty = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    for seed in range(20):
        units = build_units(["a", "b", "c"], empty, [], fractions=(0.8, 0.1, 0.1))
        assert sorted(deal_units(units, (0.8, 0.1, 0.1), seed=seed)) == [0, 1, 2]
    units = build_units(["a", "a", "b"], empty, [], fractions=(0.8, 0.1, 0.1))
    with pytest.raises(UsageError, match="cannot fill"):
        deal_units(units, (0.8, 0.1, 0.1), seed=0)
