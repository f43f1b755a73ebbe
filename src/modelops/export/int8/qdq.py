"""QDQ graphs from an fp32 graph, by either runtime's rules, from one table of ranges.

The graph is read and its weights are rounded once; a scan then writes many variants.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelops.base.errors import ExportError
from modelops.export.graphs.external import load_graph, save_graph
from modelops.export.graphs.graph import Array
from modelops.export.int8.groups import (
    MAX_GROUPS,
    group_nodes,
    included_nodes,
    product_nodes,
    weighted_nodes,
)
from modelops.export.int8.ranges import Calibration, Range
from modelops.export.int8.rewrite import split_columns
from modelops.export.onnx.weight_range import WEIGHT_TOPS, WeightRange, write_weight_range

Scheme = Literal["sym", "ort-cpu"]
_MIN_OPSET = 13  # DequantizeLinear with an axis
# What OpenVINO moves a QuantizeLinear through, on its way up to a Concat; and constant factors.
_MOVES_THROUGH = ("Identity", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze")
_TINY = float(np.finfo(np.float32).tiny)


class QdqWriter:
    """Writer of variants of one graph that differ in the quantised nodes.

    Two schemes. *sym*, for TensorRT and OpenVINO: activations int8 with zero point 0, weights int8
    for each output channel, float bias, no rounding of outputs. *ort-cpu*, for onnxruntime's CPU
    provider: activations uint8 with a zero point; outputs of Conv are rounded and the bias of Gemm
    is int32, without which it does not run them in INT8.

    *sym* also rounds both operands of attention's products; onnxruntime is slower with them in
    INT8, so *ort-cpu* leaves them in float.

    Only quantised nodes read rounded tensors in *sym*: a skip connection beside a quantised
    convolution stays as it was. In *ort-cpu* all readers of a quantised convolution's output read
    the rounded one.

    Args:
        source: fp32 model.onnx, opset 13 or above.

    Raises:
        ExportError: an opset that is too old, or a weight that is not finite.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._model = load_graph(source)
        opset = next(entry.version for entry in self._model.opset_import if not entry.domain)
        if opset < _MIN_OPSET:
            raise ExportError(f"{source}: opset {opset} has no per-channel INT8", hint="opset 18")
        split_columns(self._model, source)
        self._arrays = {item.name: item for item in self._model.graph.initializer}
        self._weights: dict[tuple[str, int, int], tuple[Array, Array]] = {}
        self.products = {node.name: node for node in product_nodes(self._model)}
        self.nodes = {node.name: node for node in weighted_nodes(self._model)} | self.products
        producers = {name: node for node in self._model.graph.node for name in node.output}
        self._clipped = {
            name
            for name in self.calibrated_tensors()
            if _from_concat(name, producers, self._arrays)
        }

    def groups(self, max_groups: int = MAX_GROUPS) -> dict[str, list[str]]:
        """Return {group: node names}, see `groups.node_groups`."""
        return group_nodes(self._model, max_groups=max_groups)

    def calibrated_tensors(self) -> list[str]:
        """Return tensors whose range a scheme may need: every weighted node's input, the outputs
        of convolutions, and both operands of attention's products."""
        names = [node.input[0] for node in self.nodes.values()]
        names += [node.input[1] for node in self.products.values()]
        names += [node.output[0] for node in self.nodes.values() if node.op_type == "Conv"]
        return list(dict.fromkeys(names))

    def weights_of(self, node: str) -> int:
        """Count the weights of a node that is not one of attention's products."""
        return math.prod(self._arrays[self.nodes[node].input[1]].dims)

    def ranges(self, calibration: Calibration) -> dict[str, Range]:
        """Return the ranges of every tensor that a quantised variant may need."""
        return calibration.ranges(self.source, self.calibrated_tensors())

    def write(
        self,
        target: Path,
        ranges: Mapping[str, Range],
        included: Collection[str],
        *,
        scheme: Scheme = "sym",
        weight_range: WeightRange = "full",
    ) -> None:
        """Write the graph with the nodes `included` in INT8.

        Args:
            target: where it goes.
            ranges: of every tensor that the variant asks for, see `ranges`.
            included: names of nodes.
            scheme: see the class.
            weight_range: "reduced" gives weights 7 bits, so that sums are exact on every processor.

        Raises:
            ExportError: no node is included, or the result is not a valid graph.
        """
        import onnx

        chosen = {name: self.nodes[name] for name in included if name in self.nodes}
        if scheme == "ort-cpu":  # a graph's output is not rounded, so its Conv would run in float
            last = {value.name for value in self._model.graph.output}
            chosen = {
                name: node
                for name, node in chosen.items()
                if not (node.op_type == "Conv" and node.output[0] in last)
                and name not in self.products
            }
        if not chosen:
            raise ExportError(f"{self.source}: no layer is left to quantise")
        model = onnx.ModelProto()
        model.CopyFrom(self._without_weights(chosen))
        clipped = self._clipped if scheme == "sym" else set()
        graph, top = _Rewriter(model.graph, ranges, scheme, clipped), WEIGHT_TOPS[weight_range]
        nodes = list(self._model.graph.node)
        del model.graph.node[:]
        for original in nodes:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            quantised = node.name in chosen
            if quantised and node.name in self.products:
                node.input[0] = graph.rounded(node.input[0])
                node.input[1] = graph.rounded(node.input[1], top)
            elif quantised:
                axis = output_axis(node, len(self._arrays[node.input[1]].dims))
                activation = graph.rounded(node.input[0])
                if scheme == "ort-cpu" and node.op_type == "Gemm" and len(node.input) > 2:
                    self._round_bias(node, graph, self._weight(node, axis, top)[1])
                node.input[1] = graph.weight(node.input[1], axis, self._weight(node, axis, top))
                node.input[0] = activation
            for index, name in enumerate(node.input):
                node.input[index] = graph.renamed.get(name, name)
            model.graph.node.append(node)
            if quantised and scheme == "ort-cpu" and node.op_type == "Conv":
                graph.renamed[node.output[0]] = graph.rounded(node.output[0])
        write_weight_range(model, weight_range)
        save_graph(model, target)

    def _round_bias(self, node: Any, graph: _Rewriter, scales: Array) -> None:
        """Round a Gemm's bias to int32, in steps of X times W; onnxruntime needs it for INT8."""
        import onnx

        name = node.input[2]
        if name in self._arrays and list(self._arrays[name].dims) == [len(scales)]:
            values = onnx.numpy_helper.to_array(self._arrays[name])
            node.input[2] = graph.bias(name, values, node.input[0], scales)

    def _without_weights(self, chosen: Mapping[str, Any]) -> Any:
        """Return the model without the float weights that are no longer read."""
        import onnx

        kept = {
            name
            for node in self._model.graph.node
            for index, name in enumerate(node.input)
            if not (node.name in chosen and index == 1)
        } | {value.name for value in self._model.graph.output}
        model = onnx.ModelProto()
        for field, value in self._model.ListFields():
            if field.name != "graph":
                if field.is_repeated:
                    getattr(model, field.name).extend(value)
                else:
                    setattr(model, field.name, value)
        graph = self._model.graph
        model.graph.name = graph.name
        model.graph.input.extend(graph.input)
        model.graph.output.extend(graph.output)
        model.graph.initializer.extend(i for i in graph.initializer if i.name in kept)
        return model

    def _weight(self, node: Any, axis: int, top: int) -> tuple[Array, Array]:
        """Return (int8 weights, float32 scales [channels])."""
        import onnx

        key = (node.input[1], axis, top)
        if key not in self._weights:
            values = onnx.numpy_helper.to_array(self._arrays[key[0]]).astype(np.float32)
            if not np.isfinite(values).all():
                raise ExportError(f"{self.source}: the weights of {node.name} are not finite")
            self._weights[key] = round_weights(values, axis, top)
        return self._weights[key]


