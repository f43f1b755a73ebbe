"""Ranges of a graph's tensors, measured on calibration rows with bounded memory.

One table serves every quantised variant of a graph: symmetric int8 takes the larger bound's
magnitude, asymmetric uint8 both bounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelops.base.errors import ExportError
from modelops.base.files import read_json, sha256_file, sha256_json, write_json
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs.external import EXTERNAL_BYTES, data_path, load_graph
from modelops.export.graphs.graph import Array, process_cores

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy")
PERCENTILE = 99.999  # of the magnitudes
_BINS = 2048  # of the magnitudes
_LEVELS = 128  # of int8's magnitudes
_MEMORY_BYTES = 512 * 2**20  # tensors that are looked at in one go
_BATCH = 8
_SAMPLES = 2**20  # values of a tensor that enter its histogram, of every run
Feed = dict[str, Array]
Visitor = Callable[[str, Array], None]


@dataclass(frozen=True)
class Range:
    """Range of a tensor's values that quantisation keeps, low <= 0 <= high."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        return max(-self.low, self.high)


@dataclass(frozen=True)
class Calibration:
    """Source of the ranges of a graph's tensors.

    Attributes:
        rows: inputs that the graph is run on.
        table: file of the ranges (JSON); read if it exists, else measured and written.
        method: finds a range in the values seen.
    """

    rows: TrajectoryRows
    table: Path
    method: Method = "minmax"

    def ranges(self, source: Path, tensors: Sequence[str]) -> dict[str, Range]:
        """Return the ranges of these tensors of a graph.

        Raises:
            ExportError: the table is of another graph or method, or a tensor is not finite.
        """
        digest = _digest(source)
        if self.table.exists():
            record = read_json(self.table)
            if record.get("graph_sha256") != digest or record.get("method") != self.method:
                raise ExportError(
                    f"{self.table}: the calibration of another graph or method than {source}, "
                    f"{self.method}",
                    hint="remove it, or give another path",
                )
            ranges = {name: Range(*bounds) for name, bounds in record["tensors"].items()}
            missing = sorted(set(tensors) - set(ranges))
            if missing:
                raise ExportError(f"{self.table}: has no range of {missing[0]}", hint="remove it")
            return ranges
        feeds = self.rows.batches(min(_BATCH, len(self.rows)))
        ranges = measure_ranges(source, tensors, feeds, self.method)
        write_json(
            self.table,
            {
                "schema_version": 1,
                "graph_sha256": digest,
                "method": self.method,
                "rows": sum(_rows(feed) for feed in feeds),
                "tensors": {name: [item.low, item.high] for name, item in sorted(ranges.items())},
            },
        )
        return ranges


def measure_ranges(
    source: Path, tensors: Sequence[str], feeds: Sequence[Feed], method: Method = "minmax"
) -> dict[str, Range]:
    """Measure the ranges of tensors (with the graph's inputs) over all rows of the feeds.

    Args:
        source: model.onnx, float32.
        tensors: names.
        feeds: batches; their rows may be split to keep memory below 512 MiB of looked-at tensors.
        method: "minmax"; "percentile" clips magnitudes at the 99.999th; "entropy" clips where the
            Kullback-Leibler divergence of the int8 histogram is least (Migacz, GTC 2017).

    Of a Softmax's output every method uses only the largest value: it has a value for each pair of
    tokens, and clipping would cut off attention.

    Raises:
        ExportError: a tensor has a value that is not finite.
    """
    lows, highs = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)

    def bounds(name: str, array: Array) -> None:
        low, high = float(array.min()), float(array.max())
        if not np.isfinite(low + high):
            raise ExportError(f"{source}: {name} is not finite on a calibration row")
        lows[name], highs[name] = min(lows[name], low), max(highs[name], high)

    visit_tensors(source, tensors, feeds, bounds)
    tops = {name: max(-lows[name], highs[name]) for name in tensors}
    if method != "minmax":
        counts = {name: np.zeros(_BINS, np.int64) for name in tensors}

        def count(name: str, array: Array) -> None:
            if tops[name] > 0 and array.ndim:
                flat = array.reshape(-1)
                flat = np.abs(flat[:: max(1, flat.size // _SAMPLES)])
                bins = (flat * np.float32(_BINS / tops[name])).astype(np.int64)
                counts[name] += np.bincount(np.minimum(bins, _BINS - 1), minlength=_BINS)

        visit_tensors(source, tensors, feeds, count)
        clip = percentile_bin if method == "percentile" else entropy_bin
        tops = {name: top * clip(counts[name]) / _BINS for name, top in tops.items()}
    return {name: Range(max(lows[name], -top), min(highs[name], top)) for name, top in tops.items()}


def percentile_bin(counts: Array, percentile: float = PERCENTILE) -> int:
    """Count the bins of a histogram of magnitudes that hold `percentile` of the values; at least
    one.
    """
    total = int(counts.sum())
    if not total:
        return len(counts)
    return int(np.searchsorted(np.cumsum(counts), total * percentile / 100.0)) + 1


def entropy_bin(counts: Array, levels: int = _LEVELS) -> int:
    """Count the bins of a histogram of magnitudes to keep, by least divergence.

    For each cut, the reference P is the kept histogram with everything beyond in its last bin, Q
    the kept histogram rounded to `levels` and spread evenly over the bins that had values.
    """
    total = float(counts.sum())
    if not total:
        return len(counts)
    best, best_cut = np.inf, len(counts)
    for cut in range(levels, len(counts) + 1, levels // 8):
        kept = counts[:cut].astype(np.float64)
        reference = kept.copy()
        reference[-1] += counts[cut:].sum()
        level = np.arange(cut) * levels // cut
        filled = kept > 0
        sums = np.bincount(level, weights=kept, minlength=levels)
        sizes = np.bincount(level, weights=filled, minlength=levels)
        spread = np.where(filled, (sums / np.maximum(sizes, 1.0))[level], 0.0)
        mass = spread.sum()
        if not mass:
            continue
        p, q = reference / total, spread / mass
        # Mass in P where Q has none would be infinite: Q gets a small share there.
        used = p > 0
        divergence = float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-9))))
        if divergence < best - 1e-12:
            best, best_cut = divergence, cut
    return best_cut


