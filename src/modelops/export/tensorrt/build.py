"""ONNX graph to TensorRT engine.

Written for TensorRT 10 (from 10.1) and 11: strongly typed networks, so a layer's precision is the
one that the graph gives it; no precision flags, calibrators or explicit-batch flag. The calls are
checked against the stubs of 10.13 and the signatures of 11.4; no engine was built where this was
written, which had no GPU. bench/gpu.sh builds some where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt

from modelops.base.errors import ExportError, ModelopsError, UsageError
from modelops.base.files import sha256_bytes, sha256_json, write_bytes, write_json
from modelops.export.graphs.axes import read_axes
from modelops.export.graphs.inspection import is_int8_graph, layer_precisions
from modelops.export.tensorrt.fingerprint import (
    EngineFingerprint,
    EngineFlags,
    EngineMachine,
    current_machine,
    fingerprint_differences,
    fingerprint_path,
    graph_digests,
    read_fingerprint,
)
from modelops.export.tensorrt.library import require_gpu, require_tensorrt
from modelops.export.tensorrt.profiles import (
    OptimizationProfile,
    dynamic_axes,
)

if TYPE_CHECKING:
    import tensorrt as trt

OnProgress = Callable[[str, int, int], None]  # phase, steps done, steps
_MAX_ERROR_LINES = 8


def build_engine(
    onnx_path: str | Path,
    plan_path: str | Path,
    profiles: Sequence[OptimizationProfile],
    flags: EngineFlags | None = None,
    *,
    device: int = 0,
    timing_cache: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> EngineFingerprint:
    """Build NAME.plan with NAME.layers.json (the inspector's report) and NAME.json beside it.

    NAME.json, the fingerprint, is taken away first and written last, so that a plan is never found
    beside the fingerprint of another.

    Args:
        onnx_path: model.onnx; external data is found beside it.
        plan_path: where the engine goes; ends in ".plan".
        profiles: at least one; see `profiles.parse_profiles`.
        flags: what to build; EngineFlags() when not given.
        device: CUDA device.
        timing_cache: a folder that keeps kernel timings between builds, one file for each kind of
            machine; damaged or foreign files in it are not used.
        on_progress: called with (phase, steps done, steps); an exception in it stops the build.

    Raises:
        UsageError: a wrong plan name, optimization level, workspace or profile.
        MissingExtraError: TensorRT is not installed.
        ExportError: no GPU, a node that TensorRT does not take, a failed build, or an INT8 graph
            whose engine has no INT8 layer.
    """
    flags = flags or EngineFlags()
    plan = Path(plan_path)
    check_build(onnx_path, plan, profiles, flags)
    version = require_tensorrt()
    require_gpu(device)
    import tensorrt as trt
    import torch

    digest, weights = graph_digests(onnx_path)
    machine = current_machine(device)
    with torch.cuda.device(device):
        logger = make_logger()
        builder = trt.Builder(logger)
        network = builder.create_network(_network_flags(version))
        parser = parse_graph(network, logger, Path(onnx_path))
        config = builder.create_builder_config()
        _configure(config, flags)
        for index, profile in enumerate(profiles):
            _add_profile(builder, config, profile, index)
        progress = make_monitor(on_progress)
        config.progress_monitor = progress
        cache_file = cache_path(timing_cache, machine) if timing_cache is not None else None
        _load_timing_cache(config, cache_file)
        data = builder.build_serialized_network(network, config)
        del parser  # it owns weights that the network reads until here
        if progress.error is not None:
            raise progress.error
        if data is None:
            raise ExportError(
                f"{onnx_path}: TensorRT built no engine: {logger.last_error or 'no reason given'}",
                hint="free memory, set a smaller workspace or narrower profiles",
            )
        plan_bytes = bytes(memoryview(data))
        _save_timing_cache(config, cache_file)
        information = inspect_plan(plan_bytes, flags, profiles[0])
    layers = layer_precisions(information)
    if is_int8_graph(onnx_path) and layers["int8_layers"] == 0:
        raise ExportError(
            f"{onnx_path}: an INT8 graph, and none of the {layers['layers_total']} layers of its "
            "engine runs in INT8", hint="a float16 graph needs no calibration",
        )  # fmt: skip
    fingerprint = EngineFingerprint(
        onnx_sha256=digest,
        weights_sha256=weights,
        plan_sha256=sha256_bytes(plan_bytes),
        machine=machine,
        profiles=list(profiles),
        flags=flags,
        layers=layers,
    )
    with suppress(FileNotFoundError):
        fingerprint_path(plan).unlink()
    write_bytes(plan, plan_bytes)
    write_json(plan.with_suffix(".layers.json"), information)
    fingerprint.write(fingerprint_path(plan))
    return fingerprint


def ensure_engine(
    onnx_path: str | Path,
    plan_path: str | Path,
    profiles: Sequence[OptimizationProfile],
    flags: EngineFlags | None = None,
    *,
    device: int = 0,
    rebuild: bool = False,
    timing_cache: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> EngineFingerprint:
    """Build an engine if there is none, or if `rebuild`; one that is there must belong here.

    Raises:
        ExportError: there is one for another machine, graph, profile or flag, and not `rebuild`.
        And as `build_engine` and `fingerprint.read_fingerprint`.
    """
    flags = flags or EngineFlags()
    plan = Path(plan_path)
    check_build(onnx_path, plan, profiles, flags)
    if not rebuild and (plan.is_file() or fingerprint_path(plan).is_file()):
        built = read_fingerprint(plan)
        different = fingerprint_differences(
            built, current_machine(device), onnx_path=onnx_path, profiles=profiles, flags=flags
        )
        if different:
            raise ExportError(
                f"{plan}: not built for this: {'; '.join(different)}",
                hint="add --rebuild to build it here",
            )
        return built
    return build_engine(
        onnx_path, plan, profiles, flags, device=device, timing_cache=timing_cache,
        on_progress=on_progress,
    )  # fmt: skip


def check_build(
    onnx_path: str | Path, plan: Path, profiles: Sequence[OptimizationProfile], flags: EngineFlags
) -> None:
    """Check what can be checked without TensorRT.

    Raises:
        UsageError: a wrong plan name, optimization level, workspace or profile.
        ExportError: not an ONNX graph.
    """
    if plan.suffix != ".plan":
        raise UsageError(f"{plan}: an engine's name ends in .plan")
    if not 0 <= flags.optimization_level <= 5:
        raise UsageError(f"the optimization level is 0 to 5, not {flags.optimization_level}")
    if flags.workspace_bytes is not None and flags.workspace_bytes < 1 << 20:
        raise UsageError("a workspace below 1 MiB", hint="leave it out to allow all memory")
    if not Path(onnx_path).is_file():
        raise UsageError(f"{onnx_path}: no such graph")
    if not profiles:
        raise UsageError("no optimization profile", hint='as in --profile "batch=1:8:16"')
    axes = read_axes(Path(onnx_path))
    for index, profile in enumerate(profiles):
        if set(profile.inputs) != set(axes.inputs):
            raise UsageError(
                f"profile {index} has the inputs {', '.join(sorted(profile.inputs))}, the graph "
                f"{', '.join(sorted(axes.inputs))}"
            )
        for name, dims in axes.inputs.items():
            wanted = profile.inputs[name]
            fixed = all(
                isinstance(dim, str) or low == high == dim
                for dim, low, high in zip(dims, wanted.minimum, wanted.maximum, strict=False)
            )
            if len(dims) != len(wanted.minimum) or not fixed:
                raise UsageError(
                    f"profile {index} gives {name} {wanted.minimum} to {wanted.maximum}, the graph "
                    f"{dims}",
                    hint=f"dynamic axes: {', '.join(dynamic_axes(axes)) or 'none'}",
                )


def cache_path(folder: str | Path, machine: EngineMachine) -> Path:
    """The timing-cache file of a kind of machine: timings are worth nothing on another."""
    return Path(folder) / f"timing-{sha256_json(machine.model_dump())[:16]}.cache"


def make_logger() -> Any:
    """A TensorRT logger that prints nothing and keeps the last error as `last_error`."""
    import tensorrt as trt

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""
            self.warnings: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            text = next((line.strip() for line in msg.splitlines() if line.strip()), "")
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = text
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(text)

    return Logger()


def make_monitor(on_progress: OnProgress | None) -> Any:
    """A progress monitor for a build; what a callback raises stops the build and is its `error`."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def _tell(self, phase: str, done: int) -> bool:
            if self.error is None and on_progress is not None:
                try:
                    on_progress(phase, done, self._steps.get(phase, 0))
                except BaseException as error:  # it must not pass through TensorRT's C++ frames
                    self.error = error
            return self.error is None

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt
        ) -> None:
            self._steps[phase_name] = int(num_steps)
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            return self._tell(phase_name, int(step) + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.get(phase_name, 0))
            self._steps.pop(phase_name, None)

    return Monitor()


