"""fp32 graph to INT8 graph, and which parts of it are better left in fp32."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modelops.errors import ExportError
from modelops.export.calibration import TrajectoryRows
from modelops.export.int8.groups import KEEP_FP32_GAIN, group_of, node_groups, role_of_group
from modelops.export.int8.qdq import QdqWriter, Scheme
from modelops.export.int8.ranges import METHODS, Method, Range, load_or_measure_ranges
from modelops.export.parity import relative_errors
from modelops.export.runtimes.graphs import available_runtimes, open_graph
from modelops.export.runtimes.onnxruntime import OrtGraph

__all__ = [
    "KEEP_FP32_GAIN",
    "METHODS",
    "Method",
    "Sensitivity",
    "calibrated_ranges",
    "errors_by_sigma",
    "group_of",
    "measure_sensitivity",
    "node_groups",
    "quantize_graph",
]
_CALIBRATION_BATCH = 8


@dataclass
class Sensitivity:
    """What quantising costs.

    Attributes:
        full: relative error of the output (root mean square over rows), all groups INT8.
        without: the same with one more group left in fp32, beside those decided before it.
        gain: share of the squared error that leaving that group in fp32 takes off.
        keep_fp32: the groups that are left in fp32 for it.
        nodes: how many nodes each group has.
    """

    full: float = 0.0
    without: dict[str, float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    keep_fp32: list[str] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)

    @property
    def give_up_order(self) -> list[str]:
        """The groups that are still INT8, the cheap ones first, then by what they bring a node; the
        last group is not given up."""
        open_groups = [group for group in self.nodes if group not in self.keep_fp32]
        cheap = [group for group in _judged_alone(self.nodes) if group in open_groups]
        rest = [group for group in open_groups if group not in cheap]
        rest.sort(key=lambda group: self.gain.get(group, 0.0) / self.nodes[group], reverse=True)
        return [*cheap, *rest][: len(open_groups) - 1]


def calibrated_ranges(
    writer: QdqWriter, rows: TrajectoryRows, table: Path, method: Method = "minmax"
) -> dict[str, Range]:
    """Ranges of every tensor that a quantised variant may ask for; kept in `table` (JSON).

    Raises:
        ExportError: the table is of another graph or method, or a tensor is not finite.
    """
    feeds = rows.batches(min(_CALIBRATION_BATCH, len(rows)))
    return load_or_measure_ranges(
        writer.source, writer.calibrated_tensors(), feeds, table=table, method=method
    )


def quantize_graph(
    source: Path,
    target: Path,
    *,
    rows: TrajectoryRows,
    table: Path,
    method: Method = "minmax",
    keep_fp32: Collection[str] = (),
    scheme: Scheme = "sym",
) -> None:
    """Write a QDQ graph.

    Args:
        source: the fp32 model.onnx.
        target: where the quantised one goes.
        rows: calibration inputs.
        table: ranges of the tensors as JSON; read if it is there, else measured and written.
        method: how a range is taken from the values seen.
        keep_fp32: groups (see `groups.group_of`) that are not quantised.
        scheme: "sym" (S8S8, per-channel weights, float bias, no Q on outputs; for TensorRT and
            OpenVINO) or "ort-cpu" (U8S8, Q on outputs of Conv; for onnxruntime on a CPU).

    Raises:
        ExportError: nothing to quantise, a weight or activation is not finite, or the table is of
            another graph or method.
    """
    writer = QdqWriter(source)
    groups = writer.groups()
    if not groups:
        raise ExportError(f"{source}: no layer with constant weights to quantise")
    ranges = calibrated_ranges(writer, rows, table, method)
    writer.write(target, ranges, included_nodes(groups, keep_fp32), scheme=scheme)


def included_nodes(groups: dict[str, list[str]], keep_fp32: Collection[str]) -> list[str]:
    """Names of the nodes that are not in a group to keep."""
    return [name for group, names in groups.items() if group not in keep_fp32 for name in names]


def measure_sensitivity(
    source: Path,
    folder: Path,
    *,
    rows: TrajectoryRows,
    held_out: TrajectoryRows,
    table: Path,
    method: Method,
    on_step: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Quantise everything, then leave out one group of layers after the other.

    An error is the largest of those in the runtimes installed here, on rows that calibration did
    not see: a graph is only as good as the worst runtime makes it.
    """
    feeds = held_out.batches(min(8, len(held_out)))
    reference = OrtGraph(source)
    expected = [reference.run(feed) for feed in feeds]
    writer = QdqWriter(source)
    groups = writer.groups()
    if not groups:
        raise ExportError(f"{source}: no layer with constant weights to quantise")
    ranges = calibrated_ranges(writer, rows, table, method)

    def error_of(keep: Collection[str]) -> float:
        path = folder / "candidate.onnx"
        writer.write(path, ranges, included_nodes(groups, keep))
        worst = 0.0
        for runtime in available_runtimes():
            graph = open_graph(path, runtime)
            errors = [
                relative_errors(e, graph.run(f)) for e, f in zip(expected, feeds, strict=True)
            ]
            worst = max(worst, float(np.sqrt(np.mean(np.concatenate(errors) ** 2))))
        path.unlink()
        return worst

    result = Sensitivity(full=error_of(()), nodes={name: len(n) for name, n in groups.items()})
    current = result.full
    judged = _judged_alone(result.nodes)
    for group, least in judged.items():
        if len(result.keep_fp32) + 1 == len(groups):
            continue
        on_step()
        without = error_of([*result.keep_fp32, group])
        result.without[group] = without
        result.gain[group] = 1.0 - (without / max(current, 1e-12)) ** 2
        if result.gain[group] >= least:
            result.keep_fp32.append(group)
            current = without
    for group in groups:  # what each of the rest would bring, if the pictures ask for more
        if group not in judged and len(result.keep_fp32) + 1 < len(groups):
            on_step()
            result.without[group] = error_of([*result.keep_fp32, group])
            result.gain[group] = 1.0 - (result.without[group] / max(current, 1e-12)) ** 2
    return result


def errors_by_sigma(source: Path, target: Path, rows: TrajectoryRows) -> list[dict[str, float]]:
    """Relative error of the quantised graph in four bands of noise level, each of equal rows."""
    first, second = OrtGraph(source), OrtGraph(target)
    bands = []
    for part in np.array_split(np.arange(len(rows)), 4):
        feed = rows.take(part)
        errors = relative_errors(first.run(feed), second.run(feed))
        low, high = rows.sigmas[part[0]], rows.sigmas[part[-1]]
        bands.append(
            {
                "sigma_low": float(low),
                "sigma_high": float(high),
                "rms": float(np.sqrt(np.mean(errors**2))),
            }
        )
    return bands


def _judged_alone(groups: Collection[str]) -> dict[str, float]:
    """Groups with a bound of their own, in the order of KEEP_FP32_GAIN, and that bound."""
    judged: dict[str, float] = {}
    for role, least in KEEP_FP32_GAIN.items():
        members = [group for group in groups if role_of_group(group) == role]
        judged.update(dict.fromkeys(members, least / max(1, len(members))))
    return judged
