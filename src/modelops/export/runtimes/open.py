"""Opening of an exported network in a runtime: named arrays in, arrays out. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from modelops.base.errors import UsageError
from modelops.base.trust import require_trust
from modelops.export.graphs.graph import ENGINE, PRECISIONS, RUNTIMES, Graph, RuntimeName


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
        UsageError: an unknown runtime, a precision the runtime does not have, or a program of torch
            that nobody said to trust.
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
        from modelops.export.runtimes.tensorrt import TensorRtGraph

        return TensorRtGraph(path.with_name(ENGINE), onnx_path=path, device=device_id)
    if runtime in ("torchscript", "torch-export"):
        require_trust(path)
        from modelops.export.runtimes.torchscript import TorchGraph

        return TorchGraph(path, threads=threads)
    from modelops.export.runtimes.onnxruntime import OrtGraph

    return OrtGraph(path, threads=threads, provider=provider, device_id=device_id)
