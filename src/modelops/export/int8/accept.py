"""Conditions that INT8 must meet to be kept: it runs in INT8, within its budget, and faster."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modelops.base.errors import ExportError
from modelops.export.calibration import TrajectoryRows
from modelops.export.components import Component
from modelops.export.graphs.external import load_structure
from modelops.export.graphs.graph import Array, Graph, available_runtimes
from modelops.export.int8.search import Decision, SearchResult
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.openvino import OpenVinoGraph
from modelops.export.runtimes.precision import openvino_has_bfloat16
from modelops.export.timing import interleaved_seconds, speed_ratio
from modelops.records.base import Measurement

_ORT_INTEGER = (
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul",
    "DynamicQuantizeMatMul",
)  # fmt: skip
_ORT_FLOAT = ("Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul")
_INTEGER = ("i8", "u8")
_OPENVINO_LAYERS = ("Convolution", "FullyConnected", "MatMul")


def openvino_execution(graph: OpenVinoGraph, feed: dict[str, Array]) -> dict[str, Any]:
    """Return the precisions in which OpenVINO executes the layers that multiply.

    Returns:
        `layers`: {"Convolution i8": count, ...}; `int8_layers`: those whose precision is i8 or u8;
        `layers_total`; `float_layers`: names of layers that run in another precision; `rest`:
        precision of the whole model where it is not INT8 (the compiled model's inference
        precision).
    """
    compiled = graph.compiled({name: array.shape for name, array in feed.items()})
    counts: Counter[str] = Counter()
    floats: list[str] = []
    for operation in compiled.get_runtime_model().get_ops():
        notes = operation.get_rt_info()
        kind = notes["layerType"].astype(str)
        if kind in _OPENVINO_LAYERS:
            precision = notes["runtimePrecision"].astype(str)
            counts[f"{kind} {precision}"] += 1
            if precision not in _INTEGER:
                floats.append(notes["originalLayersNames"].astype(str).partition(",")[0])
    integer = sum(count for name, count in counts.items() if name.split()[-1] in _INTEGER)
    return {
        "layers": dict(sorted(counts.items())),
        "int8_layers": integer,
        "layers_total": sum(counts.values()),
        "float_layers": floats,
        "rest": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
    }


def onnxruntime_execution(path: Path) -> dict[str, Any]:
    """Count integer and float multiplying nodes in the graph that onnxruntime makes of a graph.

    onnxruntime keeps a Conv in INT8 only where its output is quantised too, which TensorRT forbids;
    so a symmetric graph's convolutions run in float32 there.

    Returns:
        `layers`: {"QLinearConv": count, ...}; `int8_layers`; `layers_total`; `float_layers`: names
        of those that run in float.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OrtGraph(path, optimized_path=optimized)
        graph = onnx.load(str(optimized)).graph
    nodes = Counter(node.op_type for node in graph.node)
    layers = {name: nodes[name] for name in (*_ORT_INTEGER, *_ORT_FLOAT) if nodes[name]}
    return {
        "layers": layers,
        "int8_layers": sum(nodes[name] for name in _ORT_INTEGER),
        "layers_total": sum(layers.values()),
        "float_layers": [node.name for node in graph.node if node.op_type in _ORT_FLOAT],
    }


def unproven_layers(path: Path, execution: dict[str, Any]) -> list[str]:
    """Return the layers that are quantised in a graph but that a runtime ran in float.

    Args:
        path: the QDQ graph.
        execution: the result of `openvino_execution` or `onnxruntime_execution`.
    """
    import onnx

    model = load_structure(path)
    constants = {item.name: item.data_type for item in model.graph.initializer}
    weights = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and constants.get(node.input[0]) == onnx.TensorProto.INT8
    }
    quantised = {
        node.name for node in model.graph.node if len(node.input) > 1 and node.input[1] in weights
    }
    return [name for name in execution["float_layers"] if name in quantised]


SPEED_BATCHES = (1, 8)


_LIMIT_S = 180.0  # for a batch size, after which there are fewer rounds


