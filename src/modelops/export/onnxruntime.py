"""ONNX graphs in onnxruntime."""

from __future__ import annotations

from pathlib import Path

from modelops.errors import ExportError
from modelops.export.graphs import Array, RuntimeName, process_cores


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
        self.output_names = [item.name for item in self.session.get_outputs()]
        self.device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"

    def run(self, feed: dict[str, Array]) -> Array:
        return self.run_all(feed)[0]

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        outputs: list[Array] = self.session.run(None, feed)
        return outputs
