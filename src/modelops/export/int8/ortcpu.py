"""Second INT8 graph for onnxruntime's CPU provider, kept only if measurements show that it pays.

The symmetric graph for TensorRT and OpenVINO runs its convolutions in float there. The same
calibration table gives a graph by onnxruntime's own rules. On the measured processors it was not
faster than fp32 for convolutional networks, but it was for transformers.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from modelops.base.errors import UsageError
from modelops.export.graphs.external import remove_graph
from modelops.export.int8.accept import onnxruntime_execution
from modelops.export.int8.groups import included_nodes
from modelops.export.int8.lint import lint_ort_cpu
from modelops.export.int8.qdq import QdqWriter
from modelops.export.int8.ranges import Calibration, Range
from modelops.export.int8.variants import Variants, root_mean_square
from modelops.export.onnx.weight_range import WeightRange
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.timing import interleaved_seconds, speed_ratio

# Kinds of quantised layers. onnxruntime's INT8 convolution is not faster than its float one
# everywhere, so the products of matrices are also tried on their own.
KINDS: dict[str, tuple[str, ...]] = {
    "matmul": ("MatMul", "Gemm"),
    "conv+matmul": ("Conv", "MatMul", "Gemm"),
    "conv": ("Conv",),
}


def write_ort_cpu(
    source: Path,
    target: Path,
    calibration: Calibration,
    *,
    keep_fp32: Collection[str] = (),
    kind: str = "conv+matmul",
    weight_range: WeightRange = "full",
) -> None:
    """Write the graph for onnxruntime's CPU provider: U8 activations, S8 weights.

    Args:
        source: the fp32 model.onnx.
        target: path of the new graph.
        calibration: the symmetric graph's own.
        keep_fp32: groups that are not quantised.
        kind: a key of KINDS.
        weight_range: see `QdqWriter.write`.

    Raises:
        UsageError: an unknown kind.
        ExportError: nothing is left to quantise; see `quantize_graph`.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}", hint=f"choose one of {', '.join(KINDS)}")
    writer = QdqWriter(source)
    ranges = writer.ranges(calibration)
    included = included_nodes(writer.groups(), keep_fp32)
    _write_kind(writer, ranges, included, kind, target, weight_range)


def _write_kind(
    writer: QdqWriter,
    ranges: dict[str, Range],
    names: Collection[str],
    kind: str,
    target: Path,
    weight_range: WeightRange,
) -> None:
    """Write the graph with those of `names` quantised that are of the kind."""
    chosen = [name for name in names if writer.nodes[name].op_type in KINDS[kind]]
    writer.write(target, ranges, chosen, scheme="ort-cpu", weight_range=weight_range)


def judge_ort_cpu(
    variants: Variants,
    target: Path,
    calibration: Calibration,
    *,
    keep_fp32: Collection[str] = (),
    error_bound: float = 0.2,
    batches: tuple[int, ...] = (1, 8),
    rounds: int = 9,
) -> dict[str, Any]:
    """Make every kind of graph, time it against onnxruntime fp32, keep the fastest that pays.

    A graph pays if at the largest batch the whole 95 % interval of its speed-up is above 1, at no
    batch the whole interval is below 1, its error is within the bound, it breaks no rule, and a
    layer runs in INT8.

    Args:
        variants: of the graph; its held-out rows and groups are used.
        target: where the graph goes if it is kept; nothing is left there otherwise.
        calibration, keep_fp32: see `write_ort_cpu`.
        error_bound: relative error allowed (root mean square over held-out rows).
        batches: rows of the timed calls.
        rounds: interleaved calls of each.

    Returns:
        A record for JSON: `kept` (a kind, or None), `why`, and for each of `kinds` its `error`,
        `faults`, `execution`, `speed` (batch to Measurement as a dict) and `why`.
    """
    fp32 = OrtGraph(variants.source)
    writer = QdqWriter(variants.source)
    ranges = writer.ranges(calibration)
    kinds: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    included = included_nodes(variants.groups, keep_fp32)
    present = {variants.op_type(name) for name in included}
    seen: set[frozenset[str]] = set()
    for kind, ops in KINDS.items():
        used = frozenset(ops) & present
        if not used or used in seen:
            continue
        seen.add(used)
        path = target.with_name(f"{target.stem}.{kind.replace('+', '-')}{target.suffix}")
        _write_kind(writer, ranges, included, kind, path, variants.weight_range)
        paths[kind] = path
        graph = OrtGraph(path)
        speed = {}
        for batch in batches:
            feed = variants.timing_feed(batch)
            runs = {"int8": partial(graph.run, feed), "fp32": partial(fp32.run, feed)}
            seconds = interleaved_seconds(runs, rounds=rounds)
            protocol = {"batch": batch, "runtime": "onnxruntime", "scheme": f"ort-cpu {kind}"}
            ratio = speed_ratio(seconds, of="int8", over="fp32", protocol=protocol)
            speed[str(batch)] = ratio.model_dump(mode="json")
        kinds[kind] = {
            "error": root_mean_square(variants.row_errors(graph)),
            "faults": lint_ort_cpu(path),
            "execution": onnxruntime_execution(path),
            "speed": speed,
        }
        kinds[kind]["why"] = _why_not(kinds[kind], str(max(batches)), error_bound)
    kept, why = choose_kind(kinds, str(max(batches)))
    for kind, path in paths.items():
        if kind == kept:
            _write_kind(writer, ranges, included, kind, target, variants.weight_range)
        remove_graph(path)
    return {"kept": kept, "why": why, "kinds": kinds}


def choose_kind(kinds: dict[str, Any], batch: str) -> tuple[str | None, str]:
    """Return the fastest kind at `batch` with no fault (`why` empty), and the reason."""
    good = [kind for kind, row in kinds.items() if not row["why"]]
    if not good:
        reasons = [f"{kind}: {row['why']}" for kind, row in kinds.items()]
        return None, "; ".join(reasons) or "no layer to quantise"
    best = max(good, key=lambda kind: (kinds[kind]["speed"][batch]["value"], kind))
    ratio = kinds[best]["speed"][batch]["value"]
    return best, f"{ratio:.2f} times as fast as onnxruntime fp32 at batch {batch}"


def _why_not(row: dict[str, Any], batch: str, error_bound: float) -> str:
    """Return the reason to refuse a graph; empty if there is none."""
    if row["faults"]:
        return f"breaks a rule: {row['faults'][0]}"
    if not row["execution"]["int8_layers"]:
        return "onnxruntime runs no layer of it in INT8"
    if row["error"] > error_bound:
        return f"relative error {row['error']:.3g} is above {error_bound:.3g}"
    if row["speed"][batch]["low"] <= 1.0:
        return (
            f"not surely faster than fp32 at batch {batch} ({row['speed'][batch]['value']:.2f} x)"
        )
    for other, ratio in row["speed"].items():
        if ratio["high"] < 1.0:
            return f"slower than fp32 at batch {other} ({ratio['value']:.2f} x)"
    return ""
