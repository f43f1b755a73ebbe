"""Quantised variants of one graph: made, run and compared on held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.errors import ExportError
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs.external import remove_graph
from modelops.export.graphs.graph import Array, Graph, RuntimeName
from modelops.export.int8.groups import MAX_GROUPS, included_nodes
from modelops.export.int8.qdq import QdqWriter, Scheme
from modelops.export.int8.ranges import Calibration, Feed, visit_tensors
from modelops.export.onnx.weight_range import WeightRange
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.probe import relative_errors

_BATCH = 8
_LIGHT_WORK = 0.005  # share of the multiply-adds of all layers with weights
_LIGHT_WEIGHTS = 0.05  # share of their weights: more would be missed in the graph's size


class Variants:
    """Maker of variants of a graph by group, which measures their error.

    Args:
        source: fp32 model.onnx.
        folder: folder of the current variant; nothing is left there.
        calibration: of that graph.
        held_out: rows for the error, in the order of their noise level; a last batch that is not
            full is left out. Groups are measured on `few` of them, which are all until
            `limit_rows`.
        runtime: that will serve the graph. Errors of groups are measured in onnxruntime, where
            nothing but INT8 is rounded; times, and the error of a choice, in this one.
        precision: of what is not INT8 in it, see `open_graph`.
        max_groups: see `groups.node_groups`.
        weight_range: of the variants that are written, see `QdqWriter.write`; may be set later.

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
        weight_range: WeightRange = "full",
    ) -> None:
        self.source, self.weight_range = source, weight_range
        self.runtime, self.precision = runtime, precision
        self._path = folder / "variant.onnx"
        self._writer = QdqWriter(source)
        self.groups = self._writer.groups(max_groups)
        if not self.groups:
            raise ExportError(f"{source}: no layer with constant weights to quantise")
        self._ranges = self._writer.ranges(calibration)
        self.light = self._light_groups(calibration.rows.take([0]))
        self._size = min(_BATCH, len(held_out))
        self.held_out = held_out.subset(range(len(held_out) // self._size * self._size))
        reference = OrtGraph(source)
        started = time.monotonic()
        self._expected = [reference.run(feed) for feed in self._feeds(self.held_out)]
        self._row_seconds = (time.monotonic() - started) / len(self.held_out)
        self.few, self._expected_of_few = self.held_out, self._expected

    def limit_rows(self, seconds: float) -> None:
        """Measure groups on fewer rows, evenly spread over the noise levels, so that a pass takes
        about this many seconds; on at least one batch."""
        most, size = len(self.held_out) // self._size, self._size
        batches = min(most, max(1, int(seconds / (size * self._row_seconds))))
        if batches < most:
            picks = self.held_out.spread(batches * size)
            expected = np.concatenate(self._expected)[picks]
            self._expected_of_few = list(expected.reshape(batches, size, *expected.shape[1:]))
            self.few = self.held_out.subset(picks)

    def _feeds(self, rows: TrajectoryRows) -> Iterator[Feed]:
        """Return rows in batches, in the order of their noise level."""
        for start in range(0, len(rows), self._size):
            yield rows.take(range(start, start + self._size))

    @contextmanager
    def written(self, keep_fp32: Collection[str] = (), *, scheme: Scheme = "sym") -> Iterator[Path]:
        """Write the variant with these groups left in fp32; its file exists within the block."""
        nodes = included_nodes(self.groups, keep_fp32)
        self._writer.write(
            self._path, self._ranges, nodes, scheme=scheme, weight_range=self.weight_range
        )
        try:
            yield self._path
        finally:
            remove_graph(self._path)

    def _light_groups(self, row: Feed) -> set[str]:
        """Return groups with almost none of the network's multiply-adds and few of its weights:
        layers computed once an image, or with few channels. INT8 saves nothing there, whatever a
        timing says. None if a layer reads a Softmax, of which only the largest value is known."""
        nodes, products = self._writer.nodes, self._writer.products
        shapes: dict[str, tuple[int, ...]] = {}
        inputs = list({node.input[0] for name, node in nodes.items() if name not in products})
        visit_tensors(
            self.source, inputs, [row], lambda name, array: shapes.update({name: array.shape})
        )
        if not all(shapes.values()):
            return set()
        weights = {name: self._writer.weights_of(name) for name in nodes if name not in products}
        work = {
            name: multiply_adds(nodes[name], shapes[nodes[name].input[0]], size)
            for name, size in weights.items()
        }
        return {
            group
            for group, members in self.groups.items()
            if not any(name in products for name in members)
            and sum(work[name] for name in members) < _LIGHT_WORK * sum(work.values())
            and sum(weights[name] for name in members) < _LIGHT_WEIGHTS * sum(weights.values())
        }

    def op_type(self, node: str) -> str:
        """Return Conv, Gemm or MatMul for a node with weights, "product" for attention's others."""
        if node in self._writer.products:
            return "product"
        return str(self._writer.nodes[node].op_type)

    def serve(self, path: Path) -> Graph:
        """Open a graph in the runtime and precision that will serve it."""
        return open_graph(path, self.runtime, precision=self.precision)

    def rounding_errors(self, keep_fp32: Collection[str] = ()) -> Array:
        """Return the errors of INT8 alone for the few rows [len(few)], these groups in fp32."""
        with self.written(keep_fp32) as path:
            return self.row_errors(OrtGraph(path), few=True)

    def row_errors(self, graph: Graph, *, few: bool = False) -> Array:
        """Return ||output - reference|| / ||reference|| of each held-out row [len(held_out)], or
        of each of the few."""
        rows, reference = (
            (self.few, self._expected_of_few) if few else (self.held_out, self._expected)
        )
        errors = [
            relative_errors(expected, graph.run(feed))
            for expected, feed in zip(reference, self._feeds(rows), strict=True)
        ]
        result: Array = np.concatenate(errors)
        return result

    def timing_feed(self, batch: int) -> Feed:
        """Return `batch` held-out rows, spread over the noise levels."""
        return self.held_out.take(self.held_out.spread(batch))


def multiply_adds(node: Any, shape: Sequence[int], weights: int) -> float:
    """Count the multiply-adds of a Conv, Gemm or MatMul with this many constant weights on an input
    of this shape. Padding is not counted; a stack of matrices counts as if each row met all."""
    values, attributes = math.prod(shape), {item.name: item for item in node.attribute}
    if node.op_type != "Conv":
        turned = "transA" in attributes and attributes["transA"].i
        return values / shape[0 if turned else -1] * weights
    strides = attributes["strides"].ints if "strides" in attributes else ()
    return values / shape[1] * weights / math.prod(strides)


def root_mean_square(errors: Array) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
