"""Speed of three denoisers in every runtime here, interleaved in one run, beside issue 4's goals.

    python bench/bench_runtimes.py
    python bench/bench_runtimes.py --only pilot --checkpoint CHECKPOINT --rounds 30

Eager torch, torch.compile, onnxruntime fp32, OpenVINO fp32 and bf16, and INT8: our symmetric graph
in OpenVINO (what is not INT8 in fp32 or bf16) and the one made for onnxruntime's CPU kernels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from denoisers import NAMES, Denoiser, make_denoiser
from modelops.base.environment import current_environment
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs.graph import Graph, available_runtimes, process_cores
from modelops.export.int8.qdq import quantize_graph
from modelops.export.int8.ranges import Calibration
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.precision import openvino_has_bfloat16
from modelops.export.runtimes.probe import relative_errors
from modelops.export.timing import interleaved_seconds, speed_ratio
from modelops.records.base import Measurement

EAGER, ORT = "torch eager", "onnxruntime fp32"
PRODUCT, SIDE = "matrix product", 2048  # what this processor does at best in fp32
ROUNDS = {"pilot": 20, "unet": 6, "transformer": 6}
CALIBRATION_ROWS = {"pilot": 64, "unet": 24, "transformer": 24}
HELD_OUT_ROWS = 8


@dataclass(frozen=True)
class Goal:
    """A ratio of the issue and what was measured."""

    text: str
    bound: float
    value: float
    low: float
    high: float
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Met by the whole interval, by the figure alone, or not."""
        figure, worst = (self.value, self.high) if self.at_most else (-self.value, -self.low)
        bound = self.bound if self.at_most else -self.bound
        if figure > bound:
            return "NOT MET"
        return "met" if worst <= bound else "met, but the interval reaches past it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NAMES, action="append", help="may be repeated")
    parser.add_argument("--checkpoint", type=Path, help="the pilot's; random weights without it")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=process_cores())
    parser.add_argument("--method", default="minmax", choices=["minmax", "percentile", "entropy"])
    parser.add_argument("--keep-fp32", nargs="*", default=[], metavar="GROUP")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = current_environment()
    print(f"{machine.cpu}, {machine.cores} cores, {options.threads} threads")
    results = []
    for name in options.only or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(make_denoiser(name, options.checkpoint), Path(folder), options)
        show(result)
        results.append(result)
    if options.json:
        for result in results:
            result["goals"] = [vars(goal) | {"verdict": goal.verdict} for goal in result["goals"]]
        text = json.dumps({"machine": machine.model_dump(), "denoisers": results}, indent=1)
        options.json.write_text(text + "\n")


