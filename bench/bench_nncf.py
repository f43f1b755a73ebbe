"""Our INT8 beside NNCF's of the same network: in OpenVINO, with the same hint, rows and threads.

    python bench/bench_nncf.py
    python bench/bench_nncf.py --only pilot --checkpoint CHECKPOINT --nncf-python PYTHON

Ours runs as modelops serves it, with timesteps in fp32 (`keep_sinusoids_in_float32`), NNCF's as
OpenVINO does; with bf16 NNCF's error is also given with timesteps in fp32, which is what the
verdict on errors goes by. Where ours is slower, a table says which layers take the time:
precision and milliseconds of each.
NNCF is in bench/requirements.txt; it may live in an interpreter of its own (--nncf-python).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from denoisers import NAMES, Denoiser, make_denoiser
from modelops.base.environment import current_environment
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs.graph import process_cores
from modelops.export.int8.options import ERROR_BUDGET
from modelops.export.int8.qdq import quantize_graph
from modelops.export.int8.ranges import Calibration
from modelops.export.int8.search import search_groups
from modelops.export.int8.sensitivity import scan_groups
from modelops.export.int8.smoothquant import Smoothing, choose_smoothing, smoothable_tensors
from modelops.export.int8.variants import Variants
from modelops.export.runtimes.precision import default_precision, openvino_has_bfloat16
from modelops.export.runtimes.probe import relative_errors
from modelops.export.runtimes.sinusoids import keep_sinusoids_in_float32
from modelops.export.timing import interleaved_seconds, speed_ratio

ROUNDS = {"pilot": 30, "unet": 8, "transformer": 8}
CALIBRATION_ROWS = {"pilot": 64, "unet": 24, "transformer": 24}
HINTS = {"float32": "f32", "bfloat16": "bf16"}
WORKER = Path(__file__).with_name("nncf_quantize.py")
# Where one layer is named in both graphs its time is compared; what stands between layers is
# compared by kind.
LAYERS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution", "ScaledDotProduct")


class Compiled:
    """A graph (ONNX or IR) in OpenVINO, compiled for a feed's shapes."""

    def __init__(
        self, path: Path, feed: dict[str, Any], *, hint: str, threads: int, sines: bool,
        profile: bool = False,
    ) -> None:  # fmt: skip
        core = openvino.Core()
        model = core.read_model(path)
        model.reshape({name: list(array.shape) for name, array in feed.items()})
        if sines and hint != "f32":
            keep_sinusoids_in_float32(core, model)
        options = {
            "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": profile,
        }  # fmt: skip
        self.compiled = core.compile_model(model, "CPU", options)
        self.request = self.compiled.create_infer_request()

    def run(self, feed: dict[str, Any]) -> Any:
        self.request.infer(feed, share_inputs=True)
        return self.request.get_output_tensor(0).data.copy()

    def layers(self, feed: dict[str, Any], runs: int) -> dict[str, tuple[str, str, float]]:
        """Node to (kind, implementation, median milliseconds) over some runs."""
        self.run(feed)
        times: dict[str, list[float]] = defaultdict(list)
        about = {}
        for _ in range(runs):
            self.run(feed)
            for item in self.request.get_profiling_info():
                times[item.node_name].append(item.real_time.total_seconds() * 1e3)
                about[item.node_name] = (item.node_type, item.exec_type)
        median = {name: float(np.median(values)) for name, values in times.items()}
        return {name: (*about[name], median[name]) for name in about if median[name] > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NAMES, action="append", help="may be repeated")
    parser.add_argument("--checkpoint", type=Path, help="the pilot's; random weights without it")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=process_cores())
    parser.add_argument("--method", default="minmax", choices=["minmax", "percentile", "entropy"])
    parser.add_argument("--keep-fp32", nargs="*", default=[], metavar="GROUP")
    parser.add_argument(
        "--search", type=float, default=0.0, metavar="SECONDS",
        help="leave in float what `modelops export` would, found in so long; 0: all is INT8",
    )  # fmt: skip
    parser.add_argument("--smooth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--nncf-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--layers", type=int, default=15, help="lines of a layer table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    machine = current_environment()
    print(f"{machine.cpu}, {machine.cores} cores, {options.threads} threads")
    results = []
    for name in options.only or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            results += measure(make_denoiser(name, options.checkpoint), Path(folder), options)
    if options.json:
        text = json.dumps({"machine": machine.model_dump(), "comparisons": results}, indent=1)
        options.json.write_text(text + "\n")


def measure(denoiser: Denoiser, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantise both ways from the same rows; time and compare at every batch size and hint."""
    rows = denoiser.make_rows(CALIBRATION_ROWS[denoiser.name], 0)
    held_out = denoiser.make_rows(8, 1)
    fp32 = denoiser.write_onnx(folder / "fp32" / "model.onnx")
    ours, theirs = folder / "ours.onnx", folder / "theirs.xml"
    smoothed = folder / "smoothed.onnx"
    smoothing = Smoothing()
    if options.smooth and smoothable_tensors(fp32):
        smoothing = choose_smoothing(
            fp32, smoothed, folder, rows=rows, held_out=denoiser.make_rows(8, 2),
            method=options.method, keep_fp32=options.keep_fp32,
        )  # fmt: skip
    source = fp32 if smoothing.alpha is None else smoothed
    calibration = Calibration(rows, folder / "ranges.json", options.method)
    keep = list(options.keep_fp32)
    if options.search:
        keep += searched(source, folder, calibration, denoiser.make_rows(32, 3), options.search)
    quantize_graph(source, ours, calibration, keep_fp32=keep)
    version = quantize_with_nncf(denoiser, fp32, rows.feeds, theirs, options.nncf_python)
    print(f"\n{denoiser.name}: {denoiser.about}; {version}, {len(rows)} calibration rows")
    print(f"  smoothing: {smoothing.as_record()}")
    print(f"  not in INT8: {', '.join(keep) or 'nothing'}")
    paths = {"ours": ours, "nncf": theirs}
    singles = [held_out.take([index]) for index in range(len(held_out))]
    results = []
    for precision in ["float32", "bfloat16"] if openvino_has_bfloat16() else ["float32"]:
        compile_for = partial(Compiled, hint=HINTS[precision], threads=options.threads)
        errors = {}
        for name, path, sines in (
            ("ours", ours, True), ("nncf", theirs, False), ("nncf_with_sines", theirs, True),
        ):  # fmt: skip
            graph = compile_for(path, singles[0], sines=sines)
            off = [relative_errors(denoiser.torch(feed), graph.run(feed)) for feed in singles]
            errors[name] = float(np.sqrt(np.mean(np.concatenate(off) ** 2)))
        for batch in options.batch_sizes:
            feed = held_out.take(np.arange(batch) * 5 % len(held_out))
            graphs = {
                name: compile_for(path, feed, sines=name == "ours") for name, path in paths.items()
            }
            seconds = interleaved_seconds(
                {name: partial(graph.run, feed) for name, graph in graphs.items()},
                rounds=options.rounds or ROUNDS[denoiser.name],
            )
            protocol = {"batch": batch, "network": denoiser.name, "rest": precision}
            ratio = speed_ratio(seconds, of="ours", over="nncf", protocol=protocol)
            result = {
                "network": denoiser.name, "rest": precision, "batch": batch, "keep_fp32": keep,
                "ours_ms": float(np.median(seconds["ours"]) * 1e3),
                "nncf_ms": float(np.median(seconds["nncf"]) * 1e3),
                "speed_over_nncf": [ratio.value, ratio.low, ratio.high],
                **{f"{name}_error": value for name, value in errors.items()},
                "layers": [],
            }  # fmt: skip
            print_result(result)
            if (ratio.value or 0.0) < 1.0:
                profiled = {
                    name: compile_for(
                        path, feed, sines=name == "ours", profile=True
                    ).layers(feed, runs=10)
                    for name, path in paths.items()
                }  # fmt: skip
                result["layers"] = compare_layers(profiled["ours"], profiled["nncf"])
                print_layers(result["layers"], options.layers)
            results.append(result)
    return results


def searched(
    source: Path, folder: Path, calibration: Calibration, held_out: TrajectoryRows, seconds: float
) -> list[str]:
    """The groups that the search leaves out of INT8 at its least budget."""
    variants = Variants(
        source, folder, calibration, held_out=held_out, runtime="openvino",
        precision=default_precision("int8", "openvino"),
    )  # fmt: skip
    variants.limit_rows(seconds / (2 * len(variants.groups)))
    scan = scan_groups(variants, time_limit_s=seconds)
    alone = {group: row["error"] for group, row in scan["groups"].items()}
    found = search_groups(variants, budget=ERROR_BUDGET, time_limit_s=seconds, alone=alone)
    for row in found.as_record()["table"]:
        print(
            f"  {row['group']:28} {row['decision']} error {row['error']:.4f} ms {row['ms_saved']}"
        )
    return found.keep_fp32


def quantize_with_nncf(
    denoiser: Denoiser, fp32: Path, feeds: dict[str, Any], out: Path, python: str
) -> str:
    """Write NNCF's IR; returns its version."""
    np.savez(out.with_suffix(".npz"), **feeds)
    command = [python, str(WORKER), str(fp32), str(out.with_suffix(".npz")), str(out)]
    if denoiser.name == "transformer":
        command.append("--transformer")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"NNCF failed in {python}:\n{done.stderr[-2000:]}\n"
            "pip install --no-deps -r bench/requirements.txt, or name its interpreter with "
            "--nncf-python"
        )
    return done.stdout.strip().splitlines()[-1]


def compare_layers(
    ours: dict[str, tuple[str, str, float]], theirs: dict[str, tuple[str, str, float]]
) -> list[dict[str, Any]]:
    """Layers by name and the rest by kind, with the most time that ours takes longer first."""
    sums: dict[str, dict[str, Any]] = {}
    total = sum(item[2] for item in ours.values())
    for side, profile in (("ours", ours), ("nncf", theirs)):
        for name, (kind, implementation, milliseconds) in profile.items():
            own = kind.startswith(LAYERS) and name in ours and name in theirs
            line = sums.setdefault(name if own else f"all other {kind}", {
                "ours": "", "nncf": "", "ours_ms": 0.0, "nncf_ms": 0.0,
            })  # fmt: skip
            line[f"{side}_ms"] += milliseconds
            line[side] = implementation if own else ""
    lines = [{"layer": name, **line} for name, line in sums.items()]
    for line in lines:
        line["share_of_ours"] = line["ours_ms"] / total
    return sorted(lines, key=lambda line: line["nncf_ms"] - line["ours_ms"])


def print_result(result: dict[str, Any]) -> None:
    value, low, high = result["speed_over_nncf"]
    error = result["ours_error"] / result["nncf_with_sines_error"]
    met = "met" if value >= 1.0 and error <= 1.0 else "NOT MET"
    print(
        f"  rest {result['rest']:9} batch {result['batch']}: ours {result['ours_ms']:.1f} ms, NNCF "
        f"{result['nncf_ms']:.1f} ms: {value:.2f} ({low:.2f} to {high:.2f}) times as fast; error "
        f"{result['ours_error']:.4f} and {result['nncf_error']:.4f} (timesteps in fp32: "
        f"{result['nncf_with_sines_error']:.4f}), ratio {error:.2f} "
        f"(goals >= 1.0 and <= 1.0): {met}"
    )


def print_layers(lines: list[dict[str, Any]], limit: int) -> None:
    print(f"    {'layer':52}{'ours ms':>9}{'NNCF ms':>9}{'share':>7}  ours / NNCF")
    for line in lines[:limit]:
        print(f"    {line['layer'][-52:]:52}{line['ours_ms']:9.3f}{line['nncf_ms']:9.3f}"
              f"{line['share_of_ours']:7.1%}  {line['ours']} / {line['nncf']}")  # fmt: skip


if __name__ == "__main__":
    main()
