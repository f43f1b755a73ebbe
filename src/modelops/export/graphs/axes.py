"""Notes in a graph about its axes: which are the batch, and the sizes that the others may have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.errors import UsageError
from modelops.export.graphs.external import check_data, load_structure
from modelops.export.graphs.graph import Array

BATCH = "batch"
MULTIPLES_KEY = "modelops.axis_multiples"
Axes = dict[str, tuple[str | int, ...]]


@dataclass(frozen=True)
class GraphAxes:
    """Inputs and outputs of a graph.

    Attributes:
        inputs: name to its dimensions: a number where it is fixed, else the axis' name.
        outputs: name to its dimensions, as for `inputs`.
        multiples: axis name to the number that its size must be a multiple of; 1 is left out.
        opset: of the default operator set.
        types: element types that occur among weights, inputs and outputs, as onnx names them.
    """

    inputs: Axes
    outputs: Axes
    multiples: dict[str, int] = field(default_factory=dict)
    opset: int = 0
    types: frozenset[str] = frozenset()

    def rows(self, feed: dict[str, Array]) -> int | None:
        """Return the size of the batch in a feed; None if no input has a batch axis.

        Raises:
            UsageError: an input is missing or has another rank, two disagree on the batch, or
                a size is not one that the network takes.
        """
        batch: tuple[str, int] | None = None
        for name, axes in self.inputs.items():
            if name not in feed:
                raise UsageError(f"the graph's input {name} is not given")
            shape = feed[name].shape
            if len(shape) != len(axes):
                raise UsageError(f"{name}: has {len(shape)} axes, the graph's has {len(axes)}")
            for axis, size in zip(axes, shape, strict=True):
                if not isinstance(axis, str):
                    if size != axis:
                        raise UsageError(
                            f"{name} has the shape {list(shape)}, and the graph was exported for "
                            f"{list(axes)}"
                        )
                    continue
                step = self.multiples.get(axis, 1)
                if size % step:
                    raise UsageError(
                        f"{name}: {axis} is {size}, and this network takes multiples of {step}"
                    )
                if axis == BATCH:
                    batch = batch or (name, size)
                    if size != batch[1]:
                        raise UsageError(
                            f"the batch is {batch[1]} in {batch[0]} and {size} in {name}"
                        )
        return batch[1] if batch else None

    def pad(self, feed: dict[str, Array], rows: int) -> dict[str, Array]:
        """Fill the batch axes of a feed up to `rows` with copies of their last row."""
        return {
            name: _pad(array, self.inputs[name].index(BATCH), rows)
            if BATCH in self.inputs[name]
            else np.ascontiguousarray(array)
            for name, array in feed.items()
        }

    def cut(self, name: str, array: Array, rows: int | None) -> Array:
        """Remove the rows that `pad` added from an output, if it has a batch axis."""
        axes = self.outputs[name]
        if rows is None or BATCH not in axes:
            return array
        return array[(slice(None),) * axes.index(BATCH) + (slice(0, rows),)]


def read_axes(path: Path) -> GraphAxes:
    """Read the axes of a graph file; its weights are not read.

    Raises:
        UsageError: there is no such file.
        ExportError: the file is not an ONNX graph.
        IntegrityError: its weights are missing, or in a place that is not allowed.
    """
    import onnx

    model = load_structure(path)
    check_data(path, model)
    weights = {item.name for item in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    found = [item.data_type for item in model.graph.initializer]
    found += [value.type.tensor_type.elem_type for value in (*inputs, *model.graph.output)]
    return GraphAxes(
        inputs={value.name: _axes(value) for value in inputs},
        outputs={value.name: _axes(value) for value in model.graph.output},
        multiples=read_multiples(model),
        opset=next((item.version for item in model.opset_import if not item.domain), 0),
        types=frozenset(onnx.TensorProto.DataType.Name(kind) for kind in found),
    )


def read_multiples(model: Any) -> dict[str, int]:
    """Read the notes that `write_multiples` wrote into a graph."""
    text = next((p.value for p in model.metadata_props if p.key == MULTIPLES_KEY), "")
    pairs = (item.partition("=") for item in text.split(",") if item)
    return {name: int(step) for name, _, step in pairs if step.isdigit() and int(step) > 1}


def write_multiples(model: Any, multiples: dict[str, int]) -> None:
    """Note in a graph which sizes its axes may have."""
    items = sorted((name, step) for name, step in multiples.items() if step > 1)
    if items:
        text = ",".join(f"{name}={step}" for name, step in items)
        model.metadata_props.add(key=MULTIPLES_KEY, value=text)


def _axes(value: Any) -> tuple[str | int, ...]:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param
        for dim in value.type.tensor_type.shape.dim
    )


def _pad(array: Array, axis: int, rows: int) -> Array:
    missing = rows - array.shape[axis]
    if missing:
        last = np.take(array, [-1], axis=axis)
        array = np.concatenate([array, np.repeat(last, missing, axis=axis)], axis=axis)
    return np.ascontiguousarray(array)
