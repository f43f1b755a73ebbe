"""Sensitivity of layers to rounding, by noise level."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from modelops.base.errors import ExportError, UsageError
from modelops.export.graphs.graph import Array
from modelops.export.int8.variants import Variants, root_mean_square

Mode = Literal["alone", "left_out"]
_EDGE = 4  # layers of a group at most that is measured first


def order_of_interest(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Order the groups so that a limit cuts off those that matter least: first the few layers at a
    network's edges, with most error and little time, then the largest groups, with most time."""
    return sorted(groups, key=lambda group: (len(groups[group]) > _EDGE, -len(groups[group])))


def scan_groups(
    variants: Variants,
    *,
    mode: Mode = "alone",
    bands: int = 4,
    time_limit_s: float | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the error of every group of layers, over all held-out rows and by noise level.

    This runs in onnxruntime in float32, so that nothing but INT8 is rounded.

    Args:
        variants: of the graph.
        mode: "alone": only the group is in INT8. "left_out": all but the group are.
        bands: noise levels are cut into this many bands of equal rows.
        time_limit_s: groups that do not fit are listed under "not_measured".
        on_step: called with (groups done, groups).

    Returns:
        A record for JSON: `mode`, `runtime`, `bands` (sigma_low, sigma_high, rows), `all_int8` and
        for each of `groups` a dict with `error` (relative, root mean square over rows), `bands`
        (the same of each band) and `nodes`; `not_measured`.

    Raises:
        UsageError: an unknown mode, or no bands.
    """
    if mode not in ("alone", "left_out"):
        raise UsageError(f"unknown mode {mode!r}", hint="alone or left_out")
    if bands < 1:
        raise UsageError(f"bands must be positive, got {bands}")
    started = time.monotonic()
    parts = [part for part in np.array_split(np.arange(len(variants.few)), bands) if len(part)]
    sigmas = variants.few.sigmas

    def summary(errors: Array) -> dict[str, Any]:
        return {
            "error": root_mean_square(errors),
            "bands": [root_mean_square(errors[part]) for part in parts],
        }

    record: dict[str, Any] = {
        "mode": mode,
        "runtime": "onnxruntime",
        "rows": len(variants.few),
        "bands": [
            {
                "sigma_low": float(sigmas[part[0]]),
                "sigma_high": float(sigmas[part[-1]]),
                "rows": len(part),
            }
            for part in parts
        ],
        "all_int8": summary(variants.rounding_errors()),
        "groups": {},
        "not_measured": [],
    }
    order = order_of_interest(variants.groups)
    for done, group in enumerate(order):
        on_step(done, len(order))
        late = time_limit_s is not None and time.monotonic() - started > time_limit_s
        if late or (mode == "left_out" and len(order) == 1):
            record["not_measured"].append(group)
            continue
        keep = [group] if mode == "left_out" else [g for g in variants.groups if g != group]
        errors = variants.rounding_errors(keep)
        record["groups"][group] = {**summary(errors), "nodes": len(variants.groups[group])}
    on_step(len(order), len(order))
    record["groups"] = {g: record["groups"][g] for g in variants.groups if g in record["groups"]}
    return record


def plot_sensitivity(record: dict[str, Any]) -> bytes:
    """Plot a heat map of a `scan_groups` record, groups down and noise levels across, as PNG.

    Raises:
        ExportError: the record has no group.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(record["groups"])
    if not names:
        raise ExportError("no group was measured, so there is nothing to plot")
    alone = record["mode"] == "alone"
    rows = [record["groups"][name]["bands"] for name in names] + [record["all_int8"]["bands"]]
    values = np.asarray(rows, dtype=np.float64) * 100.0
    labels = [*(name if alone else f"all but {name}" for name in names), "all in INT8"]
    figure = Figure(figsize=(2.8 + 1.0 * values.shape[1], 1.3 + 0.3 * len(labels)), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    ticks = [f"{band['sigma_low']:.2f}-{band['sigma_high']:.2f}" for band in record["bands"]]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    axes.set_xlabel("noise level", fontsize=8)
    what = "group alone in INT8" if alone else "group left out of INT8"
    axes.set_title(f"Relative error of the output in %, {what}", fontsize=8)
    middle = values.max() / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