def measure(denoiser: Denoiser, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export, quantise, time and compare one denoiser."""
    rounds = options.rounds or ROUNDS[denoiser.name]
    held_out = denoiser.make_rows(HELD_OUT_ROWS, 1)
    fp32 = denoiser.write_onnx(folder / "fp32" / "model.onnx")
    notes: list[str] = []
    int8 = quantized(denoiser, fp32, folder, options, notes)
    sizes = {name: graph_bytes(path) for name, path in {"fp32": fp32, **int8}.items()}
    runs: dict[str, Callable[[dict[str, Any]], Any]] = {EAGER: denoiser.torch}
    if not options.no_compile:
        runs["torch.compile"] = denoiser.compiled()
    runs |= {name: graph.run for name, graph in open_all(fp32, int8, options.threads).items()}
    compile_s = 0.0
    table: list[dict[str, Any]] = []
    for batch in options.batch_sizes:
        feed = held_out.take(np.arange(batch) * 5 % len(held_out))
        if "torch.compile" in runs:
            started = time.perf_counter()
            try:
                runs["torch.compile"](feed)
            except Exception as error:  # a compiler that is missing or fails; the rest stands
                reason = str(error).strip().splitlines()[0][:200]
                notes.append(f"torch.compile is left out from batch {batch} on: {reason}")
                del runs["torch.compile"]
            compile_s += time.perf_counter() - started
        bound = {name: partial(run, feed) for name, run in runs.items()}
        square = torch.ones(SIDE, SIDE)
        bound[PRODUCT] = partial(torch.matmul, square, square)
        seconds = interleaved_seconds(bound, rounds=rounds, warmup=1)
        table += [row(seconds, name, batch, denoiser.name) for name in runs]
        notes.append(ceiling(denoiser, feed, seconds))
    if compile_s:
        notes.append(f"torch.compile compiled for {compile_s:.0f} s, outside the timing")
    reference = [denoiser.torch(held_out.take([index])) for index in range(len(held_out))]
    errors = {name: error_of(run, held_out, reference) for name, run in runs.items()}
    for line in table:
        line["relative_error"] = errors.get(line["runtime"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = error_of(denoiser.torch, held_out, reference)
    notes.append(f"torch's own bf16 (autocast) is off by {own:.1e}")
    return {
        "name": denoiser.name, "about": denoiser.about, "parameters": denoiser.weight_bytes // 4,
        "rounds": rounds, "sizes": sizes, "rows": table, "notes": notes,
        "goals": goals(denoiser.name, table, sizes),
    }  # fmt: skip


def ceiling(denoiser: Denoiser, feed: dict[str, Any], seconds: dict[str, list[float]]) -> str:
    """How fast a runtime would be that did nothing but the network's products and convolutions
    (directly), at the rate of a large product of matrices."""
    rate = 2e-9 * SIDE**3 / float(np.median(seconds[PRODUCT]))
    with FlopCounterMode(display=False) as counter:
        denoiser.torch(feed)
    work = counter.get_total_flops() / 1e9
    eager = float(np.median(seconds[EAGER]))
    return (
        f"batch {len(feed['timestep'])}: {work:.0f} GFlop, {rate:.0f} GFlop/s in a product of "
        f"{SIDE}: fp32 can be {eager * rate / work:.2f} times eager torch, which does "
        f"{work / eager:.0f} GFlop/s"
    )


def quantized(
    denoiser: Denoiser, fp32: Path, folder: Path, options: argparse.Namespace, notes: list[str]
) -> dict[str, Path]:
    """The INT8 graphs by scheme; one that cannot be made is a note."""
    rows = denoiser.make_rows(CALIBRATION_ROWS[denoiser.name], 0)
    paths = {}
    for scheme in ("sym", "ort-cpu"):
        path = folder / scheme / "model.onnx"
        path.parent.mkdir()
        try:
            quantize_graph(
                fp32, path, Calibration(rows, folder / "ranges.json", options.method),
                keep_fp32=options.keep_fp32, scheme=scheme,
            )  # fmt: skip
        except Exception as error:
            notes.append(f"no {scheme} graph: {type(error).__name__}: {error}")
            continue
        paths[scheme] = path
    return paths


def open_all(fp32: Path, int8: dict[str, Path], threads: int) -> dict[str, Graph]:
    """Every runtime here with every graph that is meant for it."""
    graphs = {ORT: open_graph(fp32, "onnxruntime", threads=threads)}
    if "ort-cpu" in int8:
        graphs["onnxruntime int8"] = open_graph(int8["ort-cpu"], "onnxruntime", threads=threads)
    if "openvino" not in available_runtimes():
        return graphs
    kinds = {"float32": "fp32", "bfloat16": "bf16"} if openvino_has_bfloat16() else {
        "float32": "fp32"
    }  # fmt: skip
    for precision, short in kinds.items():
        graphs[f"OpenVINO {short}"] = open_graph(
            fp32, "openvino", precision=precision, threads=threads
        )
        if "sym" in int8:
            graphs[f"OpenVINO int8, rest {short}"] = open_graph(
                int8["sym"], "openvino", precision=precision, threads=threads
            )
    return graphs


def graph_bytes(path: Path) -> int:
    """Of a graph with its external data."""
    return sum(file.stat().st_size for file in path.parent.iterdir())


def error_of(run: Callable[..., Any], rows: TrajectoryRows, reference: list[Any]) -> float:
    """Relative error against eager torch, root mean square over held-out rows."""
    errors = [
        relative_errors(expected, run(rows.take([index])))
        for index, expected in enumerate(reference)
    ]
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def row(seconds: dict[str, list[float]], name: str, batch: int, network: str) -> dict[str, Any]:
    protocol = {"batch": batch, "network": network, "what": "one evaluation"}
    eager, ort = (
        speed_ratio(seconds, of=name, over=over, protocol=protocol) for over in (EAGER, ORT)
    )
    return {
        "runtime": name, "batch": batch, "ms": float(np.median(seconds[name]) * 1e3),
        "over_torch_eager": interval(eager), "over_onnxruntime_fp32": interval(ort),
    }  # fmt: skip


def interval(ratio: Measurement) -> list[float]:
    return [float(value) for value in (ratio.value, ratio.low, ratio.high) if value is not None]


def goals(network: str, table: list[dict[str, Any]], sizes: dict[str, int]) -> list[Goal]:
    """Issue 4's bounds for this network, those of batch sizes that were measured."""
    found: list[Goal] = []

    def best(batch: int, over: str, *, int8: bool) -> list[float] | None:
        kept = [
            line[over] for line in table
            if line["batch"] == batch and ("int8" in line["runtime"]) == int8
            and not line["runtime"].startswith("torch")
        ]  # fmt: skip
        return max(kept) if kept else None

    def add(text: str, bound: float, figures: list[float] | None) -> None:
        if figures is not None:
            value, low, high = figures
            found.append(Goal(text, bound, value, low, high))

    for batch in sorted({line["batch"] for line in table}):
        ort = next(r for r in table if r["runtime"] == ORT and r["batch"] == batch)
        add(f"onnxruntime fp32 over eager torch, batch {batch}", 1.25, ort["over_torch_eager"])
        over_ort = best(batch, "over_onnxruntime_fp32", int8=True)
        if batch == 1:
            add("best INT8 over onnxruntime fp32, batch 1", 1.5, over_ort)
        if batch == 8:
            wide = best(8, "over_onnxruntime_fp32", int8=False)
            add("best 16/32-bit over onnxruntime fp32, batch 8", 1.9, wide)
            bound = 1.5 if network == "transformer" else 2.2
            add("best INT8 over onnxruntime fp32, batch 8", bound, over_ort)
            if network != "transformer":
                over_eager = best(8, "over_torch_eager", int8=True)
                add("best INT8 over eager torch, batch 8", 3.0, over_eager)
    for scheme in ("sym", "ort-cpu"):
        if scheme in sizes:
            share = sizes[scheme] / sizes["fp32"]
            text = f"size of the {scheme} graph over fp32"
            found.append(Goal(text, 0.30, share, share, share, at_most=True))
    return found


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['name']}: {result['about']}, {result['parameters'] / 1e6:.1f} M parameters, "
          f"{result['rounds']} rounds")  # fmt: skip
    print(f"{'':26}{'batch':>6}{'ms':>9}  {'x eager torch':>20}  {'x onnxruntime':>20}  rel. error")
    for line in result["rows"]:
        ratios = [
            "{:.2f} ({:.2f}-{:.2f})".format(*line[key])
            for key in ("over_torch_eager", "over_onnxruntime_fp32")
        ]
        error = "" if line["relative_error"] is None else f"{line['relative_error']:.1e}"
        print(f"{line['runtime']:26}{line['batch']:6}{line['ms']:9.1f}  {ratios[0]:>20}  "
              f"{ratios[1]:>20}  {error}")  # fmt: skip
    for goal in result["goals"]:
        sign = "<=" if goal.at_most else ">="
        print(f"  {goal.text}: {goal.value:.2f} (goal {sign} {goal.bound}): {goal.verdict}")
    for note in result["notes"]:
        print(f"  {note}")


if __name__ == "__main__":
    main()
