"""Did it run in INT8? What each runtime says of the graph as it executes it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from modelops.export.graphs.external import load_structure
from modelops.export.graphs.graph import Array
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.openvino import OpenVinoGraph

_ORT_INTEGER = (
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul",
    "DynamicQuantizeMatMul",
)  # fmt: skip
_ORT_FLOAT = ("Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul")
_INTEGER = ("i8", "u8")
_OPENVINO_LAYERS = ("Convolution", "FullyConnected", "MatMul")


def openvino_execution(graph: OpenVinoGraph, feed: dict[str, Array]) -> dict[str, Any]:
    """Precision in which OpenVINO executes the layers that multiply.

    Returns:
        `layers`: {"Convolution i8": count, ...}; `int8_layers`: those whose precision is i8 or u8;
        `layers_total`; `float_layers`: names of layers that run in another precision; `rest`:
        precision of the whole model where it is not INT8 (the compiled model's inference
        precision).
    """
    compiled = graph.compiled({name: array.shape for name, array in feed.items()})
    counts: Counter[str] = Counter()
    floats: list[str] = []
    for operation in compiled.get_runtime_model().get_ops():
        notes = operation.get_rt_info()
        kind = notes["layerType"].astype(str)
        if kind in _OPENVINO_LAYERS:
            precision = notes["runtimePrecision"].astype(str)
            counts[f"{kind} {precision}"] += 1
            if precision not in _INTEGER:
                floats.append(notes["originalLayersNames"].astype(str).partition(",")[0])
    integer = sum(count for name, count in counts.items() if name.split()[-1] in _INTEGER)
    return {
        "layers": dict(sorted(counts.items())),
        "int8_layers": integer,
        "layers_total": sum(counts.values()),
        "float_layers": floats,
        "rest": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
    }


def onnxruntime_execution(path: Path) -> dict[str, Any]:
    """Integer and float multiplying nodes in the graph that onnxruntime makes of a graph.

    onnxruntime keeps a Conv in INT8 only where its output is quantised too, which TensorRT forbids;
    so a symmetric graph's convolutions run in float32 there.

    Returns:
        `layers`: {"QLinearConv": count, ...}; `int8_layers`; `layers_total`; `float_layers`: names
        of those that run in float.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OrtGraph(path, optimized_path=optimized)
        graph = onnx.load(str(optimized)).graph
    nodes = Counter(node.op_type for node in graph.node)
    layers = {name: nodes[name] for name in (*_ORT_INTEGER, *_ORT_FLOAT) if nodes[name]}
    return {
        "layers": layers,
        "int8_layers": sum(nodes[name] for name in _ORT_INTEGER),
        "layers_total": sum(layers.values()),
        "float_layers": [node.name for node in graph.node if node.op_type in _ORT_FLOAT],
    }


def unproven_layers(path: Path, execution: dict[str, Any]) -> list[str]:
    """Layers that are quantised in a graph and that a runtime ran in float all the same.

    Args:
        path: the QDQ graph.
        execution: what `openvino_execution` or `onnxruntime_execution` says of it.
    """
    import onnx

    model = load_structure(path)
    constants = {item.name: item.data_type for item in model.graph.initializer}
    weights = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and constants.get(node.input[0]) == onnx.TensorProto.INT8
    }
    quantised = {
        node.name for node in model.graph.node if len(node.input) > 1 and node.input[1] in weights
    }
    return [name for name in execution["float_layers"] if name in quantised]
