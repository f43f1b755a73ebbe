"""Quantised variants of one graph, made, run and compared on held-out rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from modelops.errors import ExportError
from modelops.export.calibration import TrajectoryRows
from modelops.export.int8.groups import MAX_GROUPS, included_nodes
from modelops.export.int8.qdq import QdqWriter, Scheme
from modelops.export.int8.ranges import Calibration, Feed
from modelops.export.onnx.external import remove_graph
from modelops.export.parity import relative_errors
from modelops.export.runtimes.graphs import Array, Graph, RuntimeName, open_graph
from modelops.export.runtimes.onnxruntime import OrtGraph

_BATCH = 8


class Variants:
    """Makes variants of a graph by group and measures their error.

    Args:
        source: fp32 model.onnx.
        folder: where the variant at hand is written; nothing is left there.
        calibration: of that graph.
        held_out: rows for the error, in the order of their noise level.
        runtime: that will serve the graph. Errors of groups are measured in onnxruntime, where
            nothing but INT8 is rounded; times, and the error of a choice, in this one.
        precision: of what is not INT8 in it, see `open_graph`.
        max_groups: see `groups.node_groups`.

    Raises:
        ExportError: no layer with constant weights.
    """

    def __init__(
        self,
        source: Path,
        folder: Path,
        calibration: Calibration,
        *,
        held_out: TrajectoryRows,
        runtime: RuntimeName = "onnxruntime",
        precision: str = "float32",
        max_groups: int = MAX_GROUPS,
    ) -> None:
        self.source, self.held_out = source, held_out
        self.runtime, self.precision = runtime, precision
        self._path = folder / "variant.onnx"
        self._writer = QdqWriter(source)
        self.groups = self._writer.groups(max_groups)
        if not self.groups:
            raise ExportError(f"{source}: no layer with constant weights to quantise")
        self._ranges = self._writer.ranges(calibration)
        size = min(_BATCH, len(held_out))
        self._feeds = [
            held_out.take(range(start, start + size))
            for start in range(0, len(held_out) - size + 1, size)
        ]
        self.n_rows = size * len(self._feeds)
        reference = OrtGraph(source)
        self._expected = [reference.run(feed) for feed in self._feeds]

    @contextmanager
    def written(self, keep_fp32: Collection[str] = (), *, scheme: Scheme = "sym") -> Iterator[Path]:
        """The file of the variant with these groups left in fp32, for as long as the block runs."""
        nodes = included_nodes(self.groups, keep_fp32)
        self._writer.write(self._path, self._ranges, nodes, scheme=scheme)
        try:
            yield self._path
        finally:
            remove_graph(self._path)

    def op_type(self, node: str) -> str:
        """Conv, Gemm or MatMul, of a node with weights; "product" of attention's others."""
        if node in self._writer.products:
            return "product"
        return str(self._writer.nodes[node].op_type)

    def serve(self, path: Path) -> Graph:
        """A graph in the runtime and precision that will serve it."""
        return open_graph(path, self.runtime, precision=self.precision)

    def rounding_errors(self, keep_fp32: Collection[str] = ()) -> Array:
        """Errors of INT8 alone for each held-out row [n_rows], these groups left in fp32."""
        with self.written(keep_fp32) as path:
            return self.row_errors(OrtGraph(path))

    def row_errors(self, graph: Graph) -> Array:
        """||output - reference|| / ||reference|| of each held-out row [n_rows]."""
        errors = [
            relative_errors(expected, graph.run(feed))
            for expected, feed in zip(self._expected, self._feeds, strict=True)
        ]
        result: Array = np.concatenate(errors)
        return result

    def timing_feed(self, batch: int) -> Feed:
        """`batch` held-out rows, spread over the noise levels."""
        picks = np.linspace(0, len(self.held_out) - 1, num=batch).astype(int)
        return self.held_out.take(picks)


def root_mean_square(errors: Array) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
