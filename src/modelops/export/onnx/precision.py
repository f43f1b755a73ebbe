"""Conversion of an fp32 graph to a mixed one: 16-bit where that is safe, float32 where it is not.

Inputs and outputs stay float32, so a pipeline around the graph computes as before. Inside, these
stay float32: normalisations, softmax, exponentials, powers, sums and sines (in reduced precision
they lose the digits that matter: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740); nodes
that compute shapes; every node that reads or makes a value beyond a safe share of the format's
largest number on measured inputs; and every node whose weights would not survive. Without measured
inputs only the weights are known, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelops.base.errors import ExportError, UsageError
from modelops.export.graphs.external import (
    EXTERNAL_BYTES,
    check_data,
    check_memory,
    load_structure,
    save_graph,
)
from modelops.export.graphs.graph import Array
from modelops.export.onnx.mixed import FLOAT, GraphWeights, MixedPlan
from modelops.export.onnx.overflow import NARROW, SAFE_SHARE, Narrow, float_format, measure_ranges

_SLACK = 256 << 20
_BFLOAT16_OPSET = 22  # before it, Conv has no bfloat16


@dataclass
class PrecisionReport:
    """Nodes that were converted, and those that were not, with the reason.

    Attributes:
        precision: "float16" or "bfloat16".
        low_nodes: number of nodes that compute in it.
        float32_nodes: number of float nodes that do not.
        casts: number of Cast nodes added.
        kept: {node: why it stays float32}, for those that their operator alone would not keep.
        kinds: {operator: number of its nodes that stay float32 because of it}.
        bytes_before: size of the float weights before.
        bytes_after: size of the float weights after.
        runs: number of runs of the graph in which ranges were measured; 0 is not measured.
        largest: the largest magnitude found; None if not measured.
        bound: magnitude from which on a value stays float32.
    """

    precision: str
    low_nodes: int = 0
    float32_nodes: int = 0
    casts: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    runs: int = 0
    largest: float | None = None
    bound: float = 0.0

    def record(self) -> dict[str, Any]:
        """Return plain values for a record; an infinite magnitude is the text "inf"."""
        values = asdict(self)
        if self.largest is not None and not math.isfinite(self.largest):
            values["largest"] = "inf"
        return values


def convert_precision(
    source: Path,
    target: Path,
    precision: Narrow,
    *,
    keep_fp32: Collection[str] = (),
    feeds: Iterable[Mapping[str, Array]] | None = None,
    safe_share: float = SAFE_SHARE,
    external_bytes: int = EXTERNAL_BYTES,
) -> PrecisionReport:
    """Write a graph's mixed 16-bit version; the same source and feeds give the same bytes.

    Args:
        source: an fp32 model.onnx that is not quantised.
        target: where the mixed one goes.
        precision: "float16" or "bfloat16"; a bfloat16 graph has at least opset 22.
        keep_fp32: names of nodes, or module paths (`unet.mid_block`), below which all stays fp32.
        feeds: real inputs, run one after the other; see `overflow.measure_ranges`.
        safe_share: of the format's largest number.
        external_bytes: see `writer.write_graph`.

    Raises:
        UsageError: an unknown precision, or a name in `keep_fp32` that no node has.
        ExportError: the graph is quantised or not in float32, cannot be run on the feeds, or
            there is not enough memory.
    """
    if precision not in NARROW:
        raise UsageError(f"unknown precision {precision!r}", hint=f"one of {', '.join(NARROW)}")
    model = load_structure(source)
    size = (check_data(source, model) or source).stat().st_size
    # The narrower weights and their bytes; before that, onnxruntime's copy of the wide ones.
    check_memory(size + _SLACK, doing=f"converting {source.parent.name} to {precision}")
    narrow = float_format(precision)
    _check_source(model, source)
    if precision == "bfloat16":
        _raise_opset(model, source)
    plan = MixedPlan(model, narrow)
    plan.keep_named(keep_fp32)
    report = PrecisionReport(precision=precision, bound=safe_share * narrow.largest)
    if feeds is not None:
        ranges = measure_ranges(source, plan.activations(), _count(feeds, report))
        report.largest = max(ranges.values(), default=0.0)
        plan.keep_measured(ranges, report.bound)
    weights = GraphWeights(source, model)
    plan.keep_weights(weights)
    plan.relax()
    report.kept, report.kinds = plan.kept, dict(sorted(plan.kinds.items()))
    report.low_nodes = len(plan.low)
    report.float32_nodes = len(plan.float_nodes) - len(plan.low)
    report.bytes_before = sum(weights.bytes_of(name) for name in plan.weights)
    mixed, report.casts = plan.build(weights)
    report.bytes_after = sum(
        len(item.raw_data) for item in mixed.graph.initializer
        if item.data_type in (FLOAT, narrow.onnx_type)
    )  # fmt: skip
    save_graph(mixed, target, external_bytes=external_bytes)
    return report


def _check_source(model: Any, path: Path) -> None:
    kinds = {item.data_type for item in model.graph.initializer}
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise ExportError(f"{path}: quantised already", hint="convert the float32 graph")
    if kinds & {10, 16} or FLOAT not in kinds:
        raise ExportError(f"{path}: its weights are not float32", hint="convert the float32 graph")


def _raise_opset(model: Any, path: Path) -> None:
    """Raise to the first opset with bfloat16 convolutions; only types changed up to it."""
    entry = next(item for item in model.opset_import if not item.domain)
    if entry.version >= _BFLOAT16_OPSET:
        return
    if any(node.op_type == "GroupNormalization" for node in model.graph.node):
        raise ExportError(f"{path}: GroupNormalization has another meaning before opset 21")
    entry.version = _BFLOAT16_OPSET


def _count(
    feeds: Iterable[Mapping[str, Array]], report: PrecisionReport
) -> Iterator[Mapping[str, Array]]:
    for feed in feeds:
        report.runs += 1
        yield feed
