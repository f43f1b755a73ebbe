"""Precisions that a runtime computes in."""

from __future__ import annotations

from pathlib import Path

from modelops.base.errors import ExportError, UsageError
from modelops.base.extras import has_module
from modelops.base.processor import this_processor
from modelops.export.graphs.axes import GraphAxes, read_axes
from modelops.records.export import ArtifactRecord


def default_precision(artifact_format: str, runtime: str) -> str:
    """Return the precision of nodes that are not INT8, if none was asked for."""
    if artifact_format == "int8" and runtime == "openvino" and openvino_has_bfloat16():
        return "bfloat16"
    return "float32"


# What each runtime runs on a CPU, measured with onnxruntime 1.31 and OpenVINO 2026.4. onnxruntime
# computes float16 graphs in float32 there and has no bfloat16 convolution.
_SUPPORTED: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("float32", "float16"),
    "openvino": ("float32", "float16", "bfloat16"),
}


def supported_precisions(runtime: str) -> tuple[str, ...]:
    """Return the precisions of a graph's weights that a runtime takes on a CPU.

    Raises:
        UsageError: the runtime is unknown.
    """
    if runtime not in _SUPPORTED:
        raise UsageError(f"unknown runtime {runtime!r}", hint=f"one of {', '.join(_SUPPORTED)}")
    return _SUPPORTED[runtime]


def graph_precision(axes: GraphAxes) -> str:
    """Return the narrowest float type of a graph's weights."""
    names = {"BFLOAT16": "bfloat16", "FLOAT16": "float16"}
    return next((name for kind, name in names.items() if kind in axes.types), "float32")


def require_supported(path: Path, runtime: str, axes: GraphAxes | None = None) -> None:
    """Refuse a graph that a runtime cannot run on a CPU, before it fails with its own error.

    Raises:
        ExportError: its precision or its opset is not one that the runtime has.
    """
    import onnx

    axes = read_axes(path) if axes is None else axes
    precision = graph_precision(axes)
    if precision not in supported_precisions(runtime):
        others = [name for name, known in _SUPPORTED.items() if precision in known]
        raise ExportError(
            f"{path}: {runtime} cannot run {precision} graphs on a CPU",
            hint=f"--runtime {others[0]}" if others else "export it in float32",
        )
    newest = 26 if runtime == "onnxruntime" else int(onnx.defs.onnx_opset_version())
    if axes.opset > newest:
        raise ExportError(
            f"{path}: opset {axes.opset} is too new for {runtime}, which knows up to {newest}",
            hint="export it with a lower opset, or update the runtime",
        )


def openvino_has_bfloat16() -> bool:
    """Return whether OpenVINO would run bfloat16 in hardware here."""
    if not has_module("openvino") or not this_processor().has_bfloat16:
        return False
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def served_precision(record: ArtifactRecord, runtime: str) -> str:
    """Return the precision of nodes that are not INT8 where the artifact is opened: the one that it
    was gated in, or float32 where the processor has no bfloat16 and would emulate it.
    """
    gated_in_bfloat16 = record.precision == "int8+bfloat16"
    return default_precision(record.format, runtime) if gated_in_bfloat16 else "float32"
