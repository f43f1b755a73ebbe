"""INT8 layers of an engine, from the JSON of TensorRT's engine inspector."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from modelops.export.graphs.external import load_structure

# Kernel names give operand and accumulator types: "i8i8_i8i32", "i8f32_i8i32_f32" (INT8 in, float
# out: a layer without Q behind it), "s8s8s32", "int8", or the instruction of integer tensor cores:
# "i16832gemm", "imma".
_INTEGER_TACTIC = re.compile(r"i8i8|i8i32|s8s8|i8816|i168(32|64)|imma|int8", re.IGNORECASE)
# Where the inspector says in what type a tensor is: TensorRT 10 with its layout, 11 on its own.
_TYPE_KEYS = ("Format/Datatype", "Format/DataType", "DataType", "Datatype")
_MULTIPLIES = re.compile(
    r"conv|gemm|matmul|matrixmultiply|fullyconnected|mha|deconv", re.IGNORECASE
)


def layer_precisions(information: dict[str, Any]) -> dict[str, Any]:
    """Count the layers that multiply, by precision.

    A layer multiplies if its type, kernel or name says convolution, matrix product or attention, or
    if it has weights. It runs in INT8 if its weights are INT8. If the inspector names no weights,
    it does if its kernel is an integer one, or if it reads INT8 and its kernel is not named. A
    convolution that reads INT8 and has float weights is not counted: TensorRT folds a conversion
    into it.

    Args:
        information: the inspector's JSON with ProfilingVerbosity.DETAILED: {"Layers": [...]}.

    Returns:
        `layers`: {"CaskConvolution int8": count, ...}, `int8_layers`, `layers_total`.
    """
    counts: Counter[str] = Counter()
    for layer in information.get("Layers", []):
        if not isinstance(layer, dict) or not _is_product(layer):
            continue
        precision = "int8" if _is_integer(layer) else "float"
        counts[f"{layer.get('LayerType', 'unknown')} {precision}"] += 1
    return {
        "layers": dict(sorted(counts.items())),
        "int8_layers": sum(n for name, n in counts.items() if name.endswith(" int8")),
        "layers_total": sum(counts.values()),
    }


def is_int8_graph(path: str | Path) -> bool:
    """Return whether an ONNX graph holds INT8 values between Quantize- and DequantizeLinear."""
    import onnx

    graph = load_structure(Path(path)).graph
    integers = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
    return any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear")
        and any(name in integers for name in node.input)
        for node in graph.node
    )


def _is_product(layer: dict[str, Any]) -> bool:
    if str(layer.get("LayerType", "")) in (
        "Reformat",
        "NoOp",
        "Constant",
        "Shape",
        "ShapeHostToDevice",
    ):
        return False
    names = [str(layer.get(key, "")) for key in ("LayerType", "ParameterType", "TacticName")]
    return bool(layer.get("Weights")) or any(_MULTIPLIES.search(name) for name in names)


def _is_integer(layer: dict[str, Any]) -> bool:
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Type"):
        return str(weights["Type"]).lower() == "int8"
    tactic = str(layer.get("TacticName", ""))
    if _INTEGER_TACTIC.search(tactic):
        return True
    reads = [
        str(next((item[key] for key in _TYPE_KEYS if item.get(key)), ""))
        for item in layer.get("Inputs", [])
        if isinstance(item, dict)
    ]
    return not tactic and any("int8" in text.lower() for text in reads)
