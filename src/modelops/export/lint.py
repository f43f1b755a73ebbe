"""The rules of a symmetric QDQ graph that TensorRT and OpenVINO both take, checked statically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MAX_OPSET = 20
_WEIGHT_AXES = {"Conv": 0, "ConvTranspose": 1}
_COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def lint_qdq(path: str | Path) -> list[str]:
    """Check a quantised graph.

    The rules: opset at most 20; int8 with zero point 0 everywhere; finite positive float32 scales;
    activations with one scale for the tensor; weights with a scale for every output channel along
    an explicit axis; every quantised node has both of its operands quantised; float bias; a
    quantised tensor feeds nothing but quantised nodes, so that none is rounded to no gain.

    Returns:
        One line for each broken rule, naming the node; empty if the graph is in order.
    """
    import onnx

    model = onnx.load(str(path))
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    faults = [f"opset {opset} is above {MAX_OPSET}"] if opset > MAX_OPSET else []
    graph = _Index(model, onnx.numpy_helper.to_array)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            faults += _lint_pair(node, graph)
        elif node.op_type in _COMPUTE:
            faults += _lint_compute(node, graph)
    return faults


class _Index:
    def __init__(self, model: Any, to_array: Any) -> None:
        self.arrays = {item.name: to_array(item) for item in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def dequantized(self, name: str) -> Any | None:
        """The DequantizeLinear that makes a tensor, if one does."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _lint_pair(node: Any, graph: _Index) -> list[str]:
    faults = []
    scale = graph.arrays.get(node.input[1])
    if scale is None or scale.dtype != np.float32:
        faults.append(f"{node.name}: the scale is not a float32 constant")
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        faults.append(f"{node.name}: a scale is not finite and positive")
    zero = graph.arrays.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None or zero.dtype != np.int8:
        faults.append(f"{node.name}: the zero point is not int8")
    elif zero.any():
        faults.append(f"{node.name}: the zero point is not 0")
    is_weight = node.op_type == "DequantizeLinear" and node.input[0] in graph.arrays
    if scale is not None and not is_weight and scale.size != 1:
        faults.append(f"{node.name}: an activation has more than one scale")
    if node.op_type == "DequantizeLinear":
        for user in graph.consumers.get(node.output[0], []):
            if user.op_type not in _COMPUTE:
                faults.append(
                    f"{node.name}: feeds {user.op_type} {user.name}, which is not quantised"
                )
    return faults


def _lint_compute(node: Any, graph: _Index) -> list[str]:
    pairs = [graph.dequantized(name) for name in node.input[:2]]
    if not any(pairs):
        return []
    faults = []
    if not all(pairs):
        faults.append(f"{node.name}: only one of its operands is quantised")
    if len(node.input) > 2 and graph.dequantized(node.input[2]) is not None:
        faults.append(f"{node.name}: the bias is quantised")
    weight = pairs[1]
    if weight is None or weight.input[0] not in graph.arrays:
        return [*faults, f"{node.name}: the weights are not an int8 constant"]
    values, scale = graph.arrays[weight.input[0]], graph.arrays.get(weight.input[1])
    axis = _output_axis(node, values.ndim)
    if scale is None or scale.ndim != 1 or len(scale) != values.shape[axis]:
        faults.append(f"{node.name}: the weights lack a scale for every output channel")
    elif _attribute(weight, "axis", 1) % values.ndim != axis:
        faults.append(f"{node.name}: the weights' scales run along the wrong axis")
    return faults


def _output_axis(node: Any, rank: int) -> int:
    if node.op_type == "Gemm":
        return 0 if _attribute(node, "transB", 0) else 1
    return _WEIGHT_AXES.get(node.op_type, rank - 1)
