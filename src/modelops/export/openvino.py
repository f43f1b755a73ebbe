"""ONNX graphs in OpenVINO, on the CPU."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from modelops.errors import ExportError
from modelops.export.graphs import Array, RuntimeName, process_cores
from modelops.extras import has_module, require_module

_MAX_COMPILED = 12  # shapes that are kept compiled; each holds its own packed weights


class OpenVinoGraph:
    """A graph in OpenVINO on the CPU, compiled for fixed shapes.

    Dynamic shapes cost up to 1.5 times the latency there, so a batch is filled up (with copies of
    its last row) to the next of 1, 2, 3, 4, 6, 8, 12, 16, ... rows, and each such shape is compiled
    when it is first met. Rows do not see each other, so what fills a batch changes nothing.
    """

    runtime: RuntimeName = "openvino"
    device = "cpu"

    def __init__(
        self, path: Path, *, precision: str = "float32", threads: int | None = None
    ) -> None:
        openvino = require_module("openvino", needed_for="running a graph in OpenVINO")
        self.precision = precision
        self._core = openvino.Core()
        self._options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or process_cores(),
        }
        self._path = path
        self._compiled: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._requests: dict[tuple[Any, ...], Any] = {}
        try:
            self._model = self._core.read_model(str(path))
        except RuntimeError as error:
            raise ExportError(f"{path}: OpenVINO refuses the graph: {_reason(error)}") from error
        self.input_names = [item.get_any_name() for item in self._model.inputs]
        self.output_names = [item.get_any_name() for item in self._model.outputs]

    def compiled(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        """The openvino.CompiledModel for these input shapes."""
        key = tuple(sorted(shapes.items()))
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        model = self._model.clone()
        try:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            compiled = self._core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise ExportError(
                f"{self._path}: OpenVINO cannot compile it for {shapes}: {_reason(error)}"
            ) from error
        if len(self._compiled) >= _MAX_COMPILED:
            oldest, _ = self._compiled.popitem(last=False)
            self._requests.pop(oldest, None)
        self._compiled[key] = compiled
        self._requests[key] = compiled.create_infer_request()
        return compiled

    def run(self, feed: dict[str, Array]) -> Array:
        return self.run_all(feed)[0]

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        rows = len(next(iter(feed.values())))
        padded = {name: _pad_rows(array, batch_bucket(rows)) for name, array in feed.items()}
        shapes = {name: array.shape for name, array in padded.items()}
        self.compiled(shapes)
        request = self._requests[tuple(sorted(shapes.items()))]
        request.infer(padded, share_inputs=True)
        return [
            request.get_output_tensor(index).data[:rows].copy()
            for index in range(len(self.output_names))
        ]


def openvino_has_bfloat16() -> bool:
    """Whether OpenVINO would run bfloat16 in hardware here."""
    if not has_module("openvino"):
        return False
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def batch_bucket(rows: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `rows`."""
    size = 1
    while size < rows:
        if size >= 2 and size * 3 // 2 >= rows:
            return size * 3 // 2
        size *= 2
    return size


def _pad_rows(array: Array, rows: int) -> Array:
    missing = rows - len(array)
    if missing:
        array = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    return np.ascontiguousarray(array)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
