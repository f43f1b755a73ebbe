"""Rates and medians against a margin: literals, other implementations, and coverage by counting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact, wilcoxon

from modelops.base.errors import EvaluationError
from modelops.metrics.noninferiority import (
    higher_rate_p,
    median_above_p,
    median_by_signs,
    rate_difference,
)


def test_rates_of_zero_have_a_width() -> None:
    found = rate_difference(0, 300, 0, 3000)
    assert found.value == 0
    assert found.low == pytest.approx(-0.00123, abs=1e-5)  # Clopper-Pearson's of 0 of 3000
    assert found.high == pytest.approx(0.01222, abs=1e-5)  # and of 0 of 300
    turned = rate_difference(0, 3000, 0, 300)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize(("p_new", "p_old"), [(0.02, 0.02), (0.05, 0.01), (0.3, 0.3)])
def test_the_interval_of_a_difference_covers_it(p_new: float, p_old: float) -> None:
    """Exact coverage, summed over all outcomes of two small samples."""
    n, m = 60, 90
    covered = 0.0
    for k in range(n + 1):
        for j in range(m + 1):
            weight = float(binom.pmf(k, n, p_new) * binom.pmf(j, m, p_old))
            if weight < 1e-9:
                continue
            found = rate_difference(k, n, j, m, confidence=0.9)
            covered += weight * (found.low <= p_new - p_old <= found.high)
    assert covered >= 0.9


def test_fisher_is_one_sided() -> None:
    assert higher_rate_p(5, 50, 0, 500) == pytest.approx(
        fisher_exact([[5, 45], [0, 500]], alternative="greater")[1]
    )
    assert higher_rate_p(0, 50, 5, 500) == 1.0
    with pytest.raises(EvaluationError):
        higher_rate_p(1, 0, 0, 1)


def test_median_limits_are_order_statistics() -> None:
    """n = 10, 95 %: the 2nd and the 9th value (a table of the sign test)."""
    found = median_by_signs(np.arange(1.0, 11.0))
    assert found is not None and (found.value, found.low, found.high) == (5.5, 2, 9)
    assert median_by_signs(np.arange(5.0)) is None  # 1 - 2 / 2**5 = 93.75 %
    six = median_by_signs(np.arange(6.0))
    assert six is not None and (six.low, six.high) == (0, 5)
    assert median_by_signs(np.zeros(0)) is None
    with pytest.raises(EvaluationError):
        median_by_signs(np.array([1.0, np.nan]))


def test_median_interval_covers_a_skewed_median() -> None:
    generator = np.random.default_rng(7)
    samples = np.exp(generator.normal(0.0, 2.0, (2000, 25)))  # median 1, mean 7
    found = [median_by_signs(row, confidence=0.9) for row in samples]
    covered = np.mean([one is not None and one.low <= 1 <= one.high for one in found])
    assert 0.89 <= covered <= 0.97


def test_sign_test_against_a_bound() -> None:
    assert median_above_p(np.full(7, 2.0), 1.0) == pytest.approx(0.5**7)
    assert median_above_p(np.full(7, 1.0), 1.0) == 1.0
    assert median_above_p(np.zeros(0), 1.0) == 1.0
    # A test that assumes more (symmetry) is sharper, never the other way on clean data.
    data = np.arange(1.0, 9.0)
    assert median_above_p(data, 0.0) >= wilcoxon(data, alternative="greater").pvalue
