"""What INT8 must be to be kept: surely faster than what it replaces, and within its budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelops.base.errors import ExportError
from modelops.export.int8.search import Decision, SearchResult
from modelops.export.int8.speed import SPEED_BATCHES
from modelops.records.base import Measurement

# What INT8 replaces. Beside them stands bf16, which is as much work saved for other pictures.
BASELINES = ("onnxruntime_fp32", "openvino_fp32")
_WAY_OUT = "--allow keeps it and records the waiver"


def slower_than(speed: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """The fp32 baselines that INT8 was not seen to be faster than, with the ratios.

    At the largest batch the whole 95 % interval must be above 1; at the others it may reach below,
    but not lie below as a whole.

    Returns:
        "BASELINE at batch N" to how many times as fast INT8 was.
    """
    found = {}
    for batch in SPEED_BATCHES:
        for baseline in BASELINES:
            ratio = speed.get(f"denoiser_batch{batch}_over_{baseline}")
            if ratio is None or ratio.low is None or ratio.high is None:
                continue
            worst = ratio.low if batch == max(SPEED_BATCHES) else ratio.high
            if worst <= 1.0:
                found[f"{baseline} at batch {batch}"] = ratio
    return found


def require_faster(
    speed: Mapping[str, Measurement], table: Sequence[Decision], *, allow: bool
) -> str | None:
    """Refuse INT8 that was not seen to be faster than fp32.

    Args:
        speed: from `measure_speed`; empty where it was not measured.
        table: the search's, for the message.
        allow: keep it all the same.

    Returns:
        What was waived by `allow`, or None.

    Raises:
        ExportError: it is not faster or was not timed, and `allow` is not set; the message ends
            with the table of why.
    """
    slower = slower_than(speed)
    if speed and not slower:
        return None
    listed = ", ".join(
        f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) x {name}"
        for name, ratio in slower.items()
    )
    fault = (
        f"not faster than what it replaces: {listed}" if slower else "its speed was not measured"
    )
    if allow:
        return f"{fault}, kept by --allow"
    raise ExportError(f"INT8 is refused: {fault}{_listed(table)}", hint=_WAY_OUT)


def require_budget(error: float, search: SearchResult, *, allow: bool) -> str | None:
    """Refuse INT8 whose error is above what the search was allowed.

    Args:
        error: relative error of what was written (root mean square over held-out rows).
        search: its budget, table and, where it found no set within the budget, why.
        allow: keep it all the same.

    Returns:
        What was waived by `allow`, or None.

    Raises:
        ExportError: it is above, and `allow` is not set; the message ends with the table of why.
    """
    if error <= search.budget:
        return None
    fault = f"its error {error:.3g} is above the budget of {search.budget:.3g}"
    fault += f" ({search.why})" if search.why else ""
    if allow:
        return f"{fault}, kept by --allow"
    raise ExportError(f"INT8 is refused: {fault}{_listed(search.table)}", hint=_WAY_OUT)


def _listed(table: Sequence[Decision]) -> str:
    """A line for each group of layers."""
    rows = [row.as_record() for row in table]
    return "".join(
        f"\n  {row['group']:28} error {row['error']:8.4f}  {_saved(row['ms_saved'])}  "
        f"{row['decision']}  {row['why']}"
        for row in rows
    )


def _saved(milliseconds: float | None) -> str:
    return f"{'not timed':>17}" if milliseconds is None else f"{milliseconds:8.3f} ms saved"
