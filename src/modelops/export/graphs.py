"""An ONNX graph in a runtime: named arrays in, one array out. Imports no torch."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from modelops.errors import ExportError, UsageError
from modelops.extras import has_module, require_module

Array = npt.NDArray[Any]
RuntimeName = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")
_MAX_COMPILED = 12  # shapes that OpenVINO keeps compiled; each holds its own packed weights


class Graph(Protocol):
    """One exported network, ready to run."""

    runtime: RuntimeName
    precision: str
    input_names: list[str]

    def run(self, feed: dict[str, Array]) -> Array:
        """The graph's output [N, ...] for inputs that share their first dimension N."""


def available_runtimes() -> list[RuntimeName]:
    """The runtimes installed here, in the order of RUNTIMES."""
    return [name for name in RUNTIMES if has_module(name)]


def open_graph(
    path: Path, runtime: RuntimeName, *, precision: str = "float32", threads: int | None = None
) -> Graph:
    """Open a graph.

    Args:
        path: model.onnx.
        runtime: "onnxruntime" or "openvino".
        precision: what the nodes that are not INT8 run in: "float32", or "bfloat16" in OpenVINO.
        threads: CPU threads; all cores of this process when not given.

    Raises:
        UsageError: an unknown runtime, or a precision the runtime does not have.
        MissingExtraError: OpenVINO is not installed.
        ExportError: the runtime refuses the graph.
    """
    if runtime not in RUNTIMES:
        raise UsageError(
            f"unknown runtime {runtime!r}", hint=f"choose one of auto, {', '.join(RUNTIMES)}"
        )
    if precision not in ("float32", "bfloat16"):
        raise UsageError(f"unknown precision {precision!r}", hint="float32 or bfloat16")
    if runtime == "onnxruntime" and precision != "float32":
        raise UsageError("onnxruntime runs these graphs in float32", hint="--runtime openvino")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be positive, got {threads}")
    if runtime == "openvino":
        return OpenVinoGraph(path, precision=precision, threads=threads)
    return OrtGraph(path, threads=threads)


def process_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OrtGraph:
    """A graph in onnxruntime: on CUDA where its provider is there, else on the CPU.

    Args:
        path: model.onnx.
        threads: intra-op threads.
        optimized_path: also write the graph as onnxruntime rewrote it.
    """

    runtime: RuntimeName = "onnxruntime"
    precision = "float32"

    def __init__(
        self, path: Path, *, threads: int | None = None, optimized_path: Path | None = None
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Idle threads that spin after a run would slow whatever else runs between the steps.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.intra_op_num_threads = threads or process_cores()
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ExportError(
                f"{path}: onnxruntime refuses the graph: {str(error).splitlines()[0]}"
            ) from error
        self.input_names = [item.name for item in self.session.get_inputs()]
        self.device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"

    def run(self, feed: dict[str, Array]) -> Array:
        output: Array = self.session.run(None, feed)[0]
        return output


class OpenVinoGraph:
    """A graph in OpenVINO on the CPU, compiled for fixed shapes.

    Dynamic shapes cost up to 1.5 times the latency there, so a batch is filled up (with copies of
    its last row) to the next of 1, 2, 3, 4, 6, 8, 12, 16, ... rows, and each such shape is compiled
    when it is first met. Rows do not see each other, so what fills a batch changes nothing.
    """

    runtime: RuntimeName = "openvino"

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
        rows = len(next(iter(feed.values())))
        padded = {name: _pad_rows(array, batch_bucket(rows)) for name, array in feed.items()}
        shapes = {name: array.shape for name, array in padded.items()}
        self.compiled(shapes)
        request = self._requests[tuple(sorted(shapes.items()))]
        request.infer(padded, share_inputs=True)
        output: Array = request.get_output_tensor(0).data[:rows].copy()
        return output


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
