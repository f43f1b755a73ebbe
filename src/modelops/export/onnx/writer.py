"""Writer of a torch module as an ONNX graph that does not depend on the machine."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modelops.base.errors import ExportError
from modelops.base.files import atomic_path, check_writable
from modelops.export.graphs.axes import write_multiples
from modelops.export.graphs.external import (
    EXTERNAL_BYTES,
    SMALL_BYTES,
    check_graph,
    check_memory,
    data_path,
    remove_graph,
    save_graph,
    write_values,
)
from modelops.export.onnx.simplify import drop_empty_squeezes, simplify
from modelops.models.pipelines.signatures import Example, is_variadic, quiet_libraries

_SLACK = 256 << 20
_LARGEST_STEP = 256  # sizes that are tried to learn what a network's axes must be a multiple of
_SIZE = r"L\['(\w+)'\](?:\[(\d+)\])?\.size\(\)\[(\d+)\]"
_FIXED = re.compile(_SIZE + r" as dynamic but your code specialized it to be a constant \((\d+)\)")
_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'")


class FixedAxesError(ExportError):
    """Axes that should vary are constants of the network.

    Attributes:
        axes: {name of the axis: the only size that the network takes}.
    """

    def __init__(self, message: str, *, axes: dict[str, int], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.axes = axes


def write_graph(
    module: torch.nn.Module,
    example: Example,
    path: Path,
    *,
    opset: int,
    outputs: Mapping[str, Mapping[int, str]],
    external_bytes: int = EXTERNAL_BYTES,
) -> None:
    """Write a module as an ONNX graph; the same weights give the same bytes.

    Weights that together exceed `external_bytes` go to a file beside the graph, one tensor after
    the other, so that they are in memory once. A killed process leaves no graph at `path`. If the
    size of an axis must be a multiple, the graph notes it, see `axes.GraphAxes.multiples`.

    Args:
        module: takes the example's tensors as positions; returns a tensor or a tuple of them.
        example: input name to (tensor, names of its dynamic axes).
        path: path of model.onnx; its folder is made.
        opset: of the graph.
        outputs: output name to the names of its dynamic axes, in the module's order.
        external_bytes: largest size of the weights inside the graph.

    Raises:
        FixedAxesError: an axis that should vary is a constant to the network.
        ExportError: torch cannot capture the module, an operator has no ONNX form, a weight is
            missing or not finite, or there is not enough memory.
        ModelopsError: not enough disk.
    """
    label = path.parent.name
    check_weights(module, label)
    weights = _weight_bytes(module)
    inline = weights <= external_bytes
    # Inside the graph the weights are copied into the message, and once more as its bytes; else
    # one tensor at a time.
    copies = 2 * weights if inline else max(map(_bytes_of, module.parameters()), default=0)
    check_memory(copies + _SLACK, doing=f"exporting {label}")
    check_writable(path.parent, need_bytes=weights + _SLACK // 4)
    dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _, axes in example.values())
    with quiet_libraries():
        try:
            # Captured here and not by torch.onnx.export, which solves for the relations of the axes
            # and gives up on a UNet with cross-attention.
            captured = torch.export.export(
                module.eval(),
                tuple(value for value, _ in example.values()),
                dynamic_shapes=(dynamic,) if is_variadic(module) else dynamic,
                strict=False,
            )
            drop_empty_squeezes(captured)
            program = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=opset,
                input_names=list(example),
                output_names=list(outputs),
                verbose=False,
                optimize=False,
            )
            if program is not None:
                simplify(program.model)
        except Exception as error:  # torch raises nearly everything here, AssertionError included
            raise _refusal(error, module, example, label) from error
    if program is None:
        raise ExportError(f"{label}: torch made no graph")
    names = {key: axes for key, (_, axes) in example.items()} | dict(outputs)
    multiples = axis_multiples(getattr(captured, "_guards_code", None) or [], module, example)
    if inline:
        model = program.model_proto
        _tidy(model, names)
        write_multiples(model, multiples)
        save_graph(model, path, external_bytes=external_bytes)
        return
    remove_graph(path)
    _move_values_out(program.model, path)
    model = program.model_proto
    _tidy(model, names)
    write_multiples(model, multiples)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        check_graph(temporary, label=label)


def _move_values_out(model: Any, path: Path) -> None:
    """Write the weights of an onnx_ir.Model to the data file, and make the model refer to it."""
    import onnx_ir

    values = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > SMALL_BYTES
    ]
    spans = write_values(path, (value.const_value.tobytes() for value in values))
    for value, (offset, length) in zip(values, spans, strict=True):
        value.const_value = onnx_ir.ExternalTensor(
            data_path(path).name, offset, length, value.const_value.dtype,
            shape=value.const_value.shape, name=value.name, base_dir=path.parent,
        )  # fmt: skip


def check_weights(module: torch.nn.Module, label: str) -> None:
    """Refuse a module with missing weights or weights that are not finite.

    Raises:
        ExportError: a parameter is missing, NaN or infinite, or a buffer is NaN. (Buffers may be
            infinite: attention masks are.)
    """
    named: list[tuple[str, torch.Tensor, bool]] = []
    named += [(name, value, True) for name, value in module.named_parameters()]
    named += [(name, value, False) for name, value in module.named_buffers()]
    for name, value, is_parameter in named:
        if value.is_meta:
            raise ExportError(f"{label}: the weight {name} is missing", hint="is it complete?")
        if not value.numel() or not value.is_floating_point():
            continue
        low, high = (float(limit) for limit in torch.aminmax(value.detach()))
        if math.isnan(low) or (is_parameter and not math.isfinite(high - low)):
            raise ExportError(f"{label} has a weight that is not finite: {name}")


def axis_multiples(guards: list[str], module: torch.nn.Module, example: Example) -> dict[str, int]:
    """Return torch's assumptions about sizes, as axis name to the number it is a multiple of.

    torch.export notes every branch that a network took on a size as a line of Python. Here each
    axis is tried with other sizes, to find those that take the same branches.
    """
    equal = [guard for guard in guards if "==" in guard]
    if not equal:
        return {}
    position = {name: index for index, name in enumerate(_parameters(module))}
    found = {}
    for axis in sorted({axis for _, axes in example.values() for axis in axes.values()}):
        allowed = 0
        for size in range(2, _LARGEST_STEP + 1):
            shapes = [
                _Shape(size if axes.get(i) == axis else n for i, n in enumerate(value.shape))
                for value, axes in example.values()
            ]
            local: dict[str, Any] = {n: shapes[i] for n, i in position.items() if i < len(shapes)}
            if is_variadic(module):
                local = dict.fromkeys(position, shapes)
            try:  # torch's own text about our own module: sizes and arithmetic
                if all(eval(g, {"__builtins__": {}}, {"L": local}) for g in equal):
                    allowed = math.gcd(allowed, size)
            except Exception:  # a guard on something else than sizes
                return {}
        if allowed > 1:
            found[axis] = allowed
    return found


class _Shape(tuple[int, ...]):
    """Stand-in for a tensor, with what a guard may ask of it."""

    def size(self) -> tuple[int, ...]:
        return self


def _parameters(module: torch.nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _refusal(
    error: BaseException, module: torch.nn.Module, example: Example, label: str
) -> ExportError:
    """Summarise torch's long report in one line."""
    debug = "run with --debug for torch's own report"
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and len(chain) < 10:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    if any(isinstance(item, MemoryError) for item in chain):
        return ExportError(f"{label} cannot be exported: out of memory")
    text = "\n".join(str(item) for item in chain)
    operator = _NO_OPERATOR.search(text)
    if operator:
        return ExportError(
            f"{label} cannot be exported: {operator.group(1)} has no ONNX form", hint=debug
        )
    fixed: dict[str, int] = {}
    for name, index, axis, size in _FIXED.findall(text):
        order = _parameters(module)
        at = int(index) if index else order.index(name) if name in order else -1
        if 0 <= at < len(example):
            fixed[list(example.values())[at][1].get(int(axis), "")] = int(size)
    fixed.pop("", None)
    if fixed:
        which = ", ".join(f"{axis} (always {size})" for axis, size in sorted(fixed.items()))
        return FixedAxesError(
            f"{label} cannot be exported with these axes dynamic: {which}",
            axes=fixed,
            hint="the network was built for these sizes",
        )
    cause = error.__cause__ or error
    line = next((s.strip() for s in str(cause).splitlines() if s.strip()), type(cause).__name__)
    return ExportError(f"{label} cannot be exported: {line}", hint=debug)


def _weight_bytes(module: torch.nn.Module) -> int:
    tensors = {value.data_ptr(): value for value in (*module.parameters(), *module.buffers())}
    return sum(map(_bytes_of, tensors.values()))


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tidy(model: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give axes their names and drop what would make the bytes depend on the machine.

    torch writes a stack trace with file paths into every node. Of a node's notes only its module
    (`name_scopes`) is kept, which quantisation needs.
    """
    for value in (*model.graph.input, *model.graph.output):
        _name_axes(value, axes[value.name])
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.graph.doc_string = model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        kept = [p for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
        values = [(p.key, p.value) for p in kept]
        del node.metadata_props[:]
        for key, text in values:
            node.metadata_props.add(key=key, value=text)
    for tensor in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        tensor.doc_string = ""
        del tensor.metadata_props[:]


def _name_axes(value: Any, names: Mapping[int, str]) -> None:
    for index, dim in enumerate(value.type.tensor_type.shape.dim):
        if index in names:
            dim.Clear()
            dim.dim_param = names[index]
