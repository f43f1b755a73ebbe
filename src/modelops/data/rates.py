"""Rates from counts, with exact intervals."""

from __future__ import annotations

from modelops.records.base import Measurement


def count_to_rate(
    hits: int,
    n: int,
    *,
    higher_is_better: bool | None = None,
    protocol: str | None = None,
    details: dict[str, float | int | str | bool | None] | None = None,
) -> Measurement:
    """Measure hits / n in [0, 1] with Clopper and Pearson's (1934) 95 % interval; n may be 0."""
    if n == 0:
        return Measurement.missing("there is nothing to count")
    from scipy.stats import binomtest

    exact = binomtest(hits, n).proportion_ci(0.95, method="exact")
    return Measurement(
        value=hits / n, low=float(exact.low), high=float(exact.high), n=n, method="Clopper-Pearson",
        higher_is_better=higher_is_better, protocol=protocol,
        details={"hits": hits, **(details or {})},
    )  # fmt: skip
