"""fp32 artifact to INT8 artifact: calibrated on trajectories, searched, compared, proven, timed."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelops.errors import ExportError, IntegrityError, UsageError
from modelops.export.artifact import (
    GRAPH,
    RECORD,
    check_destination,
    describe_graph,
    portable_path,
    verify_artifact,
)
from modelops.export.calibration import (
    DEFAULT_PROMPTS,
    TrajectoryRows,
    check_prompts,
    collect_rows,
)
from modelops.export.components import Component
from modelops.export.exporting import (
    OnProgress,
    OnStage,
    Stages,
    about_files,
    about_source,
    carry_parts,
)
from modelops.export.int8.gates import require_budget, require_faster
from modelops.export.int8.lint import lint_qdq
from modelops.export.int8.proof import onnxruntime_execution, openvino_execution, unproven_layers
from modelops.export.int8.quantize import quantize_graph
from modelops.export.int8.ranges import METHODS, Calibration, Method
from modelops.export.int8.search import Decision, SearchResult, search_groups
from modelops.export.int8.sensitivity import plot_sensitivity, scan_groups
from modelops.export.int8.smoothquant import choose_smoothing, smoothable_tensors
from modelops.export.int8.speed import measure_speed
from modelops.export.int8.variants import Variants, root_mean_square
from modelops.export.onnx.storage import store_rest_in_half
from modelops.export.parity import (
    BOUNDS,
    PARITY_STEPS,
    component_parity,
    errors_by_noise,
    image_parity,
    require_parity,
)
from modelops.export.runtime import (
    ORT_CPU_GRAPH,
    assemble,
    default_precision,
    denoiser_of,
    graph_file,
)
from modelops.export.runtimes.choice import write_probe
from modelops.export.runtimes.graphs import Graph, RuntimeName, available_runtimes, open_graph
from modelops.export.runtimes.openvino import OpenVinoGraph
from modelops.export.source import (
    ExportSource,
    both_sides,
    component_from,
    load_source,
    lora_of,
    size_of,
)
from modelops.files import atomic_directory, check_writable, sha256_path, write_bytes
from modelops.records import ArtifactRecord, ExportedComponent, InputRef, Measurement, ParityCheck

TABLE = "calibration.json"
PLOT = "sensitivity.png"
ERROR_BUDGET = 0.06  # relative error of an output that INT8 may come to, unless the rest is worse
_FLOOR_MARGIN = 1.5
_N_PARITY_IMAGES = 8


@dataclass(frozen=True)
class Int8Options:
    """How a denoiser is quantised.

    Attributes:
        method: how a tensor's range is taken from the values seen: minmax, percentile, entropy.
        steps: of a calibration trajectory.
        rows: denoiser rows to calibrate with.
        error_budget: relative error allowed (root mean square over held-out rows); when None,
            ERROR_BUDGET, or 1.5 times what the serving precision rounds without INT8.
        search_seconds: for measuring groups of layers; a scan by noise level takes as long at most.
            Where it is short for a large network, groups' errors are measured on fewer rows (eight
            at least) and times on fewer rows and rounds (one and five).
        smooth: try SmoothQuant and shifts on transformers.
        ort_cpu: try a graph for onnxruntime's CPU provider; when None, where OpenVINO is missing.
        speed_rounds: rounds of the timing; 0 leaves it out, which only `allow` lets pass.
    """

    method: Method = "minmax"
    steps: int = 16
    rows: int = 128
    error_budget: float | None = None
    search_seconds: float = 300.0
    smooth: bool = True
    ort_cpu: bool | None = None
    speed_rounds: int = 15

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"unknown method {self.method!r}", hint=f"choose one of {', '.join(METHODS)}"
            )
        if self.steps < 1 or self.rows < 8:
            raise UsageError(
                f"steps must be at least 1 and rows at least 8, got {self.steps} and {self.rows}"
            )
        if self.error_budget is not None and not 0 < self.error_budget < 1:
            raise UsageError(f"the error budget must be between 0 and 1, got {self.error_budget}")


def export_int8(
    onnx_dir: str | Path,
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    seed: int = 0,
    options: Int8Options | None = None,
    allow: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> ArtifactRecord:
    """Quantise the denoiser of an fp32 artifact to symmetric INT8 (S8S8 QDQ).

    The set of quantised groups of layers is searched: fastest within an error budget. If outputs or
    pictures are still too far off on rows and noise that the search did not see, more groups are
    given up, those with most error first. Everything but the denoiser stays as it is.

    Args:
        onnx_dir: what `export_onnx` made of the same checkpoint in float32.
        checkpoint: its trajectories calibrate, and its pictures are the reference.
        out_dir: the artifact's directory.
        prompts: calibrated with; parity uses the same prompts with other noise.
        seed: of the calibration noise and of the choice of rows.
        options: how; Int8Options() when not given.
        allow: keep an export that is outside its bounds or not faster, and record the waiver.
        overwrite: replace an artifact that is there.
        on_progress: called with (done, of how many), see `Stages`.
        on_stage: called with (name, number from 1, stages) when a stage begins.

    Returns:
        The record that is also in the directory as artifact.json.

    Raises:
        UsageError: onnx_dir is not an fp32 artifact, out_dir is taken, no prompts.
        IntegrityError: onnx_dir is damaged or was made from another checkpoint.
        ExportError: a broken QDQ rule, no INT8 in the runtime, outputs or pictures too far off, an
            error above its budget, or a graph that is not surely faster than the fp32 one.
        ModelopsError: not enough disk, here or among the temporary files.
    """
    texts = check_prompts(prompts)
    options = options or Int8Options()
    stages = Stages(8, on_stage=on_stage, on_progress=on_progress)
    started, clock = datetime.now(UTC), time.monotonic()
    check_destination(out_dir, overwrite=overwrite)
    fp32, fp32_sha256 = verify_artifact(onnx_dir)
    if fp32.format != "onnx" or fp32.precision != "float32":
        raise UsageError(
            f"{onnx_dir}: a {fp32.precision} {fp32.format} artifact",
            hint="name the float32 onnx artifact",
        )
    lora = lora_of(fp32)
    stages.begin("opening")
    source = load_source(checkpoint, size=both_sides(size_of(fp32)), lora=lora)
    if fp32.inputs["checkpoint"].sha256 != source.sha256:
        raise IntegrityError(
            f"{onnx_dir}: was not exported from {checkpoint}", hint="export it to onnx again"
        )
    check_writable(Path(out_dir).parent, need_bytes=2 * fp32.bytes_total)
    # Candidates and the smoothed graph; what they take is only known while they are written.
    check_writable(tempfile.gettempdir(), need_bytes=3 * denoiser_of(fp32).bytes)
    with atomic_directory(out_dir) as root, tempfile.TemporaryDirectory() as scratch:
        job = _Job(source, Path(onnx_dir), root, Path(scratch), fp32, texts, seed, options)
        job.carry()
        stages.begin("calibrating")
        job.calibrate(stages.count)
        stages.begin("smoothing")
        smoothing = job.smooth()
        stages.begin("measuring what rounding each group changes")
        scan = job.scan(stages.count)
        stages.begin("searching the groups to quantise")
        search = job.search(scan, stages.count)
        stages.begin("quantising and comparing")
        keep, checks = job.quantise_within_bounds(search)
        ort_cpu = job.try_ort_cpu(keep)
        if ort_cpu and ort_cpu["kept"]:  # what onnxruntime will run is what is compared in it
            checks = [check for check in checks if not check.name.endswith("/onnxruntime")]
            checks += job.compare("onnxruntime")
        error = job.error_of_choice(search, keep)
        waived = [
            require_parity(checks, allow=allow),
            require_budget(error, search, allow=allow),
        ]
        stages.begin("proving that INT8 runs")
        execution = job.prove()
        stages.begin("measuring speed")
        speed = job.measure_speed()
        waived.append(require_faster(speed, search.table, allow=allow))
        denoiser = job.denoiser
        write_probe(job.folder, denoiser, job.final)
        components = [
            _describe(root, item, precision="int8" if item.name == denoiser.name else "float32")
            for item in fp32.components
        ]
        record = ArtifactRecord(
            format="int8",
            precision=f"int8+{job.graph().precision}",
            runtime=job.runtime,
            error="; ".join(text for text in waived if text) or None,
            seeds={"calibration": seed, "search": seed + 1, "parity": seed + 2},
            started_at=started,
            parity=checks,
            error_by_noise=errors_by_noise(denoiser, job.graph(), job.final),
            calibration={
                "method": options.method,
                **job.calibration.rows.record,
                "table": InputRef(path=TABLE, sha256=sha256_path(root / TABLE)).model_dump(),
                "keep_fp32": keep,
                "error": error,
                "smoothing": smoothing,
                "search": search.as_record(),
                "sensitivity": scan,
                "ort_cpu": ort_cpu,
            },
            execution=execution,
            speed=speed,
            duration_s=time.monotonic() - clock,
            **{**about_source(checkpoint, source, lora), "source_bytes_total": fp32.bytes_total},
            **about_files(root, components),
        )
        record.inputs["onnx"] = InputRef(path=portable_path(onnx_dir), sha256=fp32_sha256)
        record.write(root / RECORD)
    stages.end()
    return record


class _Job:
    """One export: where everything lies, and what the stages hand on to each other."""

    calibration: Calibration
    held_out: TrajectoryRows  # choose by
    final: TrajectoryRows  # judge by

    def __init__(
        self,
        source: ExportSource,
        origin: Path,
        root: Path,
        scratch: Path,
        fp32: ArtifactRecord,
        prompts: Sequence[str],
        seed: int,
        options: Int8Options,
    ) -> None:
        self.source, self.origin, self.root, self.scratch = source, origin, root, scratch
        self.fp32, self.prompts, self.seed, self.options = fp32, prompts, seed, options
        exported = denoiser_of(fp32)
        self.denoiser: Component = component_from(source.pipeline, origin / exported.name, exported)
        self.folder = root / exported.name
        self.fp32_graph = origin / exported.file
        self.wide = self.fp32_graph  # what is quantised: the fp32 graph, or its smoothed equal
        self.runtime: RuntimeName = (
            "openvino" if "openvino" in available_runtimes() else "onnxruntime"
        )

    def carry(self) -> None:
        """Copy everything but the denoiser's graph."""
        carry_parts(self.source, self.root)
        for item in self.fp32.components:
            target = self.root / item.name
            if item.name != self.denoiser.name:
                shutil.copytree(self.origin / item.name, target)
                continue
            target.mkdir()
            for path in (self.origin / item.name).iterdir():
                if path.suffix == ".json":
                    shutil.copyfile(path, target / path.name)

    def calibrate(self, on_progress: OnProgress) -> None:
        """Catch rows to calibrate with, to choose by and to judge by."""
        options = self.options

        def rows(seed: int, purpose: str, steps: int, count: int) -> TrajectoryRows:
            texts = self.prompts if purpose == "calibration" else self.prompts[:8]
            return collect_rows(
                self.source.pipeline, self.denoiser, prompts=texts, seed=seed, purpose=purpose,
                steps=steps, rows=count, size=self.source.size,
            )  # fmt: skip

        on_progress(0, 3)
        self.calibration = Calibration(
            rows(self.seed, "calibration", options.steps, options.rows),
            self.root / TABLE,
            options.method,
        )
        on_progress(1, 3)
        self.held_out = rows(self.seed + 1, "search", 8, 32)
        on_progress(2, 3)
        self.final = rows(self.seed + 2, "parity", 8, 32)

    def smooth(self) -> dict[str, Any] | None:
        """SmoothQuant and shifts, if the network has anything to smooth and it lowers the error."""
        if not self.options.smooth or not smoothable_tensors(self.wide):
            return None
        target = self.scratch / "smoothed.onnx"
        found = choose_smoothing(
            self.wide, target, self.scratch, rows=self.calibration.rows, held_out=self.held_out,
            method=self.options.method,
        )  # fmt: skip
        if found.alpha is not None:
            self.wide = target
        return found.as_record()

    def scan(self, on_progress: OnProgress) -> dict[str, Any]:
        """Where rounding hurts: every group alone in INT8, and a picture of it."""
        precision = default_precision("int8", self.runtime)
        self.variants = Variants(
            self.wide, self.scratch, self.calibration, held_out=self.held_out,
            runtime=self.runtime, precision=precision,
        )  # fmt: skip
        limit = self.options.search_seconds
        if limit:
            self.variants.limit_rows(limit / (2 * len(self.variants.groups)))
        scan = scan_groups(self.variants, time_limit_s=limit, on_step=on_progress)
        if scan["groups"]:  # without time for any there is nothing to see
            write_bytes(self.root / PLOT, plot_sensitivity(scan))
        return scan

    def search(self, scan: dict[str, Any], on_progress: OnProgress) -> SearchResult:
        """The fastest set of groups within the budget."""
        budget = self.options.error_budget
        if budget is None:
            floor = root_mean_square(self.variants.row_errors(self.variants.serve(self.wide)))
            budget = max(ERROR_BUDGET, _FLOOR_MARGIN * floor)
        return search_groups(
            self.variants, budget=budget, time_limit_s=self.options.search_seconds,
            alone={group: row["error"] for group, row in scan["groups"].items()},
            on_step=on_progress,
        )  # fmt: skip

    def quantise_within_bounds(self, search: SearchResult) -> tuple[list[str], list[ParityCheck]]:
        """Write the graph; give up groups until outputs and pictures are within bounds.

        Returns:
            The groups left in fp32 and the last comparisons, some of which may have failed.
        """
        keep = list(search.keep_fp32)
        spare = _give_up_order(search.table)
        while True:
            quantize_graph(self.wide, self.folder / GRAPH, self.calibration, keep_fp32=keep)
            store_rest_in_half(self.folder / GRAPH)
            checks = self.compare(self.runtime)
            if all(check.passed for check in checks) or not spare:
                break
            keep.append(spare.pop(0))
        if self.runtime != "onnxruntime":
            checks += self._images("onnxruntime")
        return keep, checks

    def error_of_choice(self, search: SearchResult, keep: Sequence[str]) -> float:
        """Relative error of what was written, by which the search's budget goes."""
        if list(keep) == search.keep_fp32:
            return search.error
        return root_mean_square(self.variants.row_errors(self.graph()))

    def compare(self, runtime: RuntimeName) -> list[ParityCheck]:
        """The denoiser's outputs and the pictures in a runtime, on rows and noise not seen yet."""
        rows = self.final.batches(min(8, len(self.final)))
        checks = component_parity(self.denoiser, self.graph(runtime), rows, BOUNDS["int8"])
        return checks + self._images(runtime)

    def graph(self, runtime: RuntimeName | None = None) -> Graph:
        """The quantised denoiser as it will be served."""
        runtime = runtime or self.runtime
        path = graph_file(self.root, denoiser_of(self.fp32), runtime)
        return open_graph(path, runtime, precision=default_precision("int8", runtime))

    def prove(self) -> dict[str, Any]:
        """Check the graph's rules, and that the runtime runs its quantised layers in INT8.

        Raises:
            ExportError: a broken rule, or no layer of what the runtime opens runs in INT8.
        """
        path = self.folder / GRAPH
        faults = lint_qdq(path)
        if faults:
            raise ExportError(f"the quantised graph breaks a rule: {faults[0]}")
        graph = self.graph()
        for_ort = graph_file(self.root, denoiser_of(self.fp32), "onnxruntime")
        execution: dict[str, Any] = {"onnxruntime": onnxruntime_execution(for_ort)}
        if isinstance(graph, OpenVinoGraph):
            execution["openvino"] = openvino_execution(graph, self.final.take(range(8)))
        served = execution[self.runtime]
        if not served["int8_layers"]:
            raise ExportError(
                f"{self.runtime} runs no layer of the quantised graph in INT8",
                hint='pip install "modelops[demo]" brings OpenVINO, or try --ort-cpu',
            )
        opened = for_ort if self.runtime == "onnxruntime" else path
        served["quantised_but_float"] = unproven_layers(opened, served)
        return execution

    def try_ort_cpu(self, keep: Sequence[str]) -> dict[str, Any] | None:
        """A graph by onnxruntime's own rules, if it is asked for and earns its place."""
        wanted = self.options.ort_cpu
        if wanted is None:
            wanted = self.runtime == "onnxruntime"
        if not wanted:
            return None
        from modelops.export.int8.ortcpu import judge_ort_cpu

        return judge_ort_cpu(
            self.variants, self.folder / ORT_CPU_GRAPH, self.calibration, keep_fp32=keep,
            error_bound=BOUNDS["int8"].relative,
        )  # fmt: skip

    def measure_speed(self) -> dict[str, Measurement]:
        """Latency of the quantised denoiser beside everything else that runs it here."""
        if not self.options.speed_rounds:
            return {}
        return measure_speed(
            self.graph(), self.fp32_graph, self.denoiser, self.final,
            rounds=self.options.speed_rounds,
        )  # fmt: skip

    def _images(self, runtime: RuntimeName) -> list[ParityCheck]:
        graphs = {
            item.name: open_graph(self.root / item.file, runtime)
            for item in self.fp32.components
            if item.name != self.denoiser.name
        }
        graphs[self.denoiser.name] = self.graph(runtime)
        return image_parity(
            self.source.pipeline, assemble(self.root, graphs), name=f"images/{runtime}",
            prompts=self.prompts[:_N_PARITY_IMAGES], seed=self.seed + 2, bounds=BOUNDS["int8"],
            steps=PARITY_STEPS, size=self.source.size,
        )  # fmt: skip


def _give_up_order(table: Sequence[Decision]) -> list[str]:
    """Groups in INT8, those that add most error first; the last one is not given up."""
    rest = sorted((row for row in table if row.int8), key=lambda row: -row.cost.squared_error)
    return [row.cost.group for row in rest[:-1]]


def _describe(root: Path, item: ExportedComponent, *, precision: str) -> ExportedComponent:
    return describe_graph(root, item.name, precision=precision).model_copy(
        update={"attribute": item.attribute, "role": item.role, "shapes": item.shapes}
    )
