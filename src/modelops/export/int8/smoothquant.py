"""SmoothQuant with shifts, which move rounding problems from activations to weights and biases.

A transformer's activations have a few channels that are far larger than the rest, and one scale for
the tensor must hold them. Dividing channel j of X by s_j and multiplying row j of W by it leaves
X W as it was and both easier to round: s_j = max|X_j|^a / max|W_j|^(1-a) (Xiao et al. 2022,
arXiv:2211.10438).

Symmetric INT8 also wastes half of its levels on a channel with one sign, such as behind a GELU.
Subtracting the middle c_j of a channel's range and adding c W to the bias does not change X W + b
and halves the range at best (Wei et al. 2023, arXiv:2304.09145).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.errors import ExportError
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs.external import load_graph, load_structure, remove_graph, save_graph
from modelops.export.graphs.graph import Array, RuntimeName
from modelops.export.int8.groups import (
    MAX_GROUPS,
    group_nodes,
    included_nodes,
    role_of_group,
    weighted_nodes,
)
from modelops.export.int8.qdq import QdqWriter
from modelops.export.int8.ranges import Calibration, Feed, Method, visit_tensors
from modelops.export.int8.rewrite import LinearEditor, one_row_tensors
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.probe import relative_errors

ALPHAS = (0.35, 0.5, 0.65, 0.8)
_DEFAULT_ALPHA = 0.5  # the paper's
_TRIAL_ROWS = 32
SMOOTHED_ROLES = ("attention_qkv", "attention_out", "feed_forward", "layers", "conv_out")
_FLOOR = 1e-5  # of maxima, as in the paper's code: a silent channel is not scaled
_LEAST_SHIFT = 0.05  # share of a tensor's range that a shift must take off it


@dataclass(frozen=True)
class Channels:
    """Values of each channel (last axis) of a tensor, float32 [channels]."""

    low: Array
    high: Array

    @property
    def middle(self) -> Array:
        """Value that a shift subtracts."""
        result: Array = (self.low + self.high) / np.float32(2.0)
        return result

    def largest(self, shift: Array) -> Array:
        """Largest magnitude after the shift."""
        result: Array = np.maximum(self.high - shift, shift - self.low)
        return result


@dataclass(frozen=True)
class SmoothedTensors:
    """Numbers of activations that `smooth_graph` changed.

    Attributes:
        tensors: all of them.
        folded: those that needed no node on all rows.
        shifted: those from which the middle is subtracted, too.
    """

    tensors: int = 0
    folded: int = 0
    shifted: int = 0


@dataclass
class Smoothing:
    """Smoothing that was tried, and the one that is kept.

    Attributes:
        alpha: the alpha that is kept, or None if nothing lowered the error.
        error_before: relative error (root mean square over held-out rows) without smoothing.
        errors: {alpha: error with it}.
        counts: of the smoothing that is kept.
    """

    alpha: float | None = None
    error_before: float = 0.0
    errors: dict[float, float] = field(default_factory=dict)
    counts: SmoothedTensors = SmoothedTensors()

    def as_record(self) -> dict[str, Any]:
        """Return the result as JSON values for artifact.json."""
        return {
            "alpha": self.alpha,
            "error_before": self.error_before,
            "errors": {f"{alpha:g}": error for alpha, error in self.errors.items()},
            **asdict(self.counts),
        }


def channel_bounds(
    source: Path, tensors: Sequence[str], feeds: Sequence[Feed]
) -> dict[str, Channels]:
    """Measure least and largest value of each channel of tensors, over all rows of the feeds."""
    found: dict[str, Channels] = {}

    def widen(name: str, array: Array) -> None:
        values = array.reshape(-1, array.shape[-1])
        low, high = values.min(axis=0), values.max(axis=0)
        if name in found:
            low, high = np.minimum(low, found[name].low), np.maximum(high, found[name].high)
        found[name] = Channels(low, high)

    visit_tensors(source, tensors, feeds, widen)
    return found


def smoothing_scales(activations: Array, weights: Array, alpha: float) -> Array:
    """Compute s_j of each channel, float32 [channels].

    Args:
        activations: max|X_j| [channels], not negative.
        weights: max|W_j| [channels], over all consumers of X.
        alpha: in [0, 1]; how much of the difficulty moves into the weights.
    """
    x = np.maximum(activations.astype(np.float64), _FLOOR)
    w = np.maximum(weights.astype(np.float64), _FLOOR)
    scales = np.clip(x**alpha / w ** (1.0 - alpha), _FLOOR, 1.0 / _FLOOR)
    scales[activations <= _FLOOR] = 1.0
    result: Array = scales.astype(np.float32)
    return result


def smoothable_tensors(source: Path, groups: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return {activation: names of the MatMul and Gemm nodes that would share its scales}.

    Args:
        source: fp32 model.onnx.
        groups: only nodes of these groups; else those of attention, feed-forward and unknown roles.
    """
    targets = _targets(load_structure(source), groups)
    return {name: [node.name for node in nodes] for name, nodes in targets.items()}