def parse_graph(network: trt.INetworkDefinition, logger: trt.ILogger, path: Path) -> trt.OnnxParser:
    """Read a graph into a network, from its file so that external data is found.

    Returns:
        The parser, which must live until the network is built.

    Raises:
        ExportError: one line for each node that TensorRT does not take.
    """
    import tensorrt as trt

    trt.init_libnvinfer_plugins(logger, "")
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return parser
    lines = [parser_error_line(parser.get_error(index)) for index in range(parser.num_errors)]
    if len(lines) > _MAX_ERROR_LINES:
        lines = [*lines[:_MAX_ERROR_LINES], f"and {len(lines) - _MAX_ERROR_LINES} more"]
    raise ExportError(
        "\n".join([f"{path}: TensorRT does not take the graph:", *(f"  {line}" for line in lines)])
    )


def parser_error_line(error: Any) -> str:
    """One line for an error of the ONNX parser: node, operator and reason."""
    reason = " ".join(str(error.desc()).split())
    name, operator = str(error.node_name()), str(error.node_operator())
    where = f"{name} ({operator})" if name and operator else name or operator or "the graph"
    return f"{where}: {reason}"


def inspect_plan(plan: bytes, flags: EngineFlags, profile: OptimizationProfile) -> dict[str, Any]:
    """The inspector's layer information of an engine that was just built.

    It is asked of a context at the profile's usual shapes: without one the types of tensors are
    "N/A due to dynamic shapes".

    Raises:
        ExportError: TensorRT cannot read its own engine.
    """
    import tensorrt as trt

    engine = deserialize(plan, flags)
    inspector = engine.create_engine_inspector()
    # Nothing is run in it, so it needs no memory.
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None:
        for name, sizes in profile.inputs.items():
            context.set_input_shape(name, sizes.optimum)
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        information: dict[str, Any] = json.loads(text, strict=False)  # kernels name themselves
    except json.JSONDecodeError as error:
        raise ExportError(f"TensorRT's inspector gave no JSON: {error.msg}") from error
    return information


