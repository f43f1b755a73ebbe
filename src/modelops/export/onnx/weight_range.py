"""Bits of the weights of an INT8 graph, noted in the graph."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from modelops.export.graphs.external import load_structure

WeightRange = Literal["full", "reduced"]
# Largest magnitude of a weight, and of the second operand of a product of activations. Processors
# without VNNI add two products of an unsigned and a signed byte in 16 bits that saturate:
# 2 x 255 x 64 fits into them, 2 x 255 x 127 does not (onnxruntime calls the former reduce_range).
WEIGHT_TOPS: dict[WeightRange, int] = {"full": 127, "reduced": 64}
_KEY = "modelops.weight_range"


def write_weight_range(model: Any, weight_range: WeightRange) -> None:
    """Note in a graph the range of its INT8 weights."""
    model.metadata_props.add(key=_KEY, value=weight_range)


def read_weight_range(path: Path) -> WeightRange:
    """Return what `write_weight_range` noted; "full" of a graph that says nothing."""
    with suppress(Exception):  # whoever opens the graph says what is wrong with it
        noted = {item.key: item.value for item in load_structure(path).metadata_props}
        return next(name for name in get_args(WeightRange) if name == noted.get(_KEY))
    return "full"
