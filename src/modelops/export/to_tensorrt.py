"""Export of an ONNX or INT8 artifact to TensorRT engines, one for each network.

The engines are built, compared and timed on a machine with a GPU and TensorRT. This code was
written without either, so nothing below has run past the checks of its arguments.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast

from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import atomic_directory, check_writable
from modelops.export.artifact.directory import (
    RECORD,
    check_destination,
    portable_path,
    verify_artifact,
)
from modelops.export.calibration import DEFAULT_PROMPTS, check_prompts, own_prompts
from modelops.export.exporting import (
    PARITY_SEED,
    OnProgress,
    OnStage,
    Stages,
    about_files,
    about_source,
    catch_calls,
    prove,
)
from modelops.export.graphs.axes import GraphAxes, read_axes
from modelops.export.graphs.graph import ENGINE
from modelops.export.parity import BOUNDS, require_parity
from modelops.export.runtimes.open import open_graph
from modelops.export.source import both_sides, component_from, load_source, lora_of, size_of
from modelops.export.tensorrt.build import check_build, ensure_engine
from modelops.export.tensorrt.fingerprint import EngineFlags
from modelops.export.tensorrt.library import require_gpu, require_tensorrt
from modelops.export.tensorrt.profiles import (
    OptimizationProfile,
    make_profile,
    parse_limits,
)
from modelops.records.base import InputRef
from modelops.records.export import ArtifactRecord, Execution, ExportedComponent

DEFAULT_PROFILES = ("batch=1:2:16",)  # guidance doubles the rows of an image


def engine_profiles(
    folder: Path, components: Sequence[ExportedComponent], texts: Sequence[str]
) -> dict[str, list[OptimizationProfile]]:
    """Return the profiles of every graph of an artifact.

    An axis that a text does not name keeps the size that the artifact was exported at.

    Raises:
        UsageError: a text names an axis that no graph has, or is not valid.
    """
    graphs = {item.name: read_axes(folder / item.file) for item in components}
    known = {axis for axes in graphs.values() for axis in _axis_names(axes)}
    found: dict[str, list[OptimizationProfile]] = {name: [] for name in graphs}
    for text in texts:
        limits = parse_limits(text)
        for name in limits:
            if name not in known:
                raise UsageError(
                    f"no graph of the artifact has a dynamic axis {name}",
                    hint=f"they have {', '.join(sorted(known))}",
                )
        for item in components:
            axes = graphs[item.name]
            own = {name: sizes for name, sizes in limits.items() if name in _axis_names(axes)}
            for name, dims in axes.inputs.items():
                for index, dim in enumerate(dims):
                    if isinstance(dim, str) and dim not in own and f"{name}.{dim}" not in own:
                        size = item.shapes[name][index]
                        own[f"{name}.{dim}"] = (size, size, size)
            found[item.name].append(make_profile(axes, own))
    return found


def _axis_names(axes: GraphAxes) -> set[str]:
    plain = {d for dims in axes.inputs.values() for d in dims if isinstance(d, str)}
    named = {f"{n}.{d}" for n, dims in axes.inputs.items() for d in dims if isinstance(d, str)}
    return plain | named


def export_tensorrt(
    onnx_dir: str | Path,
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    profiles: Sequence[str] = DEFAULT_PROFILES,
    flags: EngineFlags | None = None,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    device: int = 0,
    timing_cache: str | Path | None = None,
    allow: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> ArtifactRecord:
    """Build an engine for every graph of an artifact and compare it with the checkpoint.

    Args:
        onnx_dir: an ONNX artifact of any precision, or an INT8 one.
        checkpoint: its source; the reference for parity.
        out_dir: the artifact's directory; it also holds the graphs, to check the engines.
        profiles: ranges of the dynamic axes, as `tensorrt.profiles.parse_profiles` reads them.
        flags: of the build.
        prompts: prompts for measuring parity.
        device: CUDA device.
        timing_cache: a folder that keeps kernel timings between builds.
        allow: keep an export that is outside its parity bounds and record the waiver.
        overwrite: replace an artifact that is there.
        on_progress: called with (done, of how many), see `Stages`.
        on_stage: called with (name, number from 1, stages) when a stage or a phase of it begins.

    Raises:
        UsageError: not such an artifact, a profile that does not fit, out_dir is taken.
        IntegrityError: the artifact is damaged or of another checkpoint.
        MissingExtraError: TensorRT is not installed.
        ExportError: no GPU, a node that TensorRT does not take, no INT8 in an INT8 engine, or
            engines that are not equal to their source.
    """
    check_prompts(prompts)
    flags = flags or EngineFlags()
    started, clock = datetime.now(UTC), time.monotonic()
    check_destination(out_dir, overwrite=overwrite)
    origin, origin_sha256 = verify_artifact(onnx_dir)
    if origin.format not in ("onnx", "int8"):
        raise UsageError(f"{onnx_dir}: a {origin.format} artifact", hint="name an onnx or int8 one")
    folder = Path(onnx_dir)
    ranges = engine_profiles(folder, origin.components, profiles)
    for item in origin.components:
        check_build(folder / item.file, Path(out_dir) / ENGINE, ranges[item.name], flags)
    require_tensorrt("exporting to TensorRT")
    require_gpu(device)
    stages = Stages(len(origin.components) + 4, on_stage=on_stage, on_progress=on_progress)
    stages.begin("loading")
    lora = lora_of(origin)
    source = load_source(checkpoint, size=both_sides(size_of(origin)), lora=lora)
    texts = own_prompts(source.traits, prompts)
    if origin.inputs["checkpoint"].sha256 != source.sha256:
        raise IntegrityError(
            f"{onnx_dir}: was not exported from {checkpoint}", hint="export it to onnx again"
        )
    check_writable(Path(out_dir).parent, need_bytes=3 * origin.bytes_total)
    with atomic_directory(out_dir) as root:
        shutil.copytree(folder, root, dirs_exist_ok=True)
        (root / RECORD).unlink()
        layers: dict[str, Execution] = {}
        for item in origin.components:
            path = root / item.file
            stages.begin(f"building {item.name}")
            fingerprint = ensure_engine(
                path, path.with_name(ENGINE), ranges[item.name], flags, device=device,
                timing_cache=timing_cache, on_progress=partial(_tell, stages, item.name),
            )  # fmt: skip
            layers[item.name] = cast("Execution", fingerprint.layers)
        components = [
            component_from(source.pipeline, root / item.name, item) for item in origin.components
        ]
        graphs = {
            item.name: open_graph(root / item.file, "tensorrt", device_id=device)
            for item in origin.components
        }
        stages.begin("drawing with the source")
        calls = catch_calls(source, components, texts)
        bounds = BOUNDS["int8" if origin.format == "int8" else origin.precision]
        checks, error_by_noise = prove(
            source, root, components, graphs, calls, bounds, texts, stages
        )
        record = ArtifactRecord(
            format="tensorrt",
            precision=origin.precision,
            runtime="tensorrt",
            error=require_parity(checks, allow=allow),
            seeds={"parity": PARITY_SEED},
            started_at=started,
            parity=checks,
            error_by_noise=error_by_noise,
            calibration=origin.calibration,
            conversion=origin.conversion,
            execution={"tensorrt": layers},
            duration_s=time.monotonic() - clock,
            **about_source(checkpoint, source, lora),
            **about_files(root, origin.components),
        )
        record.inputs[origin.format] = InputRef(path=portable_path(onnx_dir), sha256=origin_sha256)
        record.write(root / RECORD)
    stages.end()
    return record


def _tell(stages: Stages, name: str, phase: str, done: int, total: int) -> None:
    """Pass on TensorRT's progress in a build: its phases are nested, with a count each."""
    stages.rename(f"building {name}: {phase}")
    stages.count(done, total)