def deserialize(plan: bytes, flags: EngineFlags) -> trt.ICudaEngine:
    """An engine from bytes whose digest was checked; see `fingerprint.read_verified_plan`.

    Raises:
        ExportError: TensorRT refuses it.
    """
    import tensorrt as trt

    logger = make_logger()
    trt.init_libnvinfer_plugins(logger, "")
    runtime = trt.Runtime(logger)
    if flags.version_compatible:  # such a plan carries the code of a small runtime
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(
            f"TensorRT refuses the engine: {logger.last_error or 'no reason given'}",
            hint="add --rebuild to build it here",
        )
    return engine


def _network_flags(version: str) -> int:
    """Strongly typed in TensorRT 10; in 11 every network is and the flag is deprecated."""
    import tensorrt as trt

    if int(version.split(".", maxsplit=1)[0]) >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _configure(config: trt.IBuilderConfig, flags: EngineFlags) -> None:
    import tensorrt as trt

    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else no layer names its types
    config.builder_optimization_level = flags.optimization_level
    if flags.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace_bytes)
    for wanted, flag in (
        (flags.tf32, trt.BuilderFlag.TF32),  # TensorRT's default is on
        (flags.refit, trt.BuilderFlag.REFIT),
        (flags.version_compatible, trt.BuilderFlag.VERSION_COMPATIBLE),
    ):
        if wanted:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)


def _add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, profile: OptimizationProfile, index: int
) -> None:
    import tensorrt as trt

    made = builder.create_optimization_profile()
    for name, sizes in profile.inputs.items():
        made.set_shape(
            name, trt.Dims(sizes.minimum), trt.Dims(sizes.optimum), trt.Dims(sizes.maximum)
        )
    if config.add_optimization_profile(made) < 0:
        raise UsageError(f"TensorRT refuses profile {index}")


def _load_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> None:
    if path is None:
        return
    data = path.read_bytes() if path.is_file() else b""
    for content in (data, b""):
        with suppress(RuntimeError, TypeError):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return


def _save_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> None:
    """Write the timings back; a cache that cannot be written costs only the next build's time."""
    cache = config.get_timing_cache() if path is not None else None
    if path is None or cache is None:
        return
    with suppress(ModelopsError):
        write_bytes(path, bytes(memoryview(cache.serialize())))
