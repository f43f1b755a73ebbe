"""Effects of a narrower float format on a graph's weights and activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ExportError
from modelops.export.graphs.external import data_path, load_structure
from modelops.export.graphs.graph import Array, process_cores

Narrow = Literal["float16", "bfloat16"]
NARROW: tuple[Narrow, ...] = ("float16", "bfloat16")
# Share of the format's largest number that an activation may reach on the measured images; other
# images go further.
SAFE_SHARE = 0.25
_SUBNORMAL_SHARE = 0.25
_ROUNDOFFS = 4.0
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FloatFormat:
    """Format of 16-bit floats.

    Attributes:
        name: as torch and numpy write it.
        onnx_type: its number in onnx.TensorProto.
        largest: the largest finite number.
        smallest: the smallest number that is not subnormal.
        roundoff: the largest relative error of rounding a normal number.
        dtype: of numpy arrays (ml_dtypes for bfloat16).
    """

    name: Narrow
    onnx_type: int
    largest: float
    smallest: float
    roundoff: float
    dtype: Any


def float_format(name: Narrow) -> FloatFormat:
    """Return the format of IEEE binary16 or bfloat16."""
    if name == "float16":
        return FloatFormat(name, 10, 65504.0, 2.0**-14, 2.0**-11, np.dtype(np.float16))
    import ml_dtypes

    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    return FloatFormat(name, 16, largest, 2.0**-126, 2.0**-8, np.dtype(ml_dtypes.bfloat16))


def weight_fault(values: npt.NDArray[np.float32], narrow: FloatFormat) -> str | None:
    """Return the reason why weights would not survive the format; None if they would.

    They would not if one becomes infinite, a quarter of those that are not 0 become subnormal or 0,
    or the whole is off by more than rounding explains.
    """
    flat = values.reshape(-1)
    tiny = nonzero = 0
    error = power = 0.0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        size = np.abs(part)
        worst = float(size.max(initial=0.0))
        if not worst < narrow.largest:
            return f"a weight of {worst:.3g} overflows"
        with np.errstate(over="ignore"):
            rounded = part.astype(np.float32).astype(narrow.dtype).astype(np.float64)
        tiny += int(np.count_nonzero((size > 0) & (size < narrow.smallest)))
        nonzero += int(np.count_nonzero(size))
        error += float(np.square(rounded - part).sum())
        power += float(np.square(part).sum())
    if nonzero and tiny > _SUBNORMAL_SHARE * nonzero:
        return f"{tiny / nonzero:.0%} of its weights become subnormal"
    if error > (_ROUNDOFFS * narrow.roundoff) ** 2 * power:
        return f"rounding changes its weights by {np.sqrt(error / power):.2g}"
    return None


def measure_ranges(
    path: Path, names: Iterable[str], feeds: Iterable[Mapping[str, Array]]
) -> dict[str, float]:
    """Measure the largest magnitude of tensors inside a float32 graph, over all feeds.

    The graph runs in onnxruntime with one more output number for each tensor, so that it needs no
    more memory than a usual run; feeds are run one after the other.

    Args:
        path: the fp32 model.onnx.
        names: float32 tensors that nodes make.
        feeds: named input arrays of each run; may be a generator.

    Returns:
        name to max |x|; infinity where a value is not finite.

    Raises:
        ExportError: onnxruntime refuses the graph or a feed, or there are no feeds.
    """
    import onnxruntime

    wanted = list(names)
    model = load_structure(path)
    weights = {item.name: item for item in model.graph.initializer}
    probes = _add_probes(model, wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = process_cores()
    values = weight_arrays(path, weights)
    _supply(options, model, values)
    worst = np.zeros(len(wanted))
    runs = 0
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for feed in feeds:
            found = np.array([float(v) for v in session.run(probes, dict(feed))])
            worst = np.maximum(worst, np.where(np.isfinite(found), found, np.inf))
            runs += 1
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise ExportError(
            f"{path}: its ranges cannot be measured: {str(error).splitlines()[0]}"
        ) from error
    if not runs:
        raise ExportError(f"{path}: no inputs to measure its ranges with")
    return dict(zip(wanted, worst.tolist(), strict=True))


def _add_probes(model: Any, names: list[str]) -> list[str]:
    """Make max |x| of tensors the only outputs of a graph."""
    import onnx

    # As a constant, so that the operator's form of before opset 18 is not needed too.
    opset = next(item.version for item in model.opset_import if not item.domain)
    if opset < 18:
        raise ExportError(f"opset {opset} is too old to be measured", hint="export with 18 to 20")
    del model.graph.output[:]
    probes = []
    for index, name in enumerate(names):
        probe = f"modelops/probe/{index}"
        model.graph.node.append(onnx.helper.make_node("Abs", [name], [f"{probe}/abs"]))
        model.graph.node.append(
            onnx.helper.make_node("ReduceMax", [f"{probe}/abs"], [probe], keepdims=0)
        )
        model.graph.output.append(onnx.helper.make_tensor_value_info(probe, 1, []))
        probes.append(probe)
    return probes


def weight_arrays(path: Path, weights: Mapping[str, Any]) -> dict[str, Array]:
    """Map the larger weights of a graph from its file or its data file, without reading them."""
    import onnx

    data = data_path(path)
    arrays: dict[str, Array] = {}
    inline = [n for n, t in weights.items() if t.data_location != 1 and not _has_values(t)]
    for name, tensor in weights.items():
        if tensor.data_location == 1:
            entries = {item.key: item.value for item in tensor.external_data}
            arrays[name] = np.memmap(
                data, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), "r",
                int(entries["offset"]), tuple(tensor.dims),
            )  # fmt: skip
    if inline:
        wanted = set(inline)
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if tensor.name in wanted:
                arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return arrays


def _has_values(tensor: Any) -> bool:
    fields = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    return 0 in tensor.dims or any(len(getattr(tensor, field)) for field in fields)


def _supply(options: Any, model: Any, values: Mapping[str, Array]) -> None:
    """Give a session the weights that the structure lacks, as external data."""
    import onnxruntime

    kept = []
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.data_location = 1
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value="supplied")
            kept.append(tensor.name)
    arrays = [np.ascontiguousarray(values[name]) for name in kept]
    options.add_external_initializers(
        kept, [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    )