def measure_speed(
    int8: Graph, fp32_graph: Path, denoiser: Component, rows: TrajectoryRows, *, rounds: int
) -> dict[str, Measurement]:
    """Measure the denoiser's latency in INT8 against fp32 in every runtime, bf16, and eager torch.

    Args:
        int8: the quantised graph as it will be served.
        fp32_graph: the fp32 model.onnx.
        denoiser: the torch network.
        rows: real inputs.
        rounds: interleaved calls of each; fewer, but at least five, for large networks that would
            take more than three minutes.

    Returns:
        "denoiser_batchN_over_BASELINE" to how many times as fast INT8 is.
    """
    name = f"{int8.runtime} int8"
    graphs: dict[str, Graph] = {name: int8}
    for runtime in available_runtimes():
        graphs[f"{runtime} fp32"] = open_graph(fp32_graph, runtime)
    if "openvino fp32" in graphs and openvino_has_bfloat16():
        graphs["openvino bf16"] = open_graph(fp32_graph, "openvino", precision="bfloat16")
    results = {}
    for batch in SPEED_BATCHES:
        feed = rows.take([index % len(rows) for index in range(batch)])
        runs: dict[str, Callable[[], object]] = {
            key: partial(graph.run, feed) for key, graph in graphs.items()
        }
        runs["torch eager"] = partial(denoiser.run, feed)
        seconds = interleaved_seconds(runs, rounds=rounds, limit_s=_LIMIT_S)
        shapes = ", ".join("x".join(map(str, feed[key].shape)) for key in denoiser.rows_in[:1])
        protocol = {"batch": batch, "shape": shapes, "rest": int8.precision}
        for key in runs:
            if key != name:
                results[f"denoiser_batch{batch}_over_{key.replace(' ', '_')}"] = speed_ratio(
                    seconds, of=name, over=key, protocol=protocol
                )
    return results


# What INT8 replaces. bf16 is reported beside them: it saves as much work, for other images.
BASELINES = ("onnxruntime_fp32", "openvino_fp32")


_WAY_OUT = "--allow keeps it and records the waiver"


def slower_than(speed: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """Return the fp32 baselines that INT8 was not shown to be faster than, with the ratios.

    At the largest batch the whole 95 % interval must be above 1. At the others it may reach below
    1, but not be below it as a whole.

    Returns:
        "BASELINE at batch N" to how many times as fast INT8 was.
    """
    found = {}
    for batch in SPEED_BATCHES:
        for baseline in BASELINES:
            ratio = speed.get(f"denoiser_batch{batch}_over_{baseline}")
            if ratio is None or ratio.low is None or ratio.high is None:
                continue
            worst = ratio.low if batch == max(SPEED_BATCHES) else ratio.high
            if worst <= 1.0:
                found[f"{baseline} at batch {batch}"] = ratio
    return found


def require_faster(
    speed: Mapping[str, Measurement], table: Sequence[Decision], *, allow: bool
) -> str | None:
    """Refuse INT8 that was not shown to be faster than fp32.

    Args:
        speed: from `measure_speed`; empty where it was not measured.
        table: the search's, for the message.
        allow: keep it all the same.

    Returns:
        What was waived by `allow`, or None.

    Raises:
        ExportError: it is not faster or was not timed, and `allow` is not set; the message ends
            with the table of why.
    """
    slower = slower_than(speed)
    if speed and not slower:
        return None
    listed = ", ".join(
        f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) x {name}"
        for name, ratio in slower.items()
    )
    fault = (
        f"not faster than what it replaces: {listed}" if slower else "its speed was not measured"
    )
    if allow:
        return f"{fault}, kept by --allow"
    raise ExportError(f"INT8 is refused: {fault}{_listed(table)}", hint=_WAY_OUT)


def require_budget(error: float, search: SearchResult, *, allow: bool) -> str | None:
    """Refuse INT8 whose error is above what the search was allowed.

    Args:
        error: relative error of what was written (root mean square over held-out rows).
        search: its budget, table and, where it found no set within the budget, why.
        allow: keep it all the same.

    Returns:
        What was waived by `allow`, or None.

    Raises:
        ExportError: it is above, and `allow` is not set; the message ends with the table of why.
    """
    if error <= search.budget:
        return None
    fault = f"its error {error:.3g} is above the budget of {search.budget:.3g}"
    fault += f" ({search.why})" if search.why else ""
    if allow:
        return f"{fault}, kept by --allow"
    raise ExportError(f"INT8 is refused: {fault}{_listed(search.table)}", hint=_WAY_OUT)


def _listed(table: Sequence[Decision]) -> str:
    """Format a line for each group of layers."""
    rows = [row.as_record() for row in table]
    return "".join(
        f"\n  {row['group']:28} error {row['error']:8.4f}  {_saved(row['ms_saved'])}  "
        f"{row['decision']}  {row['why']}"
        for row in rows
    )


def _saved(milliseconds: float | None) -> str:
    return f"{'not timed':>17}" if milliseconds is None else f"{milliseconds:8.3f} ms saved"
