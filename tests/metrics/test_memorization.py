"""Nearest neighbours, authenticity and the verdict on copying, against brute force and counting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact

from modelops.base.errors import EvaluationError
from modelops.metrics import memorization
from modelops.metrics.memorization import (
    Neighbours,
    detectable_rate,
    first_of_each,
    fisher_greater,
    holm,
    is_authentic,
    is_singled_out,
    judge_copying,
    nearest_neighbours,
    own_neighbour_distances,
)
from modelops.metrics.overfitting import Losses, find_overfitting, rows_to_losses

# Held-out and training loss of a real run of 1,400 steps on 3,163 emoji at 32 pixels.
STAGNATING = [
    (0, 1.7898, 1.7634), (100, 0.4319, 0.4540), (200, 0.2732, 0.2880), (300, 0.2303, 0.2345),
    (400, 0.2094, 0.2072), (500, 0.2004, 0.1890), (600, 0.1932, 0.1744), (700, 0.1923, 0.1643),
    (800, 0.1931, 0.1558), (900, 0.1915, 0.1485), (1000, 0.1904, 0.1412), (1100, 0.1891, 0.1350),
    (1200, 0.1906, 0.1280), (1300, 0.1934, 0.1214), (1400, 0.1969, 0.1166),
]  # fmt: skip


def cosine_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second)]
    return 1.0 - unit[0] @ unit[1].T


def judged(samples: np.ndarray, heldout: np.ndarray, training: np.ndarray, **more: object):  # type: ignore[no-untyped-def]
    near, real = nearest_neighbours(samples, training), nearest_neighbours(heldout, training)
    return judge_copying(
        near, real,
        own_samples=own_neighbour_distances(training, near.index),
        own_heldout=own_neighbour_distances(training, real.index), **more,
    )  # fmt: skip


def test_neighbours_equal_a_brute_force_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    training, queries = random.normal(size=(37, 12)), random.normal(size=(23, 12))
    expected = cosine_distances(queries, training)
    own = cosine_distances(training, training) + 9 * np.eye(37)
    for block in (1, 100, 1 << 24):
        monkeypatch.setattr(memorization, "BLOCK", block)
        found = nearest_neighbours(queries, training)
        np.testing.assert_array_equal(found.index, expected.argmin(1))
        np.testing.assert_allclose(found.distance, expected.min(1), atol=1e-6)
        np.testing.assert_allclose(found.second, np.sort(expected)[:, 1], atol=1e-6)
        rows = np.array([5, 0, 36, 5])
        np.testing.assert_allclose(
            own_neighbour_distances(training, rows), own.min(1)[rows], atol=1e-6
        )


def test_a_picture_beside_one_training_picture_alone_is_singled_out() -> None:
    training = np.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 0.1]])
    found = nearest_neighbours(np.array([[1, 0.1, 0], [0, 1, 0.05], [1.0, 0, 0]]), training)
    assert is_singled_out(found).tolist() == [True, False, True]
    assert is_singled_out(found.take(np.array([1]))).tolist() == [False]
    assert not is_singled_out(Neighbours(found.distance, found.index)).any()


def test_neighbours_refuse_what_has_none() -> None:
    with pytest.raises(EvaluationError, match="no training"):
        nearest_neighbours(np.ones((2, 4)), np.ones((0, 4)))
    with pytest.raises(EvaluationError, match="no training neighbour"):
        own_neighbour_distances(np.ones((1, 4)), np.array([0]))
    with pytest.raises(EvaluationError, match="not finite"):
        nearest_neighbours(np.full((1, 4), np.nan), np.ones((3, 4)))


def test_authenticity_is_that_of_its_paper() -> None:
    random = np.random.default_rng(1)
    training, queries = random.normal(size=(40, 6)), random.normal(size=(30, 6))
    queries[:10] = training[:10] + 0.01 * random.normal(size=(10, 6))
    near = nearest_neighbours(queries, training)
    made = is_authentic(near, own_neighbour_distances(training, near.index))
    cross, own = cosine_distances(queries, training), cosine_distances(training, training)
    for row in range(30):
        closest = int(cross[row].argmin())
        others = np.delete(own[closest], closest)
        assert made[row] == (cross[row, closest] > others.min())
    assert not made[:10].any()


def test_an_exact_copy_is_not_authentic_even_beside_a_duplicate() -> None:
    training = np.random.default_rng(2).normal(size=(9, 700)).astype(np.float32)
    training[4] = training[3]
    near = nearest_neighbours(training[3:4] * 7, training)
    assert not is_authentic(near, own_neighbour_distances(training, near.index)).any()


def test_one_image_of_each_prompt_is_kept() -> None:
    np.testing.assert_array_equal(first_of_each(np.array([2, 2, 0, 1, 0])), [0, 2, 3])
    np.testing.assert_array_equal(first_of_each(np.array([0, 0, 0])), [0, 1, 2])


def test_fishers_test_is_scipys() -> None:
    for hits, n, others, m in ((3, 20, 0, 30), (0, 5, 0, 5), (9, 9, 1, 8), (2, 50, 9, 40)):
        table = [[hits, n - hits], [others, m - others]]
        expected = fisher_exact(table, alternative="greater").pvalue
        assert fisher_greater(hits, n, others, m) == pytest.approx(expected)


def test_holms_method_on_an_example() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.001]) == pytest.approx([0.6, 0.002])
    assert holm([0.7, 0.9]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("n", "hits", "m"), [(395, 0, 395), (120, 4, 200), (60, 1, 30)])
def test_the_detectable_rate_has_the_power_it_claims(n: int, hits: int, m: int) -> None:
    alpha, base = 0.05 / 3, hits / m
    share = detectable_rate(n, hits, m, alpha=alpha)
    assert share is not None
    significant = [k for k in range(n + 1) if fisher_greater(k, n, hits, m) <= alpha]
    rate = base + share * (1 - base)
    assert binom.sf(significant[0] - 1, n, rate) == pytest.approx(0.8)
    half_seen = detectable_rate(n, hits, m, alpha=alpha, sensitivity=0.5)
    assert half_seen == pytest.approx((rate - base) / (0.5 - base))


def test_nothing_is_detectable_with_too_little() -> None:
    assert detectable_rate(2, 0, 400, alpha=0.01) is not None
    assert detectable_rate(2, 0, 3, alpha=0.01) is None
    assert detectable_rate(400, 0, 400, alpha=0.01, sensitivity=0.0) is None
    assert detectable_rate(400, 300, 400, alpha=0.01, sensitivity=0.5) is None


def test_copies_are_found_and_their_absence_is_said_only_with_enough_pictures() -> None:
    random = np.random.default_rng(3)
    training, heldout, new = (random.normal(size=(n, 24)) for n in (600, 300, 300))
    found = judged(new, heldout, training)
    assert found.answer == "no sign of copying"
    assert found.detectable_rate is not None and found.detectable_rate < 0.05
    assert judged(new[:20], heldout, training).answer == "cannot tell"
    blind = judged(new, heldout, training, control=(2, 48))
    assert blind.answer == "cannot tell" and "2 of 48 known copies" in blind.reason
    some = new.copy()
    some[:24] = training[:24] + 0.1 * random.normal(size=(24, 24))
    found = judged(some, heldout, training)
    assert found.answer == "copies" and "24 of 300" in found.reason
    assert found.tests[0].name == "near_copies" and found.tests[0].found
    rough = training[:300] + 0.6 * random.normal(size=(300, 24))  # below 0.95, yet copies
    found = judged(rough, heldout, training)
    assert found.answer == "copies" and "not authentic" in found.reason
    assert not found.tests[0].found


@pytest.mark.parametrize("spread", [0.9, 0.8, 0.5])
@pytest.mark.parametrize("dim", [16, 64])
def test_pictures_with_less_variety_are_not_called_copies(dim: int, spread: float) -> None:
    """They are drawn anew around the same centres, so they copy nothing; copies with as much noise
    are told from them."""
    random = np.random.default_rng(dim)
    centres = 3 + 2 * random.normal(size=(20, dim))

    def draw(n: int, width: float) -> np.ndarray:
        return centres[random.integers(0, 20, n)] + width * random.normal(size=(n, dim))

    training, heldout = draw(700, 1.0), draw(200, 1.0)
    found = judged(draw(200, spread), heldout, training, near_copy_cosine=0.9999)
    unauthentic = found.tests[1]
    assert unauthentic.name == "unauthentic" and unauthentic.found
    assert found.answer == "cannot tell" and "less variety" in found.reason
    changed = training[:200] + 0.5 * random.normal(size=(200, dim))
    assert judged(changed, heldout, training, near_copy_cosine=0.9999).answer == "copies"


def test_closer_as_a_whole_is_overfitting_and_not_copying() -> None:
    random = np.random.default_rng(4)
    training, heldout = random.normal(size=(400, 40)), random.normal(size=(200, 40))
    nearer = 0.45 * training[:200] + random.normal(size=(200, 40))
    found = judged(nearer, heldout, training)
    assert {t.name for t in found.tests if t.found} >= {"closer"}
    assert next(t for t in found.tests if t.name == "near_copies").p_adjusted == 1.0


def test_new_pictures_are_rarely_called_copies() -> None:
    random = np.random.default_rng(5)
    wrong = 0
    for _ in range(200):
        training, heldout, new = (random.normal(size=(n, 3)) for n in (80, 60, 60))
        wrong += any(test.found for test in judged(new, heldout, training).tests)
    assert wrong <= 19  # 5 % of 200 and three standard deviations


def test_the_verdict_refuses_empty_sides() -> None:
    none, one = (
        Neighbours(np.zeros(0), np.zeros(0, np.int64)),
        Neighbours(np.ones(1), np.zeros(1, np.int64)),
    )
    with pytest.raises(EvaluationError, match="cannot be compared"):
        judge_copying(none, one, own_samples=np.zeros(0), own_heldout=np.ones(1))


def test_a_real_run_that_stagnates_and_then_overfits_is_seen() -> None:
    losses = [Losses(*row) for row in STAGNATING]
    seen = {now.step: find_overfitting(losses[: i + 1]) for i, now in enumerate(losses)}
    assert [step for step, found in seen.items() if found] == list(range(800, 1500, 100))
    assert all(seen[s].kind == "stagnates" and seen[s].since.step == 500  # type: ignore[union-attr]
               for s in range(800, 1400, 100))  # fmt: skip
    last = seen[1400]
    assert last is not None and last.kind == "rises"
    assert "overfitting since step 1100" in str(last)


def test_losses_that_fall_together_are_no_overfitting() -> None:
    steps = range(12)
    together = [Losses(s, 1.1 * 0.8**s + 0.1, 0.8**s + 0.1) for s in steps]
    assert not any(find_overfitting(together[:n]) for n in steps)
    still = [Losses(s, 0.5, 0.4) for s in steps]  # nothing is learned, so nothing overfits
    assert find_overfitting(still) is None
    worse = [Losses(s, 0.5 + 0.1 * s, 0.4 + 0.1 * s) for s in steps]  # diverging is another matter
    assert find_overfitting(worse) is None


def test_rows_of_the_run_become_checks_once_each() -> None:
    rows = [
        {"step": 1, "loss": 0.3}, {"step": 2, "validation_loss": 0.5, "train_probe_loss": 0.4},
        {"step": 2, "validation_loss": 0.6, "train_probe_loss": 0.4}, {"step": 3, "lr": 1.0},
        {"step": 4, "validation_loss": 0.7},
        {"step": 5, "validation_loss": 0.8, "train_probe_loss": 0.3},
    ]  # fmt: skip
    assert rows_to_losses(rows) == [Losses(2, 0.6, 0.4), Losses(5, 0.8, 0.3)]
    assert rows_to_losses(rows, last_step=3) == [Losses(2, 0.6, 0.4)]
