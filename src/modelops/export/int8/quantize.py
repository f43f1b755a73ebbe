"""fp32 graph to INT8 graph."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from modelops.base.errors import ExportError
from modelops.export.int8.groups import included_nodes
from modelops.export.int8.qdq import QdqWriter, Scheme
from modelops.export.int8.ranges import Calibration
from modelops.export.onnx.weight_range import WeightRange


def quantize_graph(
    source: Path,
    target: Path,
    calibration: Calibration,
    *,
    keep_fp32: Collection[str] = (),
    scheme: Scheme = "sym",
    weight_range: WeightRange = "full",
) -> None:
    """Write a QDQ graph.

    Args:
        source: the fp32 model.onnx.
        target: where the quantised one goes.
        calibration: of that graph.
        keep_fp32: groups (see `groups.group_of`) that are not quantised.
        scheme: "sym" (S8S8, per-channel weights, float bias, no Q on outputs; for TensorRT and
            OpenVINO) or "ort-cpu" (U8S8, Q on outputs of Conv; for onnxruntime on a CPU).
        weight_range: "full" 8 bits, or "reduced" 7 that no processor's sums saturate with.

    Raises:
        ExportError: nothing to quantise, a weight or activation is not finite, or the table is of
            another graph or method.
    """
    writer = QdqWriter(source)
    groups = writer.groups()
    if not groups:
        raise ExportError(f"{source}: no layer with constant weights to quantise")
    ranges = writer.ranges(calibration)
    included = included_nodes(groups, keep_fp32)
    writer.write(target, ranges, included, scheme=scheme, weight_range=weight_range)
