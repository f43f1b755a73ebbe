"""Protocol of an opened graph, and the runtimes that can open one."""

from __future__ import annotations

import os
from typing import Any, Literal, Protocol

import numpy.typing as npt

from modelops.base.extras import has_module

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
    """Exported network, ready to run."""

    runtime: RuntimeName
    precision: str
    device: str
    input_names: list[str]
    output_names: list[str]

    def run(self, feed: dict[str, Array]) -> Array:
        """Return the graph's first output [N, ...] for inputs with the same first dimension N."""

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        """Return all outputs, in the order of `output_names`."""


def available_runtimes(artifact_format: str = "onnx") -> list[RuntimeName]:
    """Return the installed runtimes that run an artifact's format, in the order of RUNTIMES."""
    packages = {"tensorrt": "tensorrt", "torchscript": "torch", "torch-export": "torch"}
    return [
        name
        for name in RUNTIMES_OF.get(artifact_format, ())
        if has_module(packages.get(name, name))
    ]


def process_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
