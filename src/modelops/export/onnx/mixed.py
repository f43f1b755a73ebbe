"""Nodes of a graph that compute in 16 bits, and the graph with its casts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from modelops.base.errors import UsageError
from modelops.export.graphs.graph import Array
from modelops.export.onnx.overflow import FloatFormat, weight_arrays, weight_fault

FLOAT = 1  # onnx.TensorProto.FLOAT
SENSITIVE = frozenset({
    "BatchNormalization", "Cos", "CumSum", "Exp", "GroupNormalization",
    "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization",
    "MeanVarianceNormalization", "Mod", "Pow", "RMSNormalization", "Reciprocal", "ReduceL1",
    "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Sin", "Softmax", "Softplus", "Sqrt", "Tan",
})  # fmt: skip
# Their types follow from an attribute, or they compute shapes and integers.
_TYPED = frozenset({
    "Bernoulli", "Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "If", "Loop",
    "Multinomial", "NonZero", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike", "Range", "Scan", "SequenceMap",
})  # fmt: skip
_SIZE_ONLY = ("Shape", "Size")  # read no values
# Between two float32 nodes these stay float32: two casts less, and no digits lost on the way.
_LIGHT = frozenset({
    "Abs", "Add", "Ceil", "Clip", "Concat", "Div", "Expand", "Flatten", "Floor", "Gather",
    "Identity", "Max", "Min", "Mul", "Neg", "Pad", "Reshape", "Round", "Slice", "Split",
    "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip


class GraphWeights:
    """Weights of a graph by name; the larger ones are mapped, not read."""

    def __init__(self, path: Path, model: Any) -> None:
        self._tensors = {item.name: item for item in model.graph.initializer}
        self._large = weight_arrays(path, self._tensors)

    def array(self, name: str) -> Array:
        import onnx

        if name in self._large:
            return self._large[name]
        array: Array = onnx.numpy_helper.to_array(self._tensors[name])
        return array

    def bytes_of(self, name: str) -> int:
        return int(self.array(name).nbytes)


class MixedPlan:
    """Nodes of a graph that are converted, and the others with the reason.

    Attributes:
        weights: names of the float32 initializers.
        float_nodes: indices of the nodes that make a float32 value.
        low: nodes that are converted.
        kept: {name of a node: why it is not converted}.
        kinds: {operator: number of nodes that it keeps float32}.
    """

    def __init__(self, model: Any, narrow: FloatFormat) -> None:
        import onnx

        self.model, self.narrow = model, narrow
        self.nodes = list(model.graph.node)
        opset = next(item.version for item in model.opset_import if not item.domain)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        self.floats = {v.name for v in values if v.type.tensor_type.elem_type == FLOAT}
        self.weights = [i.name for i in model.graph.initializer if i.data_type == FLOAT]
        self.floats.update(self.weights)
        self._constant = set(self.weights)
        self.makers = {name: i for i, n in enumerate(self.nodes) for name in n.output if name}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(index)
        self.float_nodes = [
            i for i, node in enumerate(self.nodes) if any(o in self.floats for o in node.output)
        ]
        self.kept: dict[str, str] = {}
        self.kinds: Counter[str] = Counter()
        self.movable: dict[int, tuple[set[int], set[int]]] = {}
        for index in self.float_nodes:
            node = self.nodes[index]
            slots = (
                None if node.op_type in SENSITIVE else _movable(node, self.floats, opset, narrow)
            )
            if slots is None:
                self.kinds[node.op_type] += 1
            else:
                self.movable[index] = slots
        self.low = set(self.movable)

    def keep_named(self, names: Collection[str]) -> None:
        unused = set(names)
        for index in self.float_nodes:
            node = self.nodes[index]
            for name in names:
                if node.name == name or any(_lies_below(s, name) for s in _scopes(node)):
                    unused.discard(name)
                    self._keep(index, f"asked for ({name})")
        if unused:
            raise UsageError(
                f"no node or module is called {sorted(unused)[0]!r}",
                hint="a node's name, or the path of a module in the network",
            )

    def activations(self) -> list[str]:
        """Return the float32 values that nodes to be converted read or make."""
        found = {name for index in self.low for name in self._touched(index)}
        inputs = {value.name for value in self.model.graph.input}
        return sorted(name for name in found if name in self.makers or name in inputs)

    def keep_measured(self, ranges: Mapping[str, float], bound: float) -> None:
        for index in sorted(self.low):
            worst = max(self._touched(index), key=lambda name: ranges.get(name, 0.0))
            value = ranges.get(worst, 0.0)
            if value > bound:
                verb = "makes" if worst in self.nodes[index].output else "reads"
                self._keep(index, f"{verb} values up to {value:.3g}")

    def keep_weights(self, weights: GraphWeights) -> None:
        for name in self.weights:
            users = [i for i in self.readers.get(name, []) if name in self._low_inputs(i)]
            fault = weight_fault(weights.array(name), self.narrow) if users else None
            for index in users if fault else []:
                self._keep(index, f"{name}: {fault}")

    def relax(self) -> None:
        """Leave light nodes between float32 nodes in float32."""
        outputs = {value.name for value in self.model.graph.output}
        wanted = set()
        for index in sorted(self.low, reverse=True):
            node = self.nodes[index]
            if node.op_type in _LIGHT and all(
                reader not in self.low or reader in wanted
                for name in node.output
                for reader in self.readers.get(name, [])
            ):
                wanted.add(index)
        for index in sorted(wanted):
            makers = [self.makers.get(name) for name in self._low_inputs(index) - self._constant]
            is_output = any(name in outputs for name in self.nodes[index].output)
            if makers and all(m is None or m not in self.low for m in makers) and not is_output:
                self.low.discard(index)
                self.kinds[self.nodes[index].op_type] += 1

    def build(self, weights: GraphWeights) -> tuple[Any, int]:
        """Build the mixed model; return it with its number of casts."""
        import onnx

        model = self.model
        writer = _Builder(self)
        for index, node in enumerate(self.nodes):
            writer.add(index, node)
        for value in model.graph.output:
            writer.as_float32(value.name)
        del model.graph.node[:]
        model.graph.node.extend(writer.nodes)
        del model.graph.value_info[:]
        tensors = []
        for item in model.graph.initializer:
            is_float = item.data_type == FLOAT
            if not is_float or item.name in writer.full or item.name not in writer.narrow:
                tensors.append(onnx.numpy_helper.from_array(weights.array(item.name), item.name))
            if is_float and item.name in writer.narrow:
                low = weights.array(item.name).astype(self.narrow.dtype)
                tensors.append(onnx.numpy_helper.from_array(low, self.low_name(item.name)))
        del model.graph.initializer[:]
        model.graph.initializer.extend(tensors)
        return model, writer.casts

    def low_name(self, name: str) -> str:
        return f"{name}/{self.narrow.name}"

    def _keep(self, index: int, reason: str) -> None:
        if index in self.low:
            self.low.discard(index)
            node = self.nodes[index]
            self.kept.setdefault(node.name or node.output[0], reason)

    def _low_inputs(self, index: int) -> set[str]:
        if index not in self.low:
            return set()
        return {self.nodes[index].input[slot] for slot in self.movable[index][0]}

    def _touched(self, index: int) -> list[str]:
        node, (inputs, outputs) = self.nodes[index], self.movable[index]
        return [
            *(node.output[i] for i in sorted(outputs)),
            *(node.input[i] for i in sorted(inputs)),
        ]


class _Builder:
    """Builder of the mixed graph. A value keeps its name in float32; its 16-bit form has another.

    Attributes:
        full: initializers that are read in float32.
        narrow: initializers that are read in 16 bits.
    """

    def __init__(self, plan: MixedPlan) -> None:
        self._plan = plan
        self._weights = set(plan.weights)
        self._made: set[str] = set()  # casts that are there
        self.nodes: list[Any] = []
        self.full: set[str] = set()
        self.narrow: set[str] = set()
        self.casts = 0

    def add(self, index: int, source: Any) -> None:
        plan = self._plan
        node = type(source)()
        node.CopyFrom(source)
        inputs, outputs = plan.movable[index] if index in plan.low else (set(), set())
        for slot, name in enumerate(source.input):
            if slot in inputs:
                node.input[slot] = self._as_narrow(name)
            elif source.op_type in _SIZE_ONLY and self._is_low(name):
                node.input[slot] = plan.low_name(name)
            else:
                self.as_float32(name)
        for name in _captured(source):
            self.as_float32(name)
        for slot in outputs:
            node.output[slot] = plan.low_name(source.output[slot])
        self.nodes.append(node)

    def as_float32(self, name: str) -> None:
        """Make sure that a value exists under its own name."""
        if name in self._weights:
            self.full.add(name)
        elif self._is_low(name):
            self._cast(self._plan.low_name(name), name, FLOAT)

    def _as_narrow(self, name: str) -> str:
        low = self._plan.low_name(name)
        if name in self._weights:
            self.narrow.add(name)
        elif not self._is_low(name):
            self._cast(name, low, self._plan.narrow.onnx_type)
        return low

    def _is_low(self, name: str) -> bool:
        plan = self._plan
        maker = plan.makers.get(name)
        return maker in plan.low and name in plan.floats

    def _cast(self, source: str, target: str, kind: int) -> None:
        import onnx

        if target not in self._made:
            self._made.add(target)
            self.casts += 1
            self.nodes.append(
                onnx.helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=kind)
            )


def _movable(
    node: Any, floats: set[str], opset: int, narrow: FloatFormat
) -> tuple[set[int], set[int]] | None:
    """Return the inputs and outputs of a node that may hold the format; None if it must stay."""
    import onnx

    if node.domain not in ("", "ai.onnx") or node.op_type in _TYPED or any(_captured(node)):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    kind = f"tensor({narrow.name})"

    def slots(names: Any, formal: Any) -> dict[int, str]:
        return {
            i: formal[min(i, len(formal) - 1)].type_str for i, n in enumerate(names) if n in floats
        }

    outputs = slots(node.output, schema.outputs)
    if any(kind not in allowed.get(variable, ()) for variable in outputs.values()):
        return None
    shared = set(outputs.values())
    inputs = {i for i, v in slots(node.input, schema.inputs).items() if v in shared}
    if node.op_type == "Resize":
        inputs &= {0}  # its scales are float32 by definition
    return inputs, set(outputs)


def _captured(node: Any) -> Iterator[str]:
    """Return the names that a node's inner graphs take, or may take, from outside."""
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (value.name for value in graph.output)


def _scopes(node: Any) -> list[str]:
    """Return the paths of a node's torch modules, as the exporter noted them."""
    text = next((p.value for p in node.metadata_props if p.key.endswith("name_scopes")), "")
    return [part.strip(" '\"[]") for part in text.split(",")]


def _lies_below(scope: str, module: str) -> bool:
    return scope == module or scope.startswith(module + ".")
