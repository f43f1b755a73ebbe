"""A product whose columns are split afterwards, as two products.

A gated feed-forward part (GEGLU) multiplies once and cuts the result in two. Where products are
INT8 the cut is a copy in float: 2 to 5 % of a wide UNet's time in OpenVINO.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modelops.export.graphs.external import load_structure


def split_columns(model: Any, source: Path) -> list[str]:
    """Turn every MatMul and Add whose last axis a Split cuts in two into two of each, in place.

    Each column keeps its value, which depends on that column of the weights alone. The parts are
    named after the MatMul ("node_linear_7_part0") and keep its metadata.

    Args:
        model: a ModelProto with its weights.
        source: the file that it was read from.

    Returns:
        The names of the MatMul nodes that were cut.
    """
    graph = model.graph
    if all(node.op_type != "Split" for node in graph.node):
        return []
    found = _Found(graph, _ranks(source))
    parts: dict[str, list[Any]] = {}  # what stands in for a node, by its first output
    cut = []
    for split in graph.node:
        chain = found.product_before(split)
        if chain is None:
            continue
        product, add = chain
        parts[product.output[0]] = parts[add.output[0]] = []
        parts[split.output[0]] = found.stand_ins(product, add, split)
        cut.append(product.name)
    nodes = [new for node in graph.node for new in parts.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    return cut


class _Found:
    """Who makes and who reads what in a graph."""

    def __init__(self, graph: Any, ranks: dict[str, int]) -> None:
        self._graph, self._ranks = graph, ranks
        self._arrays = {item.name: item for item in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._uses: dict[str, int] = {}
        outputs = [value.name for value in graph.output]
        for name in [*outputs, *(name for node in graph.node for name in node.input)]:
            self._uses[name] = self._uses.get(name, 0) + 1

    def product_before(self, split: Any) -> tuple[Any, Any] | None:
        """The MatMul and the Add whose result a Split cuts in two, if nobody else reads them."""
        if split.op_type != "Split" or len(split.output) != 2:
            return None
        if len(split.input) > 1 and split.input[1] not in self._arrays:
            return None
        axis = next((item.i for item in split.attribute if item.name == "axis"), 0)
        if axis != -1 and axis + 1 != self._ranks.get(split.input[0]):
            return None
        add = self._producers.get(split.input[0])
        if add is None or add.op_type != "Add":
            return None
        products = [self._producers[name] for name in add.input if name in self._producers]
        biases = [self._arrays[name] for name in add.input if name in self._arrays]
        if len(products) != 1 or len(biases) != 1 or products[0].op_type != "MatMul":
            return None
        weights = self._arrays.get(products[0].input[1])
        if weights is None or len(weights.dims) != 2 or list(biases[0].dims) != [weights.dims[1]]:
            return None
        shared = self._uses[add.output[0]] > 1 or self._uses[products[0].output[0]] > 1
        return None if shared else (products[0], add)

    def stand_ins(self, product: Any, add: Any, split: Any) -> list[Any]:
        """A MatMul and an Add for each output of the Split; their constants join the graph."""
        import onnx

        constants = [name for name in (*product.input, *add.input) if name in self._arrays]
        if len(split.input) > 1:
            at = int(onnx.numpy_helper.to_array(self._arrays[split.input[1]])[0])
        else:  # of an odd width the last part is the smaller one
            at = -(-self._arrays[constants[0]].dims[1] // 2)
        made = []
        for index, output in enumerate(split.output):
            renamed = {name: f"{name}_part{index}" for name in (*constants, product.output[0])}
            for name in constants:
                self._add_part(name, renamed[name], at, index)
            for node in (product, add):
                stand_in = onnx.NodeProto()
                stand_in.CopyFrom(node)
                stand_in.name = f"{node.name}_part{index}"
                for slot, name in enumerate(node.input):
                    stand_in.input[slot] = renamed.get(name, name)
                stand_in.output[0] = output if node is add else renamed[product.output[0]]
                made.append(stand_in)
        return made

    def _add_part(self, name: str, new: str, at: int, index: int) -> None:
        import onnx

        if new not in self._arrays:  # weights may be shared
            whole = onnx.numpy_helper.to_array(self._arrays[name])
            part = np.ascontiguousarray(np.split(whole, [at], axis=-1)[index])
            self._arrays[new] = onnx.numpy_helper.from_array(part, new)
            self._graph.initializer.append(self._arrays[new])


def _ranks(source: Path) -> dict[str, int]:
    """Axes of each tensor that inference finds."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(load_structure(source))
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in inferred.graph.value_info
        if value.type.tensor_type.HasField("shape")
    }