def visit_tensors(
    source: Path, tensors: Sequence[str], feeds: Sequence[Feed], visit: Visitor
) -> None:
    """Call `visit(name, array)` with each tensor on each run; arrays live for one run.

    A run has as many rows as keep the tensors within 512 MiB (at least one). A Softmax's output is
    replaced by its largest value, an array without axes.
    """
    inner = [name for name in tensors if not any(name in feed for feed in feeds[:1])]
    with tempfile.TemporaryDirectory() as folder:
        session, outputs = _tapped_session(source, inner, Path(folder)) if inner else (None, [])
        rowed = _row_inputs(session, feeds[0]) if session is not None and feeds else set()
        rows_per_run = 0
        for feed in feeds:
            for name in tensors:
                if name in feed:
                    visit(name, feed[name])
            if session is None:
                continue
            count = _rows(feed)
            if not rows_per_run:  # one row says how large the tensors are
                arrays = session.run(outputs, _take(feed, rowed, 0, 1))
                size = sum(array.nbytes for array in arrays)
                rows_per_run = max(1, min(count, _MEMORY_BYTES // max(1, size)))
            for start in range(0, count, rows_per_run):
                arrays = session.run(outputs, _take(feed, rowed, start, start + rows_per_run))
                for name, array in zip(inner, arrays, strict=True):
                    visit(name, array)


def _tapped_session(source: Path, tensors: Sequence[str], folder: Path) -> tuple[Any, list[str]]:
    """Open a session; return it with the output that represents each tensor."""
    import onnx
    import onnxruntime

    model = load_graph(source)
    present = {value.name for value in model.graph.output}
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    outputs = []
    for name in tensors:
        if name not in makers:
            raise ExportError(f"{source}: has no tensor {name}")
        tapped = name
        if makers[name] == "Softmax":
            tapped = f"{name}_largest"
            model.graph.node.append(
                onnx.helper.make_node("ReduceMax", [name], [tapped], name=tapped, keepdims=0)
            )
        if tapped not in present:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tapped))
        outputs.append(tapped)
    path = folder / "tapped.onnx"
    outside = model.ByteSize() > EXTERNAL_BYTES
    onnx.save(model, str(path), save_as_external_data=outside, location=data_path(path).name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = process_cores()
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(str(path), options, providers=providers), outputs


def _digest(source: Path) -> str:
    files = [path for path in (source, data_path(source)) if path.is_file()]
    return sha256_json([sha256_file(path) for path in files])


def _rows(feed: Mapping[str, Array]) -> int:
    return len(next(iter(feed.values())))


def _row_inputs(session: Any, feed: Feed) -> set[str]:
    """Return inputs with the batch axis first: that of the first input in a feed. Others, such as
    positions, are passed whole."""
    first = {item.name: item.shape[0] for item in session.get_inputs() if item.shape}
    batch = first.get(next(iter(feed)))
    return {name for name, axis in first.items() if axis == batch}


def _take(feed: Feed, rowed: Collection[str], start: int, stop: int) -> Feed:
    return {name: array[start:stop] if name in rowed else array for name, array in feed.items()}
