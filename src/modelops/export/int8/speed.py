"""How fast a quantised denoiser is beside everything that could run in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from modelops.export.calibration import TrajectoryRows
from modelops.export.components import Component
from modelops.export.graphs.graph import Graph, available_runtimes
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.precision import openvino_has_bfloat16
from modelops.export.timing import interleaved_seconds, speed_ratio
from modelops.records.base import Measurement

SPEED_BATCHES = (1, 8)
_LIMIT_S = 180.0  # for a batch size, after which there are fewer rounds


def measure_speed(
    int8: Graph, fp32_graph: Path, denoiser: Component, rows: TrajectoryRows, *, rounds: int
) -> dict[str, Measurement]:
    """Denoiser latency of INT8 against fp32 in every runtime, bf16, and eager torch.

    Args:
        int8: the quantised graph as it will be served.
        fp32_graph: the fp32 model.onnx.
        denoiser: the torch network.
        rows: real inputs.
        rounds: interleaved calls of each; fewer, but five at least, of networks so large that they
            would take more than three minutes.

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
