"""Export of a checkpoint to ONNX: every network through torch.export, proven equal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.errors import ExportError, ModelopsError, UsageError
from modelops.base.files import atomic_directory, check_writable, write_json
from modelops.export.artifact.directory import (
    GRAPH,
    RECORD,
    SIGNATURE,
    check_destination,
)
from modelops.export.calibration import (
    DEFAULT_PROMPTS,
    check_prompts,
    own_prompts,
)
from modelops.export.components import Component, find_components
from modelops.export.exporting import (
    PARITY_SEED,
    Calls,
    OnProgress,
    OnStage,
    Stages,
    about_files,
    about_source,
    carry_parts,
    catch_calls,
    config_of,
    describe_components,
    prove,
)
from modelops.export.graphs.axes import BATCH
from modelops.export.graphs.graph import PRECISIONS, Array, RuntimeName, available_runtimes
from modelops.export.lora import Lora
from modelops.export.onnx.writer import FixedAxesError, write_graph
from modelops.export.parity import (
    BOUNDS,
    require_parity,
)
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.source import both_sides, load_source
from modelops.models.pipelines.signatures import Example
from modelops.records.export import ArtifactRecord

_FAR = 1e-2  # of the norm of an answer; parity measures what is nearer
MAX_OPSET = 20  # from 21 on, S8S8 MatMul + Add can fail when a session is created


def export_onnx(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    opset: int = MAX_OPSET,
    precision: str = "float32",
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    size: tuple[int, int] | None = None,
    lora: Lora | None = None,
    allow: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> ArtifactRecord:
    """Export a checkpoint's networks and compare them with their source.

    The directory appears only when everything is written and compared.

    Args:
        checkpoint: a diffusers directory or hub id of any text-to-image or unconditional pipeline.
        out_dir: the artifact's directory.
        opset: of the graphs, 18 to 20 (bfloat16 ones are raised to 22).
        precision: "float32", or "float16" or "bfloat16": mixed, with norms and whatever would
            overflow on the prompts' real activations left in float32.
        prompts: prompts for measuring parity.
        size: height and width in pixels to export and compare at; the pipeline's own when None.
        lora: low-rank weights to export with.
        allow: keep an export that is outside its parity bounds and record the waiver.
        overwrite: replace an artifact that is there.
        on_progress: called with (done, of how many), see `Stages`.
        on_stage: called with (name, number from 1, stages) when a stage begins.

    Returns:
        The record that is also in the directory as artifact.json.

    Raises:
        UsageError: not a checkpoint, out_dir is taken, opset out of range.
        ExportError: weights are missing or not finite, an operator has no ONNX form, or the export
            differs from its source.
    """
    if not 18 <= opset <= MAX_OPSET:
        raise UsageError(f"opset must be 18 to {MAX_OPSET}, got {opset}")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", hint=f"one of {', '.join(PRECISIONS)}")
    check_prompts(prompts)
    started, clock = datetime.now(UTC), time.monotonic()
    check_destination(out_dir, overwrite=overwrite)
    runtime = _runtime_for(precision)
    total = 5 if precision == "float32" else 6
    stages = Stages(total, on_stage=on_stage, on_progress=on_progress)
    stages.begin("watching the pipeline")
    source = load_source(checkpoint, size=size, lora=lora)
    texts = own_prompts(source.traits, prompts)
    check_writable(Path(out_dir).parent, need_bytes=2 * source.bytes_total)
    components = find_components(
        source.pipeline,
        size=both_sides(source.size),
        traits=source.traits,
        on_progress=stages.count,
    )
    with atomic_directory(out_dir) as root:
        wide = root if precision == "float32" else root / ".float32"
        stages.begin("writing graphs")
        for done, component in enumerate(components):
            stages.count(done, len(components))
            write_component(source.pipeline, component, wide / component.name, opset=opset)
        carry_parts(source, root)
        stages.begin("drawing with the source")
        calls = catch_calls(source, components, texts)
        conversion = {}
        if wide != root:
            stages.begin(f"converting to {precision}")
            conversion = _narrow(wide, root, components, calls, precision)
            shutil.rmtree(wide)
        graphs = {c.name: open_graph(root / c.name / GRAPH, runtime) for c in components}
        checks, error_by_noise = prove(
            source, root, components, graphs, calls, BOUNDS[precision], texts, stages
        )
        waiver = require_parity(checks, allow=allow)
        described = describe_components(root, components, precision=precision)
        record = ArtifactRecord(
            format="onnx",
            precision=precision,
            runtime=runtime,
            error=waiver,
            seeds={"parity": PARITY_SEED},
            started_at=started,
            parity=checks,
            error_by_noise=error_by_noise,
            conversion=conversion,
            duration_s=time.monotonic() - clock,
            **about_source(checkpoint, source, lora),
            **about_files(root, described),
        )
        record.write(root / RECORD)
    stages.end()
    return record


def _narrow(
    wide: Path, root: Path, components: Sequence[Component], calls: Calls, precision: str
) -> dict[str, Any]:
    """Convert every graph; return what stays in float32 and why, by component."""
    from modelops.export.onnx.precision import convert_precision

    reports = {}
    for component in components:
        folder = root / component.name
        folder.mkdir()
        reports[component.name] = convert_precision(
            wide / component.name / GRAPH, folder / GRAPH, precision,  # type: ignore[arg-type]
            feeds=calls.feeds[component.name],
        ).record()  # fmt: skip
        for name in (SIGNATURE, "config.json"):
            shutil.copyfile(wide / component.name / name, folder / name)
    return reports


def _runtime_for(precision: str) -> RuntimeName:
    """Return the runtime for comparing graphs of a precision.

    Raises:
        UsageError: no installed runtime runs them.
    """
    from modelops.export.runtimes.precision import supported_precisions

    names = [name for name in available_runtimes() if precision in supported_precisions(name)]
    if not names:
        raise UsageError(
            f"no runtime here runs {precision} graphs, so they cannot be compared",
            hint='pip install "modelops[demo]" brings OpenVINO',
        )
    return names[0] if precision == "float32" else names[-1]


def write_component(pipeline: Any, component: Component, folder: Path, *, opset: int) -> None:
    """Write model.onnx, signature.json and config.json; the same weights give the same bytes.

    Axes that are constants of the network become constants of the graph, and so do those along
    which the graph does not give the network's answers.

    Raises:
        ExportError: an operator has no ONNX form, or the graph is right for one batch alone.
    """
    example, outputs = component.example, component.outputs
    for _ in range(4):
        try:
            write_graph(component.flat, example, folder / GRAPH, opset=opset, outputs=outputs)
            fixed = _wrong_axes(component, example, folder / GRAPH)
            if not fixed:
                break
        except FixedAxesError as error:
            fixed = set(error.axes)
            if not fixed & _axes_of(example):
                raise
        if BATCH in fixed:
            raise ExportError(f"{component.name} cannot be exported: its batch cannot vary")
        example = {name: (t, _without(axes, fixed)) for name, (t, axes) in example.items()}
        outputs = {name: _without(axes, fixed) for name, axes in outputs.items()}
    write_json(folder / SIGNATURE, component.signature.model_dump(mode="json"))
    write_json(folder / "config.json", config_of(getattr(pipeline, component.attribute)))


def _wrong_axes(component: Component, example: Example, path: Path) -> set[str]:
    """Return the axes of calls that the graph does not answer as the network does."""
    left = {part for axis in _axes_of(example) for part in axis.split("_")}
    varied = [(axis, tensors) for axis, tensors in component.varied if axis in left]
    if not varied:
        return set()
    wrong = set()
    graph = OrtGraph(path, provider="cpu")
    for axis, tensors in varied:
        feed = {name: t.numpy() for name, t in component.signature.cast(tensors).items()}
        try:
            found, expected = graph.run_all(feed), component.run(feed)
        except ModelopsError:
            wrong.add(axis)
            continue
        pairs = zip(found, expected, strict=True)
        if any(a.shape != b.shape or _is_far(a, b) for a, b in pairs):
            wrong.add(axis)
    return {axis for axis in _axes_of(example) if wrong & set(axis.split("_"))}


def _is_far(found: Array, expected: Array) -> bool:
    distance = np.linalg.norm((found - expected).astype(np.float64))
    return bool(not distance <= _FAR * np.linalg.norm(expected.astype(np.float64)))


def _axes_of(example: Example) -> set[str]:
    return {axis for _, axes in example.values() for axis in axes.values()}


def _without(axes: Mapping[int, str], names: set[str]) -> dict[int, str]:
    return {index: axis for index, axis in axes.items() if axis not in names}
