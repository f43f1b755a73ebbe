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
    from scipy.stats import beta

    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return Measurement(
        value=hits / n, low=low, high=high, n=n, method="Clopper-Pearson",
        higher_is_better=higher_is_better, protocol=protocol,
        details={"hits": hits, **(details or {})},
    )  # fmt: skip
