"""ONNX graphs in OpenVINO, on the CPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelops.base.errors import ExportError, UsageError
from modelops.base.extras import require_module
from modelops.export.graphs.axes import read_axes
from modelops.export.graphs.graph import Array, RuntimeName, process_cores
from modelops.export.runtimes.sinusoids import keep_sinusoids_in_float32
from modelops.models.pipelines.signatures import TIMESTEP_NAMES

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_MAX_COMPILED = 12  # shapes that are kept compiled; each holds its own packed weights


class OpenVinoGraph:
    """A graph in OpenVINO on the CPU, compiled for fixed shapes.

    Dynamic shapes cost up to 1.5 times the latency there. So a batch is filled up (with copies of
    its last row) to the next of 1, 2, 3, 4, 6, 8, 12, 16, ... rows, and each such shape is compiled
    at its first use. Rows do not affect each other, so the filling changes nothing. Only axes that
    the graph calls "batch" are filled up and cut again.

    Args:
        path: model.onnx, with float32, float16, bfloat16 or INT8 weights.
        precision: what float nodes run in, whatever their weights are: "float32"; "bfloat16", which
            goes for what a mixed graph keeps in float32 too, but not for sines and their angles;
            or "float16" where the CPU has it.
        threads: CPU threads; all cores of this process when not given.

    Raises:
        UsageError: no such precision on this CPU.
        ExportError: OpenVINO refuses the graph, or it has an opset that is not out yet.
        IntegrityError: weights that are missing, or lie where they may not.
    """

    runtime: RuntimeName = "openvino"
    device = "cpu"

    def __init__(
        self, path: Path, *, precision: str = "float32", threads: int | None = None
    ) -> None:
        openvino = require_module("openvino", needed_for="running a graph in OpenVINO")
        from modelops.export.runtimes.precision import require_supported

        self.axes = read_axes(path)
        require_supported(path, "openvino", self.axes)
        self.precision = precision
        self._core = openvino.Core()
        # Asked for a format that the CPU lacks, OpenVINO would quietly take another one.
        if precision == "float16" and "FP16" not in self._capabilities():
            raise UsageError("this CPU does not compute in float16", hint="float32 or bfloat16")
        self._options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or process_cores(),
        }
        self._path = path
        self._compiled: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._requests: dict[tuple[Any, ...], Any] = {}
        self.overwritten = 0  # calls that put something else where a caller of `bind` may write
        # shapes of a call -> its request, and views of the memory it reads and writes
        self._bound: dict[tuple[Any, ...], tuple[Any, list[Any], list[Array]]] = {}
        try:
            self._model = self._core.read_model(str(path))
        except RuntimeError as error:
            raise ExportError(f"{path}: OpenVINO refuses the graph: {_reason(error)}") from error
        self.input_names = [item.get_any_name() for item in self._model.inputs]
        self.output_names = [item.get_any_name() for item in self._model.outputs]

    def _capabilities(self) -> list[str]:
        return list(self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))

    def compiled(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        """Return the openvino.CompiledModel for these input shapes."""
        key = tuple(sorted(shapes.items()))
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        model = self._model.clone()
        try:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            if self.precision != "float32":
                keep_sinusoids_in_float32(self._core, model)
            compiled = self._core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise ExportError(
                f"{self._path}: OpenVINO cannot compile it for {shapes}: {_reason(error)}"
            ) from error
        if len(self._compiled) >= _MAX_COMPILED:
            oldest, _ = self._compiled.popitem(last=False)
            self._requests.pop(oldest, None)
            self._bound.clear()
        self._compiled[key] = compiled
        self._requests[key] = compiled.create_infer_request()
        return compiled

    def run(self, feed: dict[str, Array]) -> Array:
        return self.run_all(feed)[0]

    def bind(self, feed: dict[str, Array]) -> tuple[dict[str, Array], Callable[[], list[Array]]]:
        """Return, for repeated calls, arrays by input name with the content of `feed`, to write to,
        and a function that computes the outputs from them. Outputs last until the next call of the
        graph. If a batch must be filled up, this saves nothing."""
        key = self._key(feed)
        self.overwritten += 1
        if key not in self._bound:
            self.run_all(feed)  # compiles for these shapes, once
        bound = self._bound.get(key)
        if bound is None:
            arrays = {name: array.copy() for name, array in feed.items()}
            return arrays, lambda: self.run_all(arrays)
        request, inputs, outputs = bound
        for name, view in inputs:
            view[...] = feed[name]

        def run() -> list[Array]:
            request.infer()
            return outputs

        return dict(inputs), run

    @staticmethod
    def filled(rows: int) -> int:
        """Return the rows that a call of `rows` is filled up to."""
        return batch_bucket(rows)

    def _key(self, feed: dict[str, Array]) -> tuple[Any, ...]:
        return tuple([feed[name].shape for name in self.input_names if name in feed])

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        key = self._key(feed)
        bound = self._bound.get(key)
        if bound is not None:  # seen before, and nothing to fill up: no checks, no dispatch
            request, inputs, outputs = bound
            for name, view in inputs:
                if not _same_memory(view, feed[name]):
                    view[...] = feed[name]
                    self.overwritten += name not in TIMESTEP_NAMES
            request.infer()
            return [view.copy() for view in outputs]
        rows = self.axes.rows(feed)
        padded = self.axes.pad(feed, batch_bucket(rows or 1))
        self.overwritten += 1
        shapes = {name: array.shape for name, array in padded.items()}
        self.compiled(shapes)
        request = self._requests[tuple(sorted(shapes.items()))]
        for index, name in enumerate(self.input_names):
            request.get_input_tensor(index).data[...] = padded[name]
        request.infer()
        found = [
            self.axes.cut(name, request.get_output_tensor(index).data, rows)
            for index, name in enumerate(self.output_names)
        ]
        if all(padded[name].shape == feed[name].shape for name in self.input_names):
            inputs = [
                (name, request.get_input_tensor(index).data)
                for index, name in enumerate(self.input_names)
            ]
            self._bound[key] = (request, inputs, found)
        return [view.copy() for view in found]


def _same_memory(first: Array, second: Array) -> bool:
    """Return whether two arrays of one shape are the same numbers in the same place."""
    a, b = first.__array_interface__, second.__array_interface__
    return bool(a["data"][0] == b["data"][0] and a["strides"] == b["strides"])


def batch_bucket(rows: int) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `rows`."""
    size = 1
    while size < rows:
        if size >= 2 and size * 3 // 2 >= rows:
            return size * 3 // 2
        size *= 2
    return size


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
