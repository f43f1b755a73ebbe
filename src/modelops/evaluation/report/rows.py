"""Measurements as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping

from modelops.records.base import Measurement


def metric_rows(metrics: Mapping[str, Measurement]) -> list[list[str]]:
    """[metric, value, interval, n, method] of each measurement; what was not measured says why."""
    rows = []
    for name, measured in metrics.items():
        if measured.value is None:
            rows.append([name, "not measured", "", "", measured.not_measured or ""])
            continue
        interval = f"[{_short(measured.low)}, {_short(measured.high)}]"
        mode = f"mode {measured.details['mode']}; " if "mode" in measured.details else ""
        rows.append(
            [name, _short(measured.value), interval, str(measured.n), mode + measured.method]
        )
    return rows


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
