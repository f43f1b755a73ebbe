"""Static checks of QDQ graphs: of the symmetric one that TensorRT and OpenVINO both take, and of
the one for onnxruntime's CPU provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modelops.export.graphs.external import load_graph

MAX_OPSET = 20
_WEIGHT_AXES = {"Conv": 0, "ConvTranspose": 1}
_COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def lint_qdq(path: str | Path) -> list[str]:
    """Check a quantised graph.

    The rules: opset at most 20; int8 with zero point 0 everywhere; finite positive float32 scales;
    activations with one scale for the tensor; weights with a scale for every output channel along
    an explicit axis; every quantised node has both of its operands quantised (in attention's
    products two activations); float bias; a quantised tensor feeds nothing but quantised nodes, so
    that none is rounded to no gain; a Clip between a Concat and its rounding (see `qdq`).

    Returns:
        One line for each broken rule, naming the node; empty if the graph is in order.
    """
    model = load_graph(Path(path))
    faults, graph = _opset_faults(model), _Index(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            faults += _lint_pair(node, graph)
        elif node.op_type in _COMPUTE:
            faults += _lint_compute(node, graph)
    return faults


def lint_ort_cpu(path: str | Path) -> list[str]:
    """Check a graph for onnxruntime's CPU provider.

    The rules: opset at most 20; activations uint8 with one finite positive scale; weights int8 with
    zero point 0 and a scale for every output channel along an explicit axis; every quantised node
    has both of its operands quantised; the output of a quantised Conv is read by QuantizeLinear
    alone, and the bias of a quantised Gemm is int32, without which they run in float.

    Returns:
        One line for each broken rule, naming the node; empty if the graph is in order.
    """
    model = load_graph(Path(path))
    faults, graph = _opset_faults(model), _Index(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            faults += _lint_scale(node, graph)
            faults += _lint_unsigned(node, graph)
        elif node.op_type in _COMPUTE:
            faults += _lint_ort_compute(node, graph)
    return faults


class _Index:
    def __init__(self, model: Any) -> None:
        import onnx

        to_array = onnx.numpy_helper.to_array
        self.arrays = {item.name: to_array(item) for item in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def dequantized(self, name: str) -> Any | None:
        """Return the DequantizeLinear that makes a tensor, if there is one."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _opset_faults(model: Any) -> list[str]:
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    return [f"opset {opset} is above {MAX_OPSET}"] if opset > MAX_OPSET else []


def _lint_scale(node: Any, graph: _Index) -> list[str]:
    """A float32 constant, finite and positive, and one for an activation."""
    scale = graph.arrays.get(node.input[1])
    if scale is None or scale.dtype != np.float32:
        return [f"{node.name}: the scale is not a float32 constant"]
    faults = []
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        faults.append(f"{node.name}: a scale is not finite and positive")
    is_weight = node.op_type == "DequantizeLinear" and node.input[0] in graph.arrays
    if not is_weight and scale.size != 1:
        faults.append(f"{node.name}: an activation has more than one scale")
    return faults


def _lint_unsigned(node: Any, graph: _Index) -> list[str]:
    """uint8 activations; constants int8 (weights) or int32 (bias) with zero point 0."""
    zero = graph.arrays.get(node.input[2]) if len(node.input) > 2 else None
    if node.op_type == "DequantizeLinear" and node.input[0] in graph.arrays:
        if zero is None or zero.dtype not in (np.int8, np.int32):
            return [f"{node.name}: the zero point of a constant is not int8 or int32"]
        return [f"{node.name}: the zero point is not 0"] if zero.any() else []
    if zero is None or zero.dtype != np.uint8:
        return [f"{node.name}: the zero point of an activation is not uint8"]
    return []


def _lint_pair(node: Any, graph: _Index) -> list[str]:
    faults = _lint_scale(node, graph)
    zero = graph.arrays.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None or zero.dtype != np.int8:
        faults.append(f"{node.name}: the zero point is not int8")
    elif zero.any():
        faults.append(f"{node.name}: the zero point is not 0")
    source = graph.producer.get(node.input[0])
    if node.op_type == "QuantizeLinear" and source is not None and source.op_type == "Concat":
        faults.append(f"{node.name}: rounds a Concat without a Clip, which OpenVINO gets wrong")
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
    if node.op_type == "MatMul" and all(p and p.input[0] not in graph.arrays for p in pairs):
        return faults
    return [*faults, *_lint_weights(node, pairs[1], graph)]


def _lint_ort_compute(node: Any, graph: _Index) -> list[str]:
    weight = graph.dequantized(node.input[1])
    if weight is None or weight.input[0] not in graph.arrays:
        return []  # a float node may read a convolution's rounded output
    faults = _lint_weights(node, weight, graph)
    if graph.dequantized(node.input[0]) is None:
        faults.append(f"{node.name}: only one of its operands is quantised")
    readers = {user.op_type for user in graph.consumers.get(node.output[0], [])}
    if node.op_type == "Conv" and readers != {"QuantizeLinear"}:
        faults.append(f"{node.name}: its output is not rounded, so it runs in float")
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    if bias and graph.dequantized(bias) is None:
        faults.append(f"{node.name}: its bias is not int32, so it runs in float")
    return faults


def _lint_weights(node: Any, weight: Any | None, graph: _Index) -> list[str]:
    """An int8 constant with a scale for every output channel."""
    if weight is None or weight.input[0] not in graph.arrays:
        return [f"{node.name}: the weights are not an int8 constant"]
    faults = []
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
