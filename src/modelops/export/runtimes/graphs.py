"""An exported network in a runtime: named arrays in, arrays out. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy.typing as npt

from modelops.errors import UsageError
from modelops.extras import has_module

Array = npt.NDArray[Any]
RuntimeName = Literal["onnxruntime", "openvino", "tensorrt", "torchscript", "torch-export"]
RUNTIMES: tuple[RuntimeName, ...] = (
    "onnxruntime", "openvino", "tensorrt", "torchscript", "torch-export",
)  # fmt: skip
# What runs an artifact of each format.
RUNTIMES_OF: dict[str, tuple[RuntimeName, ...]] = {
    "onnx": ("onnxruntime", "openvino"),
    "int8": ("onnxruntime", "openvino"),
    "tensorrt": ("tensorrt",),
    "torchscript": ("torchscript", "torch-export"),
}
ENGINE = "engine.plan"
PRECISIONS = ("float32", "float16", "bfloat16")


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


def available_runtimes(artifact_format: str = "onnx") -> list[RuntimeName]:
    """The runtimes installed here that run an artifact's format, in the order of RUNTIMES."""
    packages = {"tensorrt": "tensorrt", "torchscript": "torch", "torch-export": "torch"}
    return [
        name
        for name in RUNTIMES_OF.get(artifact_format, ())
        if has_module(packages.get(name, name))
    ]


def open_graph(
    path: Path,
    runtime: RuntimeName,
    *,
    precision: str = "float32",
    threads: int | None = None,
    provider: str = "auto",
    device_id: int = 0,
) -> Graph:
    """Open an exported network whose digest has been verified.

    Args:
        path: model.onnx; for torchscript and torch-export model.pt or model.pt2; for tensorrt the
            model.onnx that the engine.plan beside it was built from.
        runtime: one of RUNTIMES.
        precision: what float nodes of an ONNX graph run in: "float32" (16-bit weights are computed
            as their graph says), "bfloat16" or "float16" in OpenVINO.
        threads: CPU threads; all cores of this process when not given.
        provider: of onnxruntime: "cpu", "cuda", "tensorrt", or "auto".
        device_id: CUDA device.

    Raises:
        UsageError: an unknown runtime, or a precision the runtime does not have.
        MissingExtraError: the runtime is not installed.
        ExportError: the runtime refuses the graph, or the engine is another machine's.
        IntegrityError: an engine's bytes are not those of its fingerprint.
    """
    if runtime not in RUNTIMES:
        raise UsageError(
            f"unknown runtime {runtime!r}", hint=f"choose one of auto, {', '.join(RUNTIMES)}"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", hint=f"one of {', '.join(PRECISIONS)}")
    if runtime == "onnxruntime" and precision != "float32":
        raise UsageError("onnxruntime computes as the graph says", hint="--runtime openvino")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be positive, got {threads}")
    if runtime == "openvino":
        from modelops.export.runtimes.openvino import OpenVinoGraph

        return OpenVinoGraph(path, precision=precision, threads=threads)
    if runtime == "tensorrt":
        from modelops.export.tensorrt.engine import TensorRtGraph

        return TensorRtGraph(path.with_name(ENGINE), onnx_path=path, device=device_id)
    if runtime in ("torchscript", "torch-export"):
        from modelops.export.runtimes.torchscript import TorchGraph

        return TorchGraph(path, threads=threads)
    from modelops.export.runtimes.onnxruntime import OrtGraph

    return OrtGraph(path, threads=threads, provider=provider, device_id=device_id)


def process_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