def smooth_graph(
    source: Path,
    target: Path,
    bounds: dict[str, Channels],
    *,
    alpha: float = 0.5,
    shift: bool = True,
) -> SmoothedTensors:
    """Write an fp32 graph that computes the same with smoothed activations.

    Factor and shift go into the scale and bias of a LayerNormalization before it, if nothing else
    reads its output. They go into the factor and the summand of an adaptive norm, if those are one
    row for each image. Otherwise they become a Mul and an Add that all consumers share. A tensor
    whose range a shift reduces by less than a twentieth is not shifted.

    Args:
        source: fp32 model.onnx.
        target: where the smoothed one goes; same inputs, outputs and node names.
        bounds: `channel_bounds` of the tensors to smooth (keys of `smoothable_tensors`).
        alpha: see `smoothing_scales`.
        shift: whether the middle of each channel is subtracted.

    Raises:
        ExportError: alpha outside [0, 1], or a bound is not finite.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ExportError(f"alpha must be in [0, 1], got {alpha}")
    model = load_graph(source)
    editor = LinearEditor(model, one_row_tensors(load_structure(source)))
    folded = smoothed = shifted = 0
    for tensor, nodes in _targets(model, None, names=set(bounds)).items():
        channels = bounds[tensor]
        if not np.isfinite(channels.low + channels.high).all():
            raise ExportError(f"{source}: {tensor} is not finite on a calibration row")
        weights = np.max([editor.row_maxima(node) for node in nodes], axis=0)

        def scaled(offset: Array, channels: Channels = channels, w: Array = weights) -> Any:
            scales = smoothing_scales(channels.largest(offset), w, alpha)
            return scales, float((channels.largest(offset) / scales).max())

        middle = np.zeros_like(channels.low)
        scales, reach = scaled(middle)
        if shift and all(editor.takes_bias(node) for node in nodes):
            closer, shorter = scaled(channels.middle)
            if shorter <= (1.0 - _LEAST_SHIFT) * reach:
                middle, scales = channels.middle, closer
                shifted += 1
                for node in nodes:
                    editor.add_product_to_bias(node, middle)
        for node in nodes:
            editor.scale_rows(node, scales)
        smoothed += 1
        folded += editor.transform(tensor, nodes, middle, scales)
    editor.finish()
    save_graph(model, target)
    return SmoothedTensors(smoothed, folded, shifted)


def choose_smoothing(
    source: Path,
    target: Path,
    folder: Path,
    *,
    rows: TrajectoryRows,
    held_out: TrajectoryRows,
    method: Method = "minmax",
    alphas: Sequence[float] = ALPHAS,
    keep_fp32: Collection[str] = (),
    runtime: RuntimeName = "onnxruntime",
    least_gain: float = 0.02,
    on_step: Callable[[], None] = lambda: None,
) -> Smoothing:
    """Smooth if that makes the quantised graph better on rows that calibration did not see.

    Args:
        source: fp32 model.onnx.
        target: the smoothed fp32 graph, written only if one is kept.
        folder: for graphs that are tried.
        rows: calibration inputs; candidates are calibrated on 32 of them, evenly spread.
        held_out: rows the error is measured on.
        method: how ranges are taken.
        alphas: from the one nearest to 0.5 on, neighbours are tried while the error falls.
        keep_fp32: groups that are not quantised in the comparison.
        runtime: that runs the candidates.
        least_gain: share of the error that must go for smoothing to be kept.
        on_step: called before every candidate.

    Returns:
        What was measured; `alpha` None if the graph stays as it is.
    """
    result = Smoothing()
    targets = smoothable_tensors(source)
    few = rows.subset(rows.spread(min(_TRIAL_ROWS, len(rows))))
    feeds = held_out.batches(min(8, len(held_out)))
    expected = [open_graph(source, "onnxruntime").run(feed) for feed in feeds]

    def error_of(graph: Path, name: str) -> float:
        on_step()
        writer = QdqWriter(graph)
        ranges = writer.ranges(Calibration(few, folder / f"{name}.json", method))
        path = folder / f"{name}.int8.onnx"
        writer.write(path, ranges, included_nodes(writer.groups(), keep_fp32))
        running = open_graph(path, runtime)
        errors = [relative_errors(e, running.run(f)) for e, f in zip(expected, feeds, strict=True)]
        remove_graph(path)
        return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))

    result.error_before = error_of(source, "unsmoothed")
    if not targets:
        return result
    bounds = channel_bounds(source, list(targets), rows.batches(min(8, len(rows))))
    counts: dict[float, SmoothedTensors] = {}

    def error_with(alpha: float) -> float:
        if alpha not in result.errors:
            candidate = folder / f"alpha-{alpha:g}.onnx"
            counts[alpha] = smooth_graph(source, candidate, bounds, alpha=alpha)
            result.errors[alpha] = error_of(candidate, candidate.stem)
            remove_graph(candidate)
        return result.errors[alpha]

    best = _descend(sorted(set(alphas)), error_with)
    if result.errors[best] <= result.error_before * (1.0 - least_gain):
        result.alpha, result.counts = best, counts[best]
        smooth_graph(source, target, bounds, alpha=best)
    return result


def _descend(alphas: Sequence[float], error_with: Callable[[float], float]) -> float:
    """Find the alpha with the least error among its neighbours."""
    at = min(range(len(alphas)), key=lambda i: abs(alphas[i] - _DEFAULT_ALPHA))
    for step in (1, -1):
        while 0 <= at + step < len(alphas):
            if error_with(alphas[at + step]) >= error_with(alphas[at]):
                break
            at += step
    error_with(alphas[at])
    return alphas[at]


def _targets(
    model: Any, groups: Collection[str] | None, names: Collection[str] | None = None
) -> dict[str, list[Any]]:
    """Return {activation: MatMul and Gemm nodes that read it and have a matrix of weights}."""
    grouped = group_nodes(model, max_groups=MAX_GROUPS)
    group_by_node = {node: group for group, members in grouped.items() for node in members}
    matrices = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    found: dict[str, list[Any]] = {}
    for node in weighted_nodes(model):
        if node.input[1] not in matrices or any(a.name == "transA" and a.i for a in node.attribute):
            continue
        group = group_by_node[node.name]
        wanted = group in groups if groups is not None else role_of_group(group) in SMOOTHED_ROLES
        if wanted and (names is None or node.input[0] in names):
            found.setdefault(node.input[0], []).append(node)
    return found
