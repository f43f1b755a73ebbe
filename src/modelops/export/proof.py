"""Did it run in INT8? What each runtime says of the graph as it executes it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from modelops.export.graphs import Array
from modelops.export.onnxruntime import OrtGraph
from modelops.export.openvino import OpenVinoGraph

_ORT_INTEGER = (
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul",
    "DynamicQuantizeMatMul",
)  # fmt: skip
_ORT_FLOAT = ("Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul")
_OPENVINO_LAYERS = ("Convolution", "FullyConnected", "MatMul")


def openvino_execution(graph: OpenVinoGraph, feed: dict[str, Array]) -> dict[str, Any]:
    """Precision in which OpenVINO executes the layers that multiply.

    Returns:
        `layers`: {"Convolution i8": count, ...}; `int8_layers`: those whose precision is i8 or u8;
        `layers_total`.
    """
    compiled = graph.compiled({name: array.shape for name, array in feed.items()})
    counts: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        notes = operation.get_rt_info()
        kind = notes["layerType"].astype(str)
        if kind in _OPENVINO_LAYERS:
            counts[f"{kind} {notes['runtimePrecision'].astype(str)}"] += 1
    integer = sum(count for name, count in counts.items() if name.endswith((" i8", " u8")))
    return {
        "layers": dict(sorted(counts.items())),
        "int8_layers": integer,
        "layers_total": sum(counts.values()),
    }


def onnxruntime_execution(path: Path) -> dict[str, Any]:
    """Integer and float multiplying nodes in the graph that onnxruntime makes of a graph.

    onnxruntime keeps a Conv in INT8 only where its output is quantised too, which TensorRT forbids;
    so a symmetric graph's convolutions run in float32 there.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OrtGraph(path, optimized_path=optimized)
        nodes = Counter(node.op_type for node in onnx.load(str(optimized)).graph.node)
    layers = {name: nodes[name] for name in (*_ORT_INTEGER, *_ORT_FLOAT) if nodes[name]}
    return {
        "layers": layers,
        "int8_layers": sum(nodes[name] for name in _ORT_INTEGER),
        "layers_total": sum(layers.values()),
    }
