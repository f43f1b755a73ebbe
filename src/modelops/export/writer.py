"""Torch module to ONNX graph, with nothing in it that depends on the machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modelops.errors import ExportError

_MAX_GRAPH_BYTES = 2_000_000_000  # protobuf's limit; larger graphs need external data
# name -> (example, names of its dynamic axes). No example dimension that may vary is 0 or 1:
# torch.export would take it for a constant.
Example = dict[str, tuple[torch.Tensor, dict[int, str]]]


def write_graph(
    module: torch.nn.Module,
    example: Example,
    path: Path,
    *,
    opset: int,
    outputs: Mapping[str, Mapping[int, str]],
) -> None:
    """Write a module as an ONNX graph; the same weights give the same bytes.

    Args:
        module: takes the example's tensors as positions; returns a tensor or a tuple of them.
        example: input name to (tensor, names of its dynamic axes).
        path: where model.onnx goes; its folder is made.
        opset: of the graph.
        outputs: output name to the names of its dynamic axes, in the module's order.

    Raises:
        ExportError: torch cannot capture the module, or an operator has no ONNX form.
    """
    label = path.parent.name
    dynamic = {
        name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, (_, axes) in example.items()
    }
    with quiet_libraries():
        try:
            # Captured here and not by torch.onnx.export, which solves for the relations of the axes
            # and gives up on a UNet with cross-attention.
            captured = torch.export.export(
                module.eval(),
                tuple(value for value, _ in example.values()),
                dynamic_shapes=dynamic,
                strict=False,
            )
            program = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=opset,
                input_names=list(example),
                output_names=list(outputs),
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
            cause = error.__cause__ or error
            raise ExportError(
                f"{label} cannot be exported: {str(cause).splitlines()[0]}",
                hint="run with --debug for torch's own report",
            ) from error
    if program is None:
        raise ExportError(f"{label}: torch made no graph")
    model = program.model_proto
    if model.ByteSize() > _MAX_GRAPH_BYTES:
        raise ExportError(f"{label}: larger than 2 GB, which needs external data")
    _tidy(model, {key: axes for key, (_, axes) in example.items()} | dict(outputs))
    _save_checked(model, path)


def _save_checked(model: Any, path: Path) -> None:
    import onnx

    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _tidy(model: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give axes their names and drop what would make the bytes depend on the machine.

    torch writes a stack trace with file paths into every node. Of a node's notes only the module it
    comes from (`name_scopes`) is kept: quantisation chooses by it.
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


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the advice that torch's exporter and onnxruntime's quantiser log for developers."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
