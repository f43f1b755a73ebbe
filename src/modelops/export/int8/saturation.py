"""Choice of 8 or 7 bits for an INT8 graph's weights. With 7, sums saturate on no processor.

Processors without VNNI add two products of bytes in 16 bits. With weights of 8 bits such a sum may
not fit, and the runtime's error is then several times that of rounding (0.1 to 0.25 of the output,
bench/README.md). With weights of 7 bits it always fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from modelops.export.int8.variants import Variants, root_mean_square
from modelops.export.onnx.weight_range import WeightRange
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.probe import SAME_ERROR

# Times the error of 8 bits that a graph may have if it is correct on every processor.
ACCEPTED_COST = 1.25


@dataclass(frozen=True)
class WeightRangeChoice:
    """Range of the weights of an INT8 graph, with the errors that decided it.

    Attributes:
        chosen: "full" (8 bits) or "reduced" (7 bits).
        why: one phrase.
        errors: relative error with every group in INT8 and exact sums, by range; root mean square
            over held-out rows.
        served: the same error in the serving runtime on this processor, by range, with float32
            where there is no INT8.
    """

    chosen: WeightRange
    why: str
    errors: dict[str, float]
    served: dict[str, float]

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def choose_weight_range(variants: Variants, asked: str = "auto") -> WeightRangeChoice:
    """Measure both ranges with every group in INT8, unless one is asked for. `variants` then writes
    in the chosen one."""
    errors: dict[str, float] = {}
    served: dict[str, float] = {}
    for weight_range in get_args(WeightRange):
        if asked in ("auto", weight_range):
            variants.weight_range = weight_range
            errors[weight_range], served[weight_range] = _measure(variants)
    choice = decide_weight_range(errors, served, variants.runtime)
    variants.weight_range = choice.chosen
    return choice


def decide_weight_range(
    errors: dict[str, float], served: dict[str, float], runtime: str
) -> WeightRangeChoice:
    """Choose from measured numbers; see `WeightRangeChoice` for their meaning."""
    if len(errors) == 1:
        only: Any = next(iter(errors))
        return WeightRangeChoice(only, "asked for", errors, served)
    cost = errors["reduced"] / max(errors["full"], 1e-12)
    if not served["full"] <= SAME_ERROR * errors["full"]:
        times = served["full"] / max(errors["full"], 1e-12)
        why = f"8 bits saturate in {runtime} on this processor: {times:.1f} times their error"
        return WeightRangeChoice("reduced", why, errors, served)
    if cost <= ACCEPTED_COST:
        why = f"{cost:.2f} times the error of 8 bits, and right on every processor"
        return WeightRangeChoice("reduced", why, errors, served)
    why = f"7 bits would have {cost:.2f} times the error; wrong in some runtimes without VNNI"
    return WeightRangeChoice("full", why, errors, served)


def _measure(variants: Variants) -> tuple[float, float]:
    """Return (error with exact sums, error in the serving runtime here)."""
    with variants.written() as path:
        graphs = OrtGraph(path, as_written=True), open_graph(path, variants.runtime)
        exact, served = (root_mean_square(variants.row_errors(g, few=True)) for g in graphs)
    return exact, served
