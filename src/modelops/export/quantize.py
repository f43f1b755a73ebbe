"""fp32 graph to symmetric QDQ graph, and which parts of it are better left in fp32."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelops.errors import ExportError
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs import Array, available_runtimes, open_graph
from modelops.export.onnxruntime import OrtGraph
from modelops.export.parity import relative_errors
from modelops.export.writer import quiet_libraries

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy")
_OPS = ["Conv", "Gemm", "MatMul"]
_CALIBRATION_BATCH = 8

# A group of layers stays fp32 if that takes at least this share off the squared error. In this
# order, each judged with the earlier ones decided. Layers at the edge cost next to nothing in fp32,
# attention's projections more; what is not listed holds almost all of the work.
# "concat_inputs" are convolutions that read a skip connection's Concat. With OpenVINO 2026.4 they
# were off by 0.2 to 0.5 (onnxruntime: 0.01) while the float readers of the Concat also read its
# rounded values, see `_normalise`; a group of their own catches it if that comes back.
KEEP_FP32_GAIN = {
    "concat_inputs": 0.25,
    "conv_in": 0.02,
    "conv_out": 0.02,
    "embeddings": 0.02,
    "attention": 0.25,
}
_BLOCK = re.compile(r"unet\.((?:down_blocks|up_blocks)\.\d+|mid_block)")


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
        cheap = [group for group in KEEP_FP32_GAIN if group in open_groups]
        rest = [group for group in open_groups if group not in cheap]
        rest.sort(key=lambda group: self.gain.get(group, 0.0) / self.nodes[group], reverse=True)
        return [*cheap, *rest][: len(open_groups) - 1]


class _Reader:
    """Feeds for onnxruntime's calibrators, one batch at a time so that memory stays bounded."""

    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self._feeds = feeds
        self._next, self._end = 0, len(feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, Array] | None:
        if self._next >= self._end:
            return None
        self._next += 1
        return self._feeds[self._next - 1]

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Array]:
        feed = self.get_next()
        if feed is None:
            raise StopIteration
        return feed


def group_of(scopes: str) -> str:
    """The group of a node from the `name_scopes` that torch's exporter notes on it."""
    if "'unet.conv_in'" in scopes:
        return "conv_in"
    if "'unet.conv_out'" in scopes:
        return "conv_out"
    if any(part in scopes for part in ("time_embedding", "class_embedding", "time_emb_proj")):
        return "embeddings"
    if ".attentions." in scopes:
        return "attention"
    if "samplers." in scopes:
        return "resampling"
    if "conv_shortcut" in scopes:
        return "shortcuts"
    block = _BLOCK.search(scopes)
    return f"resnets/{block.group(1)}" if block else "resnets"


def node_groups(path: Path) -> dict[str, list[str]]:
    """Group to names of the nodes with constant weights in it; see also `group_of`."""
    import onnx

    model = onnx.load(str(path))
    constants = {item.name for item in model.graph.initializer}
    groups: dict[str, list[str]] = {}
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in _OPS and node.input[1] in constants:
            if producers.get(node.input[0]) == "Concat" and node.op_type == "Conv":
                groups.setdefault("concat_inputs", []).append(node.name)
                continue
            scopes = next(
                (p.value for p in node.metadata_props if p.key.endswith("name_scopes")), ""
            )
            groups.setdefault(group_of(scopes), []).append(node.name)
    if not groups:
        raise ExportError(f"{path}: no layer with constant weights to quantise")
    return groups


def quantize_graph(
    source: Path,
    target: Path,
    *,
    rows: TrajectoryRows,
    table: Path,
    method: Method = "minmax",
    keep_fp32: Collection[str] = (),
) -> None:
    """Write a symmetric S8S8 QDQ graph: per-channel weights, float bias, no Q on outputs.

    Args:
        source: the fp32 model.onnx.
        target: where the quantised one goes.
        rows: calibration inputs.
        table: ranges of the tensors as JSON; read if it is there, else measured and written.
        method: how a range is taken from the values seen.
        keep_fp32: groups (see `group_of`) that are not quantised.

    Raises:
        ExportError: onnxruntime cannot quantise the graph.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(_Reader, CalibrationDataReader):
        """What quantize_static checks for by its base class."""

    included = [
        name
        for group, names in node_groups(source).items()
        if group not in keep_fp32
        for name in names
    ]
    if not included:
        raise ExportError(f"{source}: no layer is left to quantise")
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    feeds = rows.batches(min(_CALIBRATION_BATCH, len(rows)))
    with quiet_libraries():
        try:
            quantize_static(
                str(source),
                str(target),
                Reader(feeds),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_OPS,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=included,  # MatMulConstBOnly alone lets attention's products in
                calibrate_method=methods[method],
                calibration_cache_path=table,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": _OPS,
                    "CalibStridedMinMax": 1,
                },
            )
        except Exception as error:  # onnxruntime raises bare ValueError, RuntimeError and its own
            raise ExportError(
                f"{source}: cannot be quantised: {str(error).splitlines()[0]}"
            ) from error
    _normalise(target, set(included))


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
    groups = node_groups(source)

    def error_of(keep: Collection[str]) -> float:
        path = folder / "candidate.onnx"
        quantize_graph(source, path, rows=rows, table=table, method=method, keep_fp32=keep)
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
    for group, least in KEEP_FP32_GAIN.items():
        if group not in groups or len(result.keep_fp32) + 1 == len(groups):
            continue
        on_step()
        without = error_of([*result.keep_fp32, group])
        result.without[group] = without
        result.gain[group] = 1.0 - (without / max(current, 1e-12)) ** 2
        if result.gain[group] >= least:
            result.keep_fp32.append(group)
            current = without
    for group in groups:  # what each of the rest would bring, if the pictures ask for more
        if group not in KEEP_FP32_GAIN:
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


def _normalise(path: Path, quantized: Collection[str]) -> None:
    """Give float nodes the float tensors back, check the graph, and write it in a stable order.

    onnxruntime's quantiser lets every reader of a quantised tensor read the rounded one: a skip
    connection beside a quantised convolution, say.
    """
    import onnx

    model: Any = onnx.load(str(path))
    del model.metadata_props[:]
    original = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    rounded = {
        node.output[0]: original[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in original
    }
    for node in model.graph.node:
        if node.name not in quantized:
            for index, name in enumerate(node.input):
                if name in rounded:
                    node.input[index] = rounded[name]
    onnx.checker.check_model(model, full_check=True)
    temporary = path.with_suffix(".rewritten")
    temporary.write_bytes(model.SerializeToString(deterministic=True))
    shutil.move(temporary, path)
