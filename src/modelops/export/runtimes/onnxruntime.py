"""ONNX graphs in onnxruntime: on the CPU, on CUDA, or through its TensorRT provider.

The CPU paths are tested here; the CUDA and TensorRT ones were written without a GPU and are run by
bench/gpu.sh where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelops.base.errors import ExportError, MissingExtraError, ModelopsError, UsageError
from modelops.export.graphs.graph import Array, RuntimeName, process_cores
from modelops.export.onnx.weight_range import read_weight_range

if TYPE_CHECKING:
    import torch

    from modelops.export.tensorrt.profiles import OptimizationProfile

ProviderName = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[ProviderName, ...] = ("auto", "cpu", "cuda", "tensorrt")
_FULL_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_GPU_COMMAND = "pip install --force-reinstall --no-deps onnxruntime-gpu"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type


class OrtGraph:
    """A graph in onnxruntime.

    Args:
        path: model.onnx.
        threads: intra-op threads.
        optimized_path: also write the graph as onnxruntime rewrote it.
        as_written: run every node as the graph has it, fusing nothing. INT8 layers are then float
            products of rounded numbers: slow, exact up to float32's rounding, and the same on every
            processor.
        provider: "cpu", "cuda", "tensorrt", or "auto": CUDA where its provider works, else the CPU.
            TensorRT is never taken unasked, since it builds engines for minutes.
        device_id: CUDA device.
        cache_dir: where the TensorRT provider keeps engines and timings between processes. They are
            programs and carry no digest: name a folder that only this user can write.
        profiles: shape ranges of the TensorRT provider's engines; without them it builds a new
            engine whenever a shape leaves the range of those it has met.

    Raises:
        UsageError: an unknown provider, or an option that it does not have.
        MissingExtraError: this onnxruntime has no such provider.
        ExportError: onnxruntime refuses the graph, or fell back to the CPU from a provider that was
            asked for.
    """

    runtime: RuntimeName = "onnxruntime"
    precision = "float32"

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        optimized_path: Path | None = None,
        as_written: bool = False,
        provider: str = "auto",
        device_id: int = 0,
        cache_dir: Path | None = None,
        profiles: Sequence[OptimizationProfile] = (),
    ) -> None:
        if provider not in PROVIDERS:
            raise UsageError(
                f"unknown provider {provider!r}", hint=f"choose one of {', '.join(PROVIDERS)}"
            )
        if device_id < 0:
            raise UsageError(f"a device's number is 0 or more, got {device_id}")
        if provider != "tensorrt" and (cache_dir is not None or profiles):
            raise UsageError("only the TensorRT provider has an engine cache and profiles")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Idle threads that spin after a run would slow whatever else runs between the steps.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.intra_op_num_threads = threads or process_cores()
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        elif read_weight_range(path) == "full":
            # Without VNNI its sums of products of an unsigned and a signed byte saturate; it then
            # takes two unsigned ones, which is slower. With VNNI nothing changes.
            options.add_session_config_entry("session.x64quantprecision", "1")
        available = onnxruntime.get_available_providers()
        wanted = _wanted(provider, available)
        self._device_id = device_id
        self._stream = _cuda_stream(device_id) if wanted[0] != "cpu" else None
        configured = [
            (_FULL_NAMES[name], self._provider_options(name, path, cache_dir, profiles))
            for name in wanted
        ]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=configured)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ExportError(
                f"{path}: onnxruntime refuses the graph: {str(error).splitlines()[0]}"
            ) from error
        active = self.session.get_providers()
        if provider != "auto" and _FULL_NAMES[wanted[0]] not in active:
            raise ExportError(
                f"{path}: {provider} was asked for and onnxruntime fell back to "
                f"{', '.join(name.removesuffix('ExecutionProvider') for name in active)}",
                hint="see `modelops doctor`; its CUDA, cuDNN or TensorRT libraries do not load",
            )
        if provider not in ("auto", "cpu"):
            self.session.disable_fallback()  # else a failed run silently continues on the CPU
        self.provider = next(name for name in wanted if _FULL_NAMES[name] in active)
        self.input_names = [item.name for item in self.session.get_inputs()]
        self.output_names = [item.name for item in self.session.get_outputs()]
        self.device = "cpu"
        if self.provider != "cpu":
            self.device = f"cuda:{device_id}" if device_id else "cuda"
        self._shapes: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}

    def run(self, feed: dict[str, Array]) -> Array:
        return self.run_all(feed)[0]

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = 4  # what fails is raised, and said in one line
        try:
            outputs: list[Array] = self.session.run(None, feed, options)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise self._refusal(feed, error) from error
        return outputs

    def _refusal(self, feed: Mapping[str, Array], error: Exception) -> ModelopsError:
        """Say which input the graph does not take, or what onnxruntime says."""
        for item in self.session.get_inputs():
            if item.name not in feed:
                return UsageError(f"the graph's input {item.name} is not given")
            shape = feed[item.name].shape
            fixed = (isinstance(axis, int) for axis in item.shape)
            if len(shape) != len(item.shape) or any(
                is_fixed and axis != size
                for is_fixed, axis, size in zip(fixed, item.shape, shape, strict=True)
            ):
                return UsageError(
                    f"{item.name} has the shape {list(shape)}, and the graph takes "
                    f"[{', '.join(map(str, item.shape))}]",
                    hint="ask for what the artifact was exported for, or export it anew",
                )
        return ExportError(f"onnxruntime does not run the graph: {str(error).splitlines()[0]}")

    def run_device(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return all outputs, bound to torch's memory: nothing is copied on the way in or out.

        Args:
            feed: every input, on `device`, of the graph's dtypes. On a GPU the work is ordered
                after what torch's current stream holds, and what is put there afterwards is ordered
                after it; the host does not wait.

        Returns:
            New tensors on `device` in the order of `output_names`.

        Raises:
            ExportError: an input is missing, of another dtype or elsewhere, or onnxruntime fails.
        """
        import onnxruntime
        import torch

        inputs = self._checked(feed)
        options = onnxruntime.RunOptions()
        stream = self._stream
        current = None
        if stream is not None:
            current = torch.cuda.current_stream(stream.device)
            stream.wait_stream(current)
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            try:
                outputs = self._run_bound(inputs, options)
            except Exception as error:  # onnxruntime's own exceptions have no common base
                if isinstance(error, ExportError):
                    raise
                raise ExportError(
                    f"onnxruntime cannot run the graph: {str(error).splitlines()[0]}"
                ) from error
        if stream is not None and current is not None:
            current.wait_stream(stream)
            for tensor in inputs.values():
                tensor.record_stream(stream)
            for tensor in outputs:
                tensor.record_stream(current)
        return outputs

    def _run_bound(self, inputs: dict[str, torch.Tensor], options: Any) -> list[torch.Tensor]:
        import torch

        binding = self.session.io_binding()
        kind, device = ("cpu", 0) if self.provider == "cpu" else ("cuda", self._device_id)
        for name, tensor in inputs.items():
            binding.bind_input(
                name, kind, device, _element_type(tensor.dtype), list(tensor.shape),
                tensor.data_ptr(),
            )  # fmt: skip
        key = tuple(tuple(inputs[name].shape) for name in self.input_names)
        if key not in self._shapes:
            self._shapes[key] = self._output_shapes(binding, options, inputs, kind, device)
        outputs = []
        for item, shape in zip(self.session.get_outputs(), self._shapes[key], strict=True):
            dtype = _torch_dtype(item.type)
            tensor = torch.empty(shape, dtype=dtype, device=self._torch_device())
            binding.bind_output(
                item.name, kind, device, _element_type(dtype), list(shape), tensor.data_ptr()
            )
            outputs.append(tensor)
        self.session.run_with_iobinding(binding, options)
        return outputs

    def _output_shapes(
        self,
        binding: Any,
        options: Any,
        inputs: dict[str, torch.Tensor],
        kind: str,
        device: int,
    ) -> list[tuple[int, ...]]:
        """Return the sizes of the outputs for these inputs: from the names of the axes or, if the
        outputs have other axes, from one run into onnxruntime's own memory."""
        sizes = {
            dim: size
            for item in self.session.get_inputs()
            for dim, size in zip(item.shape, inputs[item.name].shape, strict=True)
            if isinstance(dim, str)
        }
        outputs = self.session.get_outputs()
        if all(isinstance(dim, int) or dim in sizes for item in outputs for dim in item.shape):
            return [tuple(sizes.get(dim, dim) for dim in item.shape) for item in outputs]
        for item in outputs:
            binding.bind_output(item.name, kind, device)
        self.session.run_with_iobinding(binding, options)
        found = [tuple(value.shape()) for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        return found

    def _checked(self, feed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if set(feed) != set(self.input_names):
            raise ExportError(
                f"the graph needs the inputs {', '.join(self.input_names)}, not {', '.join(feed)}"
            )
        wanted = self._torch_device()
        checked = {}
        for item in self.session.get_inputs():
            tensor = feed[item.name]
            if tensor.device != wanted:
                raise ExportError(f"input {item.name} is on {tensor.device}, not on {wanted}")
            if tensor.dtype != _torch_dtype(item.type):
                raise ExportError(
                    f"input {item.name} is {tensor.dtype}, not {_torch_dtype(item.type)}"
                )
            if len(item.shape) != tensor.ndim:
                raise ExportError(
                    f"input {item.name} has {len(item.shape)} axes, not the shape "
                    f"{tuple(tensor.shape)}"
                )
            checked[item.name] = tensor.detach().contiguous()
        return checked

    def _torch_device(self) -> torch.device:
        import torch

        if self.provider == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", self._device_id)

    def _provider_options(
        self,
        name: str,
        path: Path,
        cache_dir: Path | None,
        profiles: Sequence[OptimizationProfile],
    ) -> dict[str, str]:
        if name == "cpu":
            return {}
        options = {"device_id": str(self._device_id)}
        if self._stream is not None:
            options["user_compute_stream"] = str(self._stream.cuda_stream)
        if name == "cuda":
            return options | {"use_tf32": "0"}  # on by default: 10 bits of mantissa in products
        return options | tensorrt_options(path, cache_dir, profiles)


def tensorrt_options(
    path: Path, cache_dir: Path | None = None, profiles: Sequence[OptimizationProfile] = ()
) -> dict[str, str]:
    """Return the options of onnxruntime's TensorRT provider for a graph.

    Precisions are those of the graph: fp16 stays off, INT8 is on where the graph has QDQ nodes.
    """
    from modelops.export.graphs.inspection import is_int8_graph

    options = {
        "trt_fp16_enable": "False",
        "trt_int8_enable": str(is_int8_graph(path)),
        "trt_engine_cache_enable": str(cache_dir is not None),
        "trt_timing_cache_enable": str(cache_dir is not None),
    }
    if cache_dir is not None:
        options["trt_engine_cache_path"] = str(cache_dir)
        options["trt_timing_cache_path"] = str(cache_dir)
    for key in ("minimum", "optimum", "maximum") if profiles else ():
        options[f"trt_profile_{key[:3]}_shapes"] = ",".join(
            f"{name}:{'x'.join(map(str, getattr(sizes, key)))}"
            for profile in profiles
            for name, sizes in profile.inputs.items()
        )
    return options


def _wanted(provider: str, available: Sequence[str]) -> list[str]:
    """Return providers in the order in which onnxruntime tries them, the requested one first."""
    chain = {"cpu": ["cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}.get(provider, ["cuda", "cpu"])
    if provider != "auto" and _FULL_NAMES[provider] not in available:
        has = ", ".join(name.removesuffix("ExecutionProvider") for name in available)
        raise MissingExtraError(
            f"this onnxruntime has no {provider} provider (it has {has})", hint=_GPU_COMMAND
        )
    wanted = [name for name in chain if _FULL_NAMES[name] in available]
    if wanted[0] != "cpu":
        _load_libraries(wanted[0])
    return wanted


def _load_libraries(provider: str) -> None:
    """Load CUDA, cuDNN and TensorRT from their Python packages; onnxruntime looks elsewhere."""
    import onnxruntime

    with suppress(Exception):  # what stays missing shows when the provider falls back
        import torch  # noqa: F401

        onnxruntime.preload_dlls()
        if provider == "tensorrt":
            import tensorrt  # noqa: F401


def _cuda_stream(device_id: int) -> torch.cuda.Stream | None:
    import torch

    if not torch.cuda.is_available() or device_id >= torch.cuda.device_count():
        return None
    return torch.cuda.Stream(torch.device("cuda", device_id))


def _torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of an onnxruntime type such as "tensor(float16)"."""
    import torch

    names = {"float": "float32", "double": "float64"}
    kind = name.removeprefix("tensor(").removesuffix(")")
    found = getattr(torch, names.get(kind, kind), None)
    if not isinstance(found, torch.dtype):
        raise ExportError(f"a graph with {name} cannot be run on torch's tensors")
    return found


def _element_type(dtype: torch.dtype) -> Any:
    """The same dtype for onnxruntime's binding: numpy's, or ONNX's number where numpy has none."""
    name = str(dtype).removeprefix("torch.")
    return _BFLOAT16 if name == "bfloat16" else np.dtype(name).type
