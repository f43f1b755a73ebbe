"""fp32 artifact to INT8 artifact: calibrated on trajectories, compared in pictures, timed."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from modelops.environment import current_environment
from modelops.errors import ExportError, IntegrityError, UsageError
from modelops.export.artifact import (
    DENOISER,
    GRAPH,
    RECORD,
    TEXT_ENCODER,
    carry_over,
    check_destination,
    describe_graph,
    other_files,
    portable_path,
    verify_artifact,
)
from modelops.export.calibration import (
    DEFAULT_PROMPTS,
    TrajectoryRows,
    check_prompts,
    collect_rows,
)
from modelops.export.graphs import Graph, RuntimeName, available_runtimes, open_graph
from modelops.export.lint import lint_qdq
from modelops.export.onnx import load_source
from modelops.export.onnxruntime import OrtGraph
from modelops.export.openvino import OpenVinoGraph
from modelops.export.parity import (
    BOUNDS,
    PARITY_STEPS,
    denoiser_parity,
    image_parity,
    require_parity,
    torch_denoiser,
)
from modelops.export.proof import onnxruntime_execution, openvino_execution
from modelops.export.quantize import (
    METHODS,
    Method,
    Sensitivity,
    errors_by_sigma,
    measure_sensitivity,
    quantize_graph,
)
from modelops.export.runtime import assemble, default_precision
from modelops.export.timing import interleaved_seconds, speed_ratio
from modelops.files import atomic_directory, check_writable, sha256_path, tree_files
from modelops.records import ArtifactRecord, InputRef, Measurement, ParityCheck

TABLE = "calibration.json"
SPEED_BATCHES = (1, 8)
_N_PARITY_IMAGES = 8


def export_int8(
    onnx_dir: str | Path,
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    seed: int = 0,
    method: Method = "minmax",
    steps: int = 16,
    rows: int = 128,
    speed_rounds: int = 15,
    allow: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ArtifactRecord:
    """Quantise the denoiser of an fp32 artifact to symmetric INT8 (S8S8 QDQ).

    Every layer with constant weights is quantised, except the groups whose measured error says
    otherwise; if outputs or pictures are still too far off, more groups are given up, cheapest
    first. The text encoder stays in float32.

    Args:
        onnx_dir: what `export_onnx` made of the same checkpoint.
        checkpoint: the checkpoint; its trajectories calibrate, and its pictures are the reference.
        out_dir: the artifact's directory.
        prompts: calibrated with; parity uses the same prompts with other noise.
        seed: of the calibration noise and of the choice of rows.
        method: "minmax", "percentile" or "entropy".
        steps: of a calibration trajectory.
        rows: denoiser rows to calibrate with.
        speed_rounds: rounds of the timing; 0 leaves it out.
        allow: keep an export that is outside its parity bounds and record the waiver.
        overwrite: replace an artifact that is there.
        on_progress: called with (stages done, stages).

    Returns:
        The record that is also in the directory as artifact.json.

    Raises:
        UsageError: onnx_dir is not an fp32 artifact, out_dir is taken, no prompts.
        IntegrityError: onnx_dir is damaged or was made from another checkpoint.
        ExportError: a broken QDQ rule, no INT8 in the runtime, or pictures too far off.
    """
    texts = check_prompts(prompts)
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", hint=f"choose one of {', '.join(METHODS)}")
    if steps < 1 or rows < 8:
        raise UsageError(f"steps must be at least 1 and rows at least 8, got {steps} and {rows}")
    started, clock = datetime.now(UTC), time.monotonic()
    check_destination(out_dir, overwrite=overwrite)
    fp32, fp32_sha256 = verify_artifact(onnx_dir)
    if fp32.format != "onnx":
        raise UsageError(f"{onnx_dir}: a {fp32.format} artifact", hint="name the onnx artifact")
    pipeline, source_sha256 = load_source(checkpoint)
    if fp32.inputs["checkpoint"].sha256 != source_sha256:
        raise IntegrityError(
            f"{onnx_dir}: was not exported from {checkpoint}", hint="export it to onnx again"
        )
    origin = Path(onnx_dir)
    check_writable(Path(out_dir).parent, need_bytes=2 * fp32.bytes_total)
    runtime: RuntimeName = "openvino" if "openvino" in available_runtimes() else "onnxruntime"
    progress = _Progress(on_progress)

    with atomic_directory(out_dir) as root:
        carry_over(origin, root)
        shutil.copytree(origin / TEXT_ENCODER, root / TEXT_ENCODER)
        (root / DENOISER).mkdir()
        shutil.copyfile(origin / DENOISER / "config.json", root / DENOISER / "config.json")
        source, target = origin / DENOISER / GRAPH, root / DENOISER / GRAPH
        names = OrtGraph(source).input_names
        calibration = collect_rows(
            pipeline, names, prompts=texts, seed=seed, steps=steps, rows=rows
        )
        held_out = collect_rows(
            pipeline, names, prompts=texts[:8], seed=seed + 1, purpose="parity", steps=8, rows=32
        )
        progress.step()
        table = root / TABLE
        with tempfile.TemporaryDirectory() as scratch:
            sensitivity = measure_sensitivity(
                source, Path(scratch), rows=calibration, held_out=held_out, table=table,
                method=method, on_step=progress.step,
            )  # fmt: skip
        keep, checks = _quantise_within_bounds(
            root, source, pipeline, calibration, held_out, table, method, sensitivity, runtime,
            prompts=texts[:_N_PARITY_IMAGES], seed=seed + 1,
        )  # fmt: skip
        progress.step()
        faults = lint_qdq(target)
        if faults:
            raise ExportError(f"the quantised graph breaks a rule: {faults[0]}")
        graph = _open(target, runtime)
        if runtime != "onnxruntime":
            checks.append(
                _image_parity(root, pipeline, "onnxruntime", texts[:_N_PARITY_IMAGES], seed + 1)
            )
        waiver = require_parity(checks, allow=allow)
        execution: dict[str, Any] = {"onnxruntime": onnxruntime_execution(target)}
        if isinstance(graph, OpenVinoGraph):
            execution["openvino"] = openvino_execution(graph, held_out.take(range(8)))
        if not execution[runtime]["int8_layers"]:
            raise ExportError(f"{runtime} runs no layer of the quantised graph in INT8")
        progress.step()
        speed = (
            _measure_speed(pipeline.unet, source, target, runtime, held_out, speed_rounds)
            if speed_rounds
            else {}
        )
        components = [
            describe_graph(root, DENOISER, precision="int8"),
            describe_graph(root, TEXT_ENCODER, precision="float32"),
        ]
        record = ArtifactRecord(
            format="int8",
            precision=f"int8+{graph.precision}",
            runtime=runtime,
            error=waiver,
            inputs={
                "checkpoint": InputRef(path=portable_path(checkpoint), sha256=source_sha256),
                "onnx": InputRef(path=portable_path(onnx_dir), sha256=fp32_sha256),
            },
            seeds={"calibration": seed, "parity": seed + 1},
            environment=current_environment(),
            started_at=started,
            components=components,
            parity=checks,
            calibration={
                "method": method,
                **calibration.record,
                "table": InputRef(path=TABLE, sha256=sha256_path(table)).model_dump(),
                "keep_fp32": keep,
                "sensitivity": {
                    "all_int8": sensitivity.full,
                    "without": sensitivity.without,
                    "gain": sensitivity.gain,
                    "nodes": sensitivity.nodes,
                },
                "error_by_sigma": errors_by_sigma(source, target, held_out),
            },
            execution=execution,
            speed=speed,
            files=other_files(root, components),
            bytes_total=sum(path.stat().st_size for path in tree_files(root).values()),
            source_bytes_total=fp32.bytes_total,
            duration_s=time.monotonic() - clock,
        )
        record.write(root / RECORD)
        progress.finish()
    return record


def _quantise_within_bounds(
    root: Path,
    source: Path,
    pipeline: Any,
    calibration: TrajectoryRows,
    held_out: TrajectoryRows,
    table: Path,
    method: Method,
    sensitivity: Sensitivity,
    runtime: RuntimeName,
    *,
    prompts: Sequence[str],
    seed: int,
) -> tuple[list[str], list[ParityCheck]]:
    """Write the quantised graph; give up groups until its outputs and its pictures are within
    bounds.

    Returns the groups left in fp32 and the last comparisons, some of which may have failed.
    """
    keep = list(sensitivity.keep_fp32)
    spare = sensitivity.give_up_order
    spare = spare[: len(sensitivity.nodes) - len(keep) - 1]  # something must remain in INT8
    target = root / DENOISER / GRAPH
    while True:
        quantize_graph(source, target, rows=calibration, table=table, method=method, keep_fp32=keep)
        graph = _open(target, runtime)
        checks = [
            *denoiser_parity(pipeline.unet, graph, held_out, BOUNDS["int8"]),
            _image_parity(root, pipeline, runtime, prompts, seed),
        ]
        if all(check.passed for check in checks) or not spare:
            return keep, checks
        keep.append(spare.pop(0))


def _image_parity(
    root: Path, pipeline: Any, runtime: RuntimeName, prompts: Sequence[str], seed: int
) -> ParityCheck:
    exported = assemble(
        root,
        _open(root / DENOISER / GRAPH, runtime),
        open_graph(root / TEXT_ENCODER / GRAPH, runtime),
    )
    return image_parity(
        pipeline, exported, name=f"images/{runtime}", prompts=prompts, seed=seed,
        bounds=BOUNDS["int8"], steps=PARITY_STEPS,
    )  # fmt: skip


def _open(path: Path, runtime: RuntimeName) -> Graph:
    return open_graph(path, runtime, precision=default_precision("int8", runtime))


def _measure_speed(
    unet: Any,
    source: Path,
    target: Path,
    runtime: RuntimeName,
    rows: TrajectoryRows,
    rounds: int,
) -> dict[str, Measurement]:
    """Denoiser latency of INT8 over fp32 in the same runtime, onnxruntime fp32, eager torch."""
    int8 = _open(target, runtime)
    graphs = {f"{runtime} int8": int8, "onnxruntime fp32": open_graph(source, "onnxruntime")}
    if runtime == "openvino":
        graphs["openvino fp32"] = open_graph(source, "openvino")
    results = {}
    for batch in SPEED_BATCHES:
        feed = rows.take([index % len(rows) for index in range(batch)])
        runs: dict[str, Callable[[], object]] = {
            name: partial(graph.run, feed) for name, graph in graphs.items()
        }
        runs["torch eager"] = partial(torch_denoiser, unet, feed)
        seconds = interleaved_seconds(runs, rounds=rounds)
        protocol = {
            "batch": batch,
            "shape": "x".join(str(size) for size in feed["sample"].shape),
            "rest": int8.precision,
        }
        for name in runs:
            if name != f"{runtime} int8":
                key = f"denoiser_batch{batch}_over_{name.replace(' ', '_')}"
                results[key] = speed_ratio(
                    seconds, of=f"{runtime} int8", over=name, protocol=protocol
                )
    return results


class _Progress:
    """Counts stages; the number of groups is not known before the graph is read."""

    def __init__(self, report: Callable[[int, int], None] | None, total: int = 9) -> None:
        self._report, self._done, self._total = report, 0, total

    def step(self) -> None:
        self._done = min(self._done + 1, self._total - 1)
        if self._report:
            self._report(self._done, self._total)

    def finish(self) -> None:
        if self._report:
            self._report(self._total, self._total)
