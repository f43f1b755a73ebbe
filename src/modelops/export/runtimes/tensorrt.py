"""A TensorRT engine that runs on torch's CUDA tensors.

Checked against the stubs of TensorRT 10.13 and the signatures of 11.4; no engine was run where this
was written, which had no GPU. bench/gpu.sh checks one against torch where there is one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.base.errors import ExportError
from modelops.export.graphs.graph import Array, RuntimeName
from modelops.export.tensorrt.build import deserialize
from modelops.export.tensorrt.fingerprint import (
    EngineFlags,
    current_machine,
    read_verified_plan,
)
from modelops.export.tensorrt.profiles import OptimizationProfile, choose_profile

if TYPE_CHECKING:
    import tensorrt as trt
    import torch

_MAX_CONTEXTS = 4  # shapes that are kept ready, each with its CUDA graph
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class _Prepared:
    """An execution context for one set of shapes, with the buffers that its CUDA graph uses."""

    context: trt.IExecutionContext
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    capturable: bool = True


class TensorRtGraph:
    """An engine as a graph: named arrays or CUDA tensors in, the same out.

    Each set of input shapes gets an execution context and buffers of its own; all contexts share
    one piece of device memory for activations, since they run one after the other on one stream.
    From the second call with the same shapes on, a CUDA graph is replayed: the inputs are copied
    into its buffers on the device and the outputs out of them.

    Args:
        plan: NAME.plan with NAME.json beside it, as `build.build_engine` writes them.
        onnx_path, profiles, flags: if given, the engine must have been built from and for them.
        device: CUDA device.
        cuda_graphs: replay CUDA graphs where the engine can be captured.
        precision: what artifact.json says of the graph, for records; from the engine's inputs and
            INT8 layers when not given.

    Raises:
        MissingExtraError: TensorRT is not installed.
        UsageError: no such engine.
        IntegrityError: its bytes are not those of its digest.
        ExportError: no GPU, an engine for something else, or one that TensorRT refuses.
    """

    runtime: RuntimeName = "tensorrt"

    def __init__(
        self,
        plan: str | Path,
        *,
        onnx_path: str | Path | None = None,
        profiles: Sequence[OptimizationProfile] | None = None,
        flags: EngineFlags | None = None,
        device: int = 0,
        cuda_graphs: bool = True,
        precision: str | None = None,
    ) -> None:
        data, self.fingerprint = read_verified_plan(
            plan, current_machine(device), onnx_path=onnx_path, profiles=profiles, flags=flags
        )
        import tensorrt as trt
        import torch

        self.path = Path(plan)
        self.device = "cuda" if device == 0 else f"cuda:{device}"
        self._device = torch.device("cuda", device)
        self._cuda_graphs = cuda_graphs
        self._lock = threading.Lock()
        self._ready: OrderedDict[Shapes, _Prepared] = OrderedDict()
        with torch.cuda.device(self._device):
            self._engine = deserialize(data, self.fingerprint.flags)
            self._stream = torch.cuda.Stream(self._device)
            size = max(int(self._engine.device_memory_size_v2), 1)
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        names = [
            self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)
        ]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.input_names = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.output_names = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self._dtypes = {name: _torch_dtype(self._engine.get_tensor_dtype(name)) for name in names}
        on_host = [name for name in names if self._engine.is_shape_inference_io(name)]
        if on_host:
            raise ExportError(f"{plan}: {', '.join(on_host)} would have to lie in host memory")
        self.precision = precision or self._precision()

    @property
    def captured_shapes(self) -> int:
        """Number of sets of shapes that are replayed as CUDA graphs now."""
        return sum(prepared.graph is not None for prepared in self._ready.values())

    def run(self, feed: dict[str, Array]) -> Array:
        """The first output [N, ...]."""
        return self.run_all(feed)[0]

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        """Return all outputs in the order of `output_names`; bfloat16 as float32.

        Raises:
            ExportError: as `run_device`.
        """
        import torch

        tensors = {
            name: torch.from_numpy(array).to(self._device, non_blocking=True)
            for name, array in feed.items()
        }
        arrays = []
        for output in self.run_device(tensors):
            host = output.float() if output.dtype == torch.bfloat16 else output
            arrays.append(host.cpu().numpy())
        return arrays

    def run_device(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return all outputs, without a copy through the host or a wait for the device.

        Args:
            feed: CUDA tensors of this engine's device, of the dtypes that it was built for. The
                work is ordered after what torch's current stream holds, and what is put there
                afterwards is ordered after it.

        Returns:
            New tensors in the order of `output_names`.

        Raises:
            ExportError: an input is missing, of another dtype or device, or outside every profile;
                or TensorRT reports a failure.
        """
        import torch

        inputs = self._checked(feed)
        shapes: Shapes = tuple((name, tuple(inputs[name].shape)) for name in self.input_names)
        with self._lock, torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            prepared = self._prepared(shapes)
            # All on one stream, the copies out too: the next call, perhaps from another thread with
            # another current stream, overwrites the buffers only after them.
            with torch.cuda.stream(self._stream):
                for name, buffer in prepared.inputs.items():
                    inputs[name].record_stream(self._stream)
                    buffer.copy_(inputs[name], non_blocking=True)
                self._execute(prepared)
                outputs = [prepared.outputs[name].clone() for name in self.output_names]
            current.wait_stream(self._stream)
            for output in outputs:
                output.record_stream(current)
            return outputs

    def _checked(self, feed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if set(feed) != set(self.input_names):
            raise ExportError(
                f"{self.path}: needs the inputs {', '.join(self.input_names)}, not "
                f"{', '.join(feed)}"
            )
        for name, tensor in feed.items():
            if tensor.device != self._device:
                raise ExportError(
                    f"{self.path}: input {name} is on {tensor.device}, not on {self._device}"
                )
            if tensor.dtype != self._dtypes[name]:
                raise ExportError(
                    f"{self.path}: input {name} is {tensor.dtype}, not {self._dtypes[name]}"
                )
        return dict(feed)

    def _prepared(self, shapes: Shapes) -> _Prepared:
        if shapes in self._ready:
            self._ready.move_to_end(shapes)
            return self._ready[shapes]
        index = choose_profile(self.fingerprint.profiles, dict(shapes), path=self.path)
        if len(self._ready) >= _MAX_CONTEXTS:
            self._stream.synchronize()  # the oldest context may still be at work
            self._ready.popitem(last=False)
        self._ready[shapes] = self._prepare(dict(shapes), index)
        return self._ready[shapes]

    def _prepare(self, shapes: dict[str, tuple[int, ...]], profile: int) -> _Prepared:
        import tensorrt as trt
        import torch

        context = self._engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise ExportError(f"{self.path}: TensorRT made no execution context")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        handle = self._stream.cuda_stream
        self._require(context.set_optimization_profile_async(profile, handle), "set its profile")
        for name, shape in shapes.items():
            self._require(context.set_input_shape(name, shape), f"take {name} as {shape}")
        unknown = context.infer_shapes()
        if unknown:
            raise ExportError(f"{self.path}: no shapes for {', '.join(unknown)}")
        known = {name: _sizes(context.get_tensor_shape(name)) for name in self.output_names}
        if any(size < 0 for shape in known.values() for size in shape):
            raise ExportError(f"{self.path}: the size of an output depends on the data")
        known |= shapes
        with torch.cuda.stream(self._stream):
            buffers = {
                name: torch.empty(known[name], dtype=self._dtypes[name], device=self._device)
                for name in (*self.input_names, *self.output_names)
            }
        for name, buffer in buffers.items():
            self._require(
                context.set_tensor_address(name, buffer.data_ptr()), f"take the buffer of {name}"
            )
        return _Prepared(
            context,
            {name: buffers[name] for name in self.input_names},
            {name: buffers[name] for name in self.output_names},
        )

    def _execute(self, prepared: _Prepared) -> None:
        """Enqueue one execution.

        The first must be an ordinary one: TensorRT sets up in it what depends on the shapes, which
        may not happen while a graph is captured.
        """
        import torch

        prepared.calls += 1
        if prepared.graph is not None:
            prepared.graph.replay()
            return
        if self._cuda_graphs and prepared.capturable and prepared.calls > 1:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(
                    graph, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._enqueue(prepared)
            except (RuntimeError, ExportError):  # an engine that waits for the device inside
                prepared.capturable = False
            else:
                prepared.graph = graph
                graph.replay()
                return
        self._enqueue(prepared)

    def _enqueue(self, prepared: _Prepared) -> None:
        self._require(prepared.context.execute_async_v3(self._stream.cuda_stream), "run")

    def _require(self, worked: bool, what: str) -> None:
        if not worked:
            raise ExportError(f"{self.path}: TensorRT could not {what}")

    def _precision(self) -> str:
        """Return the first float input's precision, with "int8+" if layers run in INT8."""
        floating = next(
            (
                str(self._dtypes[name]).removeprefix("torch.")
                for name in self.input_names
                if self._dtypes[name].is_floating_point
            ),
            "float32",
        )
        return f"int8+{floating}" if self.fingerprint.layers.get("int8_layers") else floating


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(int(dims[index]) for index in range(len(dims)))


def _torch_dtype(dtype: trt.DataType) -> torch.dtype:
    import tensorrt as trt
    import torch

    known: dict[Any, torch.dtype] = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT8: torch.int8,
        trt.DataType.UINT8: torch.uint8,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.BOOL: torch.bool,
    }
    if dtype not in known:
        raise ExportError(f"an engine with a tensor of type {dtype} cannot be run from torch")
    return known[dtype]
