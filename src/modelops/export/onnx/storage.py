"""Storage in half the bytes for weights that stay float32 in an INT8 graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modelops.export.graphs.external import load_graph, save_graph

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SMALL = 1024  # values; below it a Cast costs more than it saves


def store_rest_in_half(path: Path) -> int:
    """Store the float32 weights of layers as float16 with a Cast before the layer.

    The layers compute in float32 as before, on weights rounded to 11 bits: a sixteenth of what INT8
    rounds. Every runtime folds the Cast when it loads the graph. Weights that float16 cannot hold
    stay as they are.

    Args:
        path: a QDQ graph, rewritten in place.

    Returns:
        The number of weights that were narrowed.
    """
    import onnx

    model = load_graph(path)
    graph = model.graph
    tensors = {item.name: item for item in graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    casts = []
    for node in graph.node:
        if node.op_type not in _LAYERS or len(node.input) < 2:
            continue
        weight = tensors.get(node.input[1])
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(weight)
        if values.size < _SMALL or set(readers[weight.name]) - set(_LAYERS) or not fits(values):
            continue
        name = weight.name
        narrow = onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
        weight.CopyFrom(narrow)
        casts.append(
            onnx.helper.make_node(
                "Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=onnx.TensorProto.FLOAT
            )
        )
        tensors.pop(name)
    if casts:
        nodes = [*casts, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        save_graph(model, path)
    return len(casts)


def fits(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    """Return whether float16 holds weights to 11 bits, except those too small to matter."""
    largest = float(np.abs(values).max(initial=0.0))
    return 2.0**-8 < largest < 32768.0  # a thousandth of the largest is still a normal number
