"""Sines and cosines that keep float32 in a graph that OpenVINO runs in 16 bits.

A network gets its timestep, and sometimes the place of a token, by sines of large angles: up to a
thousand radians, where neighbouring bfloat16 numbers are four apart. OpenVINO's precision hint
rounds those angles like everything else, and its Python interface cannot except a node from the
hint. An attribute of its file format can. So these few nodes are written to a separate file, marked
there, read back and put in the place of the old ones.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

_TRIGONOMETRIC = ("Sin", "Cos")
# What leads to an angle ends where these make a value: they are meant to run in 16 bits.
_HEAVY = (
    "Convolution", "ConvolutionBackpropData", "DeformableConvolution", "GRUSequence",
    "GroupConvolution", "GroupConvolutionBackpropData", "Interpolate", "LSTMSequence", "MVN",
    "MatMul", "RNNSequence", "ScaledDotProductAttention",
)  # fmt: skip
_MARK = {"name": "precise", "version": "0"}


def keep_sinusoids_in_float32(core: Any, model: Any) -> int:
    """Except a model's sines, cosines and what leads to their angles from the precision hint.

    Args:
        core: openvino.Core.
        model: openvino.Model, changed in place; shapes should be static, or what adds an axis to a
            dynamic shape is rounded all the same.

    Returns:
        The number of nodes that keep float32.

    Raises:
        RuntimeError: OpenVINO cannot write or read the part.
        OSError: no room for a file of a few kilobytes.
    """
    _fix_shapes(model)
    _as_reshapes(_angles(model))
    nodes = _angles(model)
    if not nodes:
        return 0
    outer, inner = _cut_inputs(nodes)
    leaving = [
        (output, [target for target in output.get_target_inputs() if not _inside(target, nodes)])
        for node in nodes.values()
        for output in node.outputs()
    ]
    leaving = [(output, targets) for output, targets in leaving if targets]
    part = _marked(core, [output for output, _ in leaving], inner)
    for parameter, source in zip(part.get_parameters(), outer, strict=True):
        parameter.output(0).replace(source)
    for result, (_, targets) in zip(part.get_results(), leaving, strict=True):
        for target in targets:
            target.replace_source_output(result.input_value(0))
    return len(nodes)


def _fix_shapes(model: Any) -> None:
    """Replace known shapes by constants: a part that is cut out without their tensors would not
    know them."""
    from openvino import opset8 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "ShapeOf":
            continue
        shape = node.input_value(0).get_partial_shape()
        if shape.is_static and len(shape):  # OpenVINO makes no constant of nothing
            kind = node.get_output_element_type(0).to_dtype()
            sizes = ops.constant(np.array([size.get_length() for size in shape], kind))
            node.output(0).replace(sizes.output(0))


def _angles(model: Any) -> dict[str, Any]:
    """Find sines and cosines and the nodes that lead to them, by unique name."""
    found: dict[str, Any] = {}
    waiting = [n for n in model.get_ordered_ops() if n.get_type_name() in _TRIGONOMETRIC]
    while waiting:
        node = waiting.pop()
        name, kind = node.get_name(), node.get_type_name()
        if name in found or kind in ("Parameter", "Constant", "ShapeOf"):
            continue
        if kind in _HEAVY and not _is_outer_product(node):
            continue
        found[name] = node
        waiting += [value.get_node() for value in node.input_values()]
    return found


def _is_outer_product(node: Any) -> bool:
    """Return whether a MatMul adds nothing up (a product of rates and places, for example)."""
    if node.get_type_name() != "MatMul":
        return False
    shape = node.input_value(0).get_partial_shape()
    if shape.rank.is_dynamic:
        return False
    axis = -2 if node.get_attributes().get("transpose_a") else -1
    return len(shape) >= -axis and shape[axis].is_static and shape[axis].get_length() == 1


def _inside(item: Any, nodes: dict[str, Any]) -> bool:
    return item.get_node().get_name() in nodes


def _as_reshapes(nodes: dict[str, Any]) -> None:
    """Replace nodes that add or drop an axis by Reshapes; OpenVINO would lose the mark there."""
    from openvino import opset8 as ops

    for node in nodes.values():
        shape = node.output(0).get_partial_shape()
        if node.get_type_name() not in ("Squeeze", "Unsqueeze"):
            continue
        if not (shape.is_static and len(shape) and node.get_output_element_type(0).is_real()):
            continue
        target = ops.constant(np.array([int(size.get_length()) for size in shape], np.int64))
        reshape = ops.reshape(node.input_value(0), target, False)
        reshape.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(reshape.output(0))


def _cut_inputs(nodes: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Put parameters in place of values from outside; return those values and the parameters."""
    from openvino import opset8 as ops

    outer: list[Any] = []
    inner: list[Any] = []
    known: dict[tuple[str, int], Any] = {}
    for item in _inputs(nodes):
        source = item.get_source_output()
        key = source.get_node().get_name(), source.get_index()
        if key not in known:
            known[key] = ops.parameter(source.get_partial_shape(), source.get_element_type())
            outer.append(source)
            inner.append(known[key])
        item.replace_source_output(known[key].output(0))
    return outer, inner


def _inputs(nodes: dict[str, Any]) -> Iterator[Any]:
    """Return the inputs whose values are computed outside."""
    for node in nodes.values():
        for item in node.inputs():
            source = item.get_source_output()
            if not _inside(source, nodes) and source.get_node().get_type_name() != "Constant":
                yield item


def _marked(core: Any, outputs: list[Any], parameters: list[Any]) -> Any:
    """Return a copy of a part of a model with each of its nodes marked."""
    import openvino
    from openvino import opset8 as ops
    from openvino.passes import ConstantFolding, Manager

    part = openvino.Model([ops.result(output) for output in outputs], parameters, "sinusoids")
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(part)
    # What OpenVINO would fuse when it compiles, constant factors say, is fused before: the fused
    # node would have no mark. This is no public module, and its fusions may meet a part they cannot
    # take; without them such angles are rounded.
    with contextlib.suppress(ImportError, RuntimeError):
        from openvino._offline_transformations import apply_moc_transformations

        apply_moc_transformations(part, cf=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.xml"
        openvino.save_model(part, path, compress_to_fp16=False)
        tree = ElementTree.parse(path)
        for layer in tree.iterfind("layers/layer"):
            about = layer.find("rt_info")
            if about is None:
                about = ElementTree.Element("rt_info")
                layer.insert(int(layer.find("data") is not None), about)
            ElementTree.SubElement(about, "attribute", _MARK)
        weights = path.with_suffix(".bin").read_bytes()
    return core.read_model(ElementTree.tostring(tree.getroot()), weights)
