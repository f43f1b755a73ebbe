"""Slices against the rest: p-values against SciPy, intervals, and false claims by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from modelops.base.errors import EvaluationError
from modelops.metrics.intervals import Interval, clopper_pearson
from modelops.metrics.multiple import (
    MANY,
    SliceDifference,
    bounded_rate,
    holm,
    independent_difference,
    independent_p,
    paired_t_p,
    permutation_p,
    sign_flip_p,
    slice_difference,
)

# Groups of very different sizes, as OpenMoji's held-out prompts have.
SIZES = [104, *[18] * 8, 6, 6, *[1] * 135]
GROUPS = np.repeat(np.arange(len(SIZES)), SIZES)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_holm_literals() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert len(holm([])) == 0


def test_permuting_binary_values_is_fishers_exact_test() -> None:
    first, second = np.repeat([1.0, 0.0], [7, 8]), np.repeat([1.0, 0.0], [3, 22])
    exact = stats.fisher_exact([[7, 8], [3, 22]]).pvalue
    made = permutation_p(
        first, second, studentised=False, permutations=40_000, generator=generator()
    )
    assert made == pytest.approx(exact, abs=4 * np.sqrt(exact / 40_000))
    assert independent_p(
        first, second, rate=True, permutations=1, generator=generator()
    ) == pytest.approx(exact)


def test_permuting_agrees_with_welch_and_gives_way_to_it() -> None:
    first, second = generator().normal(0.5, 1, 60), generator(1).normal(0, 3, 40)
    welch = stats.ttest_ind(first, second, equal_var=False).pvalue
    made = permutation_p(
        first, second, studentised=True, permutations=20_000, generator=generator()
    )
    assert made == pytest.approx(welch, rel=0.1)
    many = generator(2).normal(size=(2, MANY))
    assert independent_p(
        many[0], many[1], rate=False, permutations=1, generator=generator()
    ) == pytest.approx(stats.ttest_ind(many[0], many[1], equal_var=False).pvalue)


def test_paired_tests_agree_with_scipy() -> None:
    differences = generator().normal(0.3, 1, 14)
    assert paired_t_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert paired_t_p(np.zeros(12)) == 1.0
    signs = np.array([1.0] * 9 + [-1.0] * 2)
    exact = stats.binomtest(9, 11).pvalue
    made = sign_flip_p(signs, permutations=40_000, generator=generator())
    assert made == pytest.approx(exact, abs=0.006)
    assert sign_flip_p(np.zeros(12), permutations=99, generator=generator()) == 1.0


def test_a_rate_of_zeros_and_ones_has_clopper_pearsons_interval() -> None:
    made, exact = bounded_rate(np.repeat([1.0, 0.0], [3, 17])), clopper_pearson(3, 20)
    assert (made.value, made.low, made.high) == pytest.approx((exact.value, exact.low, exact.high))
    none = bounded_rate(np.zeros(200))
    assert (none.low, none.high) == pytest.approx((0.0, 0.01827534), abs=1e-6)


def test_difference_of_independent_rates_literal() -> None:
    # Newcombe (1998), 56/70 against 48/80 with Wilson's intervals: 0.0524 to 0.3339.
    made = independent_difference(
        Interval(0.8, 0.6918, 0.8776, ""), Interval(0.6, 0.4904, 0.7010, "")
    )
    assert (made.low, made.high) == pytest.approx((0.0524, 0.3339), abs=2e-3)


def compare(
    values: np.ndarray, member: np.ndarray, groups: np.ndarray, **more: object
) -> SliceDifference:
    options = {"rate": False, "seed": 0, "resamples": 50, "permutations": 999, **more}
    return slice_difference(values, groups, member, **options)  # type: ignore[arg-type]


def test_pairing_within_groups_finds_what_lies_between_them_otherwise() -> None:
    groups = np.repeat(np.arange(12), 5)
    member = np.tile([True, False, False, False, False], 12)
    level = generator().normal(0, 5, 12)[groups]  # between groups, larger than the effect
    values = level + 0.5 * member + generator(1).normal(0, 0.2, 60)
    found = compare(values, member, groups)
    assert found.paired and found.n_both == found.n_inside == 12
    assert found.p is not None and found.p < 1e-3
    assert found.difference is not None
    assert found.difference.low < 0.5 < found.difference.high
    alone = compare(values, member, np.arange(60))
    assert not alone.paired and alone.p is not None and alone.p > 0.1


def test_too_few_groups_are_counted_and_not_judged() -> None:
    member = np.arange(40) < 30
    found = compare(np.arange(40.0), member, np.repeat([0, 1], [30, 10]))
    assert (found.n_inside, found.n_rest, found.p) == (1, 1, None)
    assert found.inside is not None and found.inside.value == pytest.approx(14.5)
    nothing = compare(np.arange(40.0), np.zeros(40, bool), np.arange(40))
    assert nothing.inside is None and nothing.rest is not None and nothing.p is None


def test_other_slices_do_not_change_a_comparison_and_sides_mirror() -> None:
    values, member = generator().normal(size=60), np.arange(60) < 20
    one, again = (compare(values, member, np.arange(60)) for _ in range(2))
    assert one == again
    other = compare(values, ~member, np.arange(60))
    assert other.difference is not None and one.difference is not None
    assert other.difference.value == pytest.approx(-one.difference.value)


def test_bad_values_are_refused() -> None:
    member = np.arange(20) < 10
    for values, rate in ((np.full(20, np.nan), False), (np.full(20, 2.0), True)):
        with pytest.raises(EvaluationError, match="not finite, or not rates"):
            compare(values, member, np.arange(20), rate=rate)
    with pytest.raises(EvaluationError, match="length"):
        compare(np.zeros(19), member, np.arange(20))


def false_claims(n: int, rate: bool, grouped: bool) -> int:
    """Evaluations out of n that claim a difference where there is none, of 8 slices each."""
    random, claims = generator(7), 0
    for seed in range(n):
        values = random.normal(size=len(SIZES))[GROUPS] + random.normal(size=len(GROUPS))
        members = [np.isin(GROUPS, random.permutation(len(SIZES))[:40]) for _ in range(3)]
        members += [(np.arange(len(GROUPS)) % 6 == tone) & (GROUPS < 12) for tone in range(4)]
        members.append(GROUPS < 18)
        if rate:
            values = (values > 2.0).astype(float)
        groups = GROUPS if grouped else np.arange(len(GROUPS))
        found = [
            compare(values, m, groups, rate=rate, seed=seed, resamples=20, permutations=299).p
            for m in members
        ]
        claims += bool((holm([p for p in found if p is not None]) <= 0.05).any())
    return claims


def test_false_claims_by_simulation() -> None:
    assert false_claims(12, rate=False, grouped=True) <= 3
    assert false_claims(12, rate=False, grouped=False) >= 5  # why groups are the unit


@pytest.mark.slow
@pytest.mark.parametrize("rate", [False, True])
def test_false_claims_by_a_long_simulation(rate: bool) -> None:
    # 5 % of 600 are 30, plus 2.5 standard deviations.
    assert false_claims(600, rate=rate, grouped=True) <= 43
