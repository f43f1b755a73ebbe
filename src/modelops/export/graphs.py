"""An exported network in a runtime: named arrays in, arrays out. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy.typing as npt

from modelops.errors import UsageError
from modelops.extras import has_module

Array = npt.NDArray[Any]
RuntimeName = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")


class Graph(Protocol):
    """One exported network, ready to run."""

    runtime: RuntimeName
    precision: str
    device: str
    input_names: list[str]
    output_names: list[str]

    def run(self, feed: dict[str, Array]) -> Array:
        """The graph's first output [N, ...] for inputs that share their first dimension N."""

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        """All outputs, in the order of `output_names`."""


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
        from modelops.export.openvino import OpenVinoGraph

        return OpenVinoGraph(path, precision=precision, threads=threads)
    from modelops.export.onnxruntime import OrtGraph

    return OrtGraph(path, threads=threads)


def process_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
