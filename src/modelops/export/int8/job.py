"""Job of one INT8 export: its files, and the values that its stages pass on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelops.base.errors import ExportError
from modelops.base.files import sha256_path, write_bytes
from modelops.base.processor import this_processor
from modelops.export.artifact.directory import GRAPH, ORT_CPU_GRAPH, denoiser_of, graph_file
from modelops.export.artifact.open import assemble
from modelops.export.calibration import TrajectoryRows, collect_rows, parity_prompts
from modelops.export.components import Component
from modelops.export.exporting import OnProgress, carry_parts, carry_probe
from modelops.export.graphs.graph import Graph, RuntimeName, available_runtimes
from modelops.export.int8.accept import (
    measure_speed,
    onnxruntime_execution,
    openvino_execution,
    unproven_layers,
)
from modelops.export.int8.lint import lint_qdq
from modelops.export.int8.options import ERROR_BUDGET, Int8Options
from modelops.export.int8.qdq import quantize_graph
from modelops.export.int8.ranges import Calibration
from modelops.export.int8.saturation import WeightRangeChoice, choose_weight_range
from modelops.export.int8.search import Decision, SearchResult, search_groups
from modelops.export.int8.sensitivity import plot_sensitivity, scan_groups
from modelops.export.int8.smoothquant import choose_smoothing, smoothable_tensors
from modelops.export.int8.variants import Variants, root_mean_square
from modelops.export.onnx.storage import store_rest_in_half
from modelops.export.parity import (
    BOUNDS,
    PARITY_STEPS,
    component_parity,
    errors_by_noise,
    image_parity,
)
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.openvino import OpenVinoGraph
from modelops.export.runtimes.precision import default_precision
from modelops.export.runtimes.probe import (
    PROBE_ROWS,
    Reproduction,
    compare_apart,
    compare_with_probe,
    read_probe,
)
from modelops.export.source import ExportSource, component_from
from modelops.records.base import InputRef, Measurement
from modelops.records.export import ArtifactRecord, ParityCheck, ReproductionCheck

TABLE = "calibration.json"
PLOT = "sensitivity.png"
_FLOOR_MARGIN = 1.5
_N_PARITY_IMAGES = 8


class Int8Job:
    """Job of one export: its files, and the values that its stages pass on. Methods are in the
    order in which they are called."""

    calibration: Calibration
    held_out: TrajectoryRows  # for the choice
    final: TrajectoryRows  # for the final check
    variants: Variants
    found: SearchResult
    error: float  # of what was written, by which the search's budget goes

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

        self.smoothing: dict[str, Any] | None = None
        self.weight_range: WeightRangeChoice | None = None
        self.sensitivity: dict[str, Any] = {}
        self.keep: list[str] = []  # groups that are not INT8
        self.checks: list[ParityCheck] = []
        self.ort_cpu: dict[str, Any] | None = None
        self.execution: dict[str, Any] = {}
        self.reproduced: list[ReproductionCheck] = []
        self.speed: dict[str, Measurement] = {}
        self.noise: list[dict[str, float]] = []

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
        """Catch rows for calibration, for the choice and for the final check."""
        options = self.options

        def rows(seed: int, purpose: str, steps: int, count: int) -> TrajectoryRows:
            texts = (
                self.prompts
                if purpose == "calibration"
                else parity_prompts(self.source.traits, self.prompts, 8)
            )
            return collect_rows(
                self.source.pipeline, self.denoiser, prompts=texts, seed=seed, purpose=purpose,
                steps=steps, rows=count, size=self.source.size, traits=self.source.traits,
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

    def smooth(self) -> None:
        """Apply SmoothQuant and shifts, if there is anything to smooth and the error falls."""
        if not self.options.smooth or not smoothable_tensors(self.wide):
            return
        target = self.scratch / "smoothed.onnx"
        found = choose_smoothing(
            self.wide, target, self.scratch, rows=self.calibration.rows, held_out=self.held_out,
            method=self.options.method,
        )  # fmt: skip
        if found.alpha is not None:
            self.wide = target
        self.smoothing = found.as_record()

    def scan(self, on_progress: OnProgress) -> None:
        """Measure every group alone in INT8 to find where rounding hurts, and plot it."""
        precision = default_precision("int8", self.runtime)
        self.variants = Variants(
            self.wide, self.scratch, self.calibration, held_out=self.held_out,
            runtime=self.runtime, precision=precision,
        )  # fmt: skip
        limit = self.options.search_seconds
        if limit:
            self.variants.limit_rows(limit / (2 * len(self.variants.groups)))
        self.weight_range = choose_weight_range(self.variants, self.options.weight_range)
        self.sensitivity = scan_groups(self.variants, time_limit_s=limit, on_step=on_progress)
        if self.sensitivity["groups"]:  # without time for any there is nothing to see
            write_bytes(self.root / PLOT, plot_sensitivity(self.sensitivity))

    def search(self, on_progress: OnProgress) -> None:
        """Search the fastest set of groups within the budget."""
        budget = self.options.error_budget
        if budget is None:
            floor = root_mean_square(self.variants.row_errors(self.variants.serve(self.wide)))
            budget = max(ERROR_BUDGET, _FLOOR_MARGIN * floor)
        groups = self.sensitivity["groups"].items()
        self.found = search_groups(
            self.variants, budget=budget, time_limit_s=self.options.search_seconds,
            alone={group: row["error"] for group, row in groups},
            on_step=on_progress,
        )  # fmt: skip

    def quantise_within_bounds(self) -> None:
        """Write the graph; give up groups until outputs and images are within bounds.

        `keep` is then the groups left in fp32, `checks` the last comparisons, some of which may
        have failed.
        """
        assert self.weight_range is not None
        self.keep = list(self.found.keep_fp32)
        spare = _give_up_order(self.found.table)
        while True:
            quantize_graph(
                self.wide, self.folder / GRAPH, self.calibration, keep_fp32=self.keep,
                weight_range=self.weight_range.chosen,
            )  # fmt: skip
            store_rest_in_half(self.folder / GRAPH)
            self.checks = self.compare(self.runtime)
            if all(check.passed for check in self.checks) or not spare:
                break
            self.keep.append(spare.pop(0))
        if self.runtime != "onnxruntime":
            self.checks += self._images("onnxruntime")
        self.try_ort_cpu()
        self.error = self.found.error
        if self.keep != self.found.keep_fp32:
            self.error = root_mean_square(self.variants.row_errors(self.graph()))

    def compare(self, runtime: RuntimeName) -> list[ParityCheck]:
        """Compare the denoiser's outputs and the images in a runtime, on new rows and noise."""
        rows = self.final.batches(min(8, len(self.final)))
        checks = component_parity(self.denoiser, self.graph(runtime), rows, BOUNDS["int8"])
        return checks + self._images(runtime)

    def graph(self, runtime: RuntimeName | None = None) -> Graph:
        """Open the quantised denoiser as it will be served."""
        runtime = runtime or self.runtime
        path = graph_file(self.root, denoiser_of(self.fp32), runtime)
        return open_graph(path, runtime, precision=default_precision("int8", runtime))

    def try_ort_cpu(self) -> None:
        """Try a graph by onnxruntime's own rules, if asked for; keep it if it pays."""
        wanted = self.options.ort_cpu
        if wanted is None:
            wanted = self.runtime == "onnxruntime"
        if not wanted:
            return
        from modelops.export.int8.ortcpu import judge_ort_cpu

        self.ort_cpu = judge_ort_cpu(
            self.variants, self.folder / ORT_CPU_GRAPH, self.calibration, keep_fp32=self.keep,
            error_bound=BOUNDS["int8"].relative,
        )  # fmt: skip
        if self.ort_cpu["kept"]:  # what onnxruntime will run is what is compared in it
            self.checks = [c for c in self.checks if not c.name.endswith("/onnxruntime")]
            self.checks += self.compare("onnxruntime")

    def prove(self) -> None:
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
        execution = self.execution
        execution["onnxruntime"] = onnxruntime_execution(for_ort)
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

    def reproduce(self) -> None:
        """Write the probe, whose rows and answers show on any machine whether a runtime gives the
        artifact's numbers. Try it on this processor in every runtime, and in OpenVINO with the
        kernels for AVX2 alone."""
        variant = self.folder / ORT_CPU_GRAPH
        carry_probe(
            self.folder, self.denoiser, self.graph(), self.final, quantised=self.folder / GRAPH,
            variant=variant if variant.exists() else None,
        )  # fmt: skip
        here, probe = this_processor(), read_probe(self.folder)
        for runtime in available_runtimes():
            path = graph_file(self.root, denoiser_of(self.fp32), runtime)
            one = compare_with_probe(probe, self.graph(runtime), file=path.name, quantised=True)
            self.reproduced.append(_as_check(one, here.kind))
            if runtime == "openvino" and "AVX-512" in here.features and not here.limit:
                one = compare_apart(path, runtime, isa="AVX2")
                check = _as_check(one, "x86_64 with AVX2", by="ONEDNN_MAX_CPU_ISA=AVX2")
                self.reproduced.append(check)

    def measure_speed(self) -> None:
        """Measure the latency of the quantised denoiser beside all else that runs it here."""
        if self.options.speed_rounds:
            self.speed = measure_speed(
                self.graph(), self.fp32_graph, self.denoiser, self.final,
                rounds=self.options.speed_rounds,
            )  # fmt: skip

    def measure_noise(self) -> None:
        """Measure the error by noise level."""
        self.noise = errors_by_noise(self.denoiser, self.graph(), self.final)

    def measured(self) -> dict[str, Any]:
        """Return the fields of the artifact's record, as far as the stages have come."""
        table = self.root / TABLE
        calibration: dict[str, Any] = {"method": self.options.method}
        if table.exists():
            digest = InputRef(path=TABLE, sha256=sha256_path(table)).model_dump()
            calibration |= {**self.calibration.rows.record, "table": digest}
        if self.checks:
            calibration |= {"keep_fp32": self.keep, "error": self.error}
        calibration |= {
            "smoothing": self.smoothing,
            "weight_range": self.weight_range and self.weight_range.as_record(),
            "search": self.found.as_record() if hasattr(self, "found") else None,
            "sensitivity": self.sensitivity,
            "ort_cpu": self.ort_cpu,
        }
        rest = default_precision("int8", self.runtime)
        return {
            "precision": f"int8+{rest}", "parity": self.checks, "error_by_noise": self.noise,
            "calibration": calibration, "execution": self.execution,
            "reproduced": self.reproduced, "speed": self.speed,
        }  # fmt: skip

    def _parity_prompts(self, count: int) -> list[str]:
        return parity_prompts(self.source.traits, self.prompts, count)

    def _images(self, runtime: RuntimeName) -> list[ParityCheck]:
        graphs = {
            item.name: open_graph(self.root / item.file, runtime)
            for item in self.fp32.components
            if item.name != self.denoiser.name
        }
        graphs[self.denoiser.name] = self.graph(runtime)
        return image_parity(
            self.source.pipeline, assemble(self.root, graphs), traits=self.source.traits,
            name=f"images/{runtime}", prompts=self._parity_prompts(_N_PARITY_IMAGES),
            seed=self.seed + 2, bounds=BOUNDS["int8"],
            steps=PARITY_STEPS, size=self.source.size,
        )  # fmt: skip


def _as_check(found: Reproduction, processor: str, by: str = "") -> ReproductionCheck:
    return ReproductionCheck(
        processor=processor, **asdict(found), passed=found.passed, n=PROBE_ROWS, imitated_by=by
    )


def _give_up_order(table: Sequence[Decision]) -> list[str]:
    """Return the groups in INT8, those that add most error first; the last one is kept."""
    rest = sorted((row for row in table if row.int8), key=lambda row: -row.cost.squared_error)
    return [row.cost.group for row in rest[:-1]]