def round_weights(values: Array, axis: int, top: int = 127) -> tuple[Array, Array]:
    """Round weights to symmetric int8 with one scale for each channel.

    Args:
        values: float32 weights.
        axis: of the output channels.
        top: largest magnitude of the result.

    Returns:
        int8 values in [-top, top] of the same shape, and float32 scales [channels].
    """
    rest = tuple(index for index in range(values.ndim) if index != axis)
    largest = np.abs(values).max(axis=rest)
    scales = np.where(largest > _TINY * top, largest / top, 1.0).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    rounded = np.clip(np.rint(values / scales.reshape(shape)), -top, top).astype(np.int8)
    return rounded, scales


def output_axis(node: Any, rank: int) -> int:
    """Return the axis of a weight that runs over output channels."""
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, rank - 1)


def _from_concat(name: str, producers: Mapping[str, Any], constants: Collection[str]) -> bool:
    node = producers.get(name)
    while node is not None and (
        node.op_type in _MOVES_THROUGH or (node.op_type == "Mul" and node.input[1] in constants)
    ):
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "Concat"


class _Rewriter:
    """Rewriter that adds the pairs; a tensor or weight with several readers is rounded once."""

    def __init__(
        self, graph: Any, ranges: Mapping[str, Range], scheme: Scheme, clipped: Collection[str]
    ) -> None:
        self.graph, self._ranges, self._scheme, self._clipped = graph, ranges, scheme, clipped
        self.renamed: dict[str, str] = {}  # tensors that every later node reads rounded
        self._pairs: dict[tuple[str, int], str] = {}
        self._weights: dict[tuple[str, int], str] = {}
        self._biases: set[str] = set()

    def rounded(self, name: str, top: int = 127) -> str:
        """Return the dequantised activation, within `top` steps of 0 in the scheme sym."""
        key = (name, top)
        if key in self._pairs:
            return self._pairs[key]
        if name not in self._ranges:
            raise ExportError(f"the calibration table has no range of {name}")
        scale, zero = _scale_and_zero(self._ranges[name], self._scheme, top)
        stem = name if top == 127 else f"{name}_{top}"
        self._constant(f"{stem}_scale", np.array(scale, np.float32))
        self._constant(f"{stem}_zero_point", zero)
        names = (f"{stem}_quantized", f"{stem}_dequantized")
        inputs = (f"{stem}_scale", f"{stem}_zero_point")
        rounded_from = name
        if name in self._clipped or top < 127:
            # Rounded directly, a Concat runs as u8 in OpenVINO 2026.4 and its reader is off by 0.3
            # where onnxruntime is right; the likely cause is a lost negative half. With a Clip to
            # [-127, 127] the two agree; one to [-128, 127] did not help. And a reduced range holds
            # only if what lies beyond the range that was calibrated is cut off.
            rounded_from = f"{stem}_clipped"
            self._constant(f"{stem}_low", np.array(-top * np.float32(scale), np.float32))
            self._constant(f"{stem}_high", np.array(top * np.float32(scale), np.float32))
            self._node("Clip", [name, f"{stem}_low", f"{stem}_high"], rounded_from)
        self._node("QuantizeLinear", [rounded_from, *inputs], names[0])
        self._node("DequantizeLinear", [names[0], *inputs], names[1])
        self._pairs[key] = names[1]
        return names[1]

    def weight(self, name: str, axis: int, values: tuple[Array, Array]) -> str:
        """Return the dequantised form of a weight."""
        key = (name, axis)
        if key not in self._weights:
            stem = name if all(known != name for known, _ in self._weights) else f"{name}_{axis}"
            rounded, scales = values
            self._constant(f"{stem}_quantized", rounded)
            self._constant(f"{stem}_scale", scales)
            self._constant(f"{stem}_zero_point", np.zeros(scales.shape, np.int8))
            inputs = [f"{stem}_quantized", f"{stem}_scale", f"{stem}_zero_point"]
            self._node("DequantizeLinear", inputs, f"{stem}_dequantized", axis=axis)
            self._weights[key] = f"{stem}_dequantized"
        return self._weights[key]

    def bias(self, name: str, values: Array, activation: str, weight_scales: Array) -> str:
        """Return the dequantised form of an int32 bias."""
        step = _scale_and_zero(self._ranges[activation], self._scheme)[0]
        scales = (step * weight_scales.astype(np.float64)).astype(np.float32)
        limits = np.iinfo(np.int32)
        rounded = np.clip(np.rint(values / scales.astype(np.float64)), limits.min, limits.max)
        stem = f"{name}_{activation}"
        if f"{stem}_dequantized" not in self._biases:
            self._constant(f"{stem}_quantized", rounded.astype(np.int32))
            self._constant(f"{stem}_scale", scales)
            self._constant(f"{stem}_zero_point", np.zeros(scales.shape, np.int32))
            inputs = [f"{stem}_quantized", f"{stem}_scale", f"{stem}_zero_point"]
            self._node("DequantizeLinear", inputs, f"{stem}_dequantized", axis=0)
            self._biases.add(f"{stem}_dequantized")
        return f"{stem}_dequantized"

    def _constant(self, name: str, array: Array) -> None:
        import onnx

        self.graph.initializer.append(onnx.numpy_helper.from_array(array, name))

    def _node(self, op: str, inputs: list[str], output: str, **attributes: int) -> None:
        import onnx

        node = onnx.helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes)
        self.graph.node.append(node)


def _scale_and_zero(bounds: Range, scheme: Scheme, top: int = 127) -> tuple[float, Array]:
    if scheme == "sym":
        scale = bounds.magnitude / top
        return (scale if scale > _TINY else 1.0), np.array(0, np.int8)
    scale = (bounds.high - bounds.low) / 255.0
    if scale <= _TINY:
        return 1.0, np.array(0, np.uint8)
    zero = int(np.clip(np.rint(-bounds.low / scale), 0, 255))
    return scale, np.array(zero, np.uint8)


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
