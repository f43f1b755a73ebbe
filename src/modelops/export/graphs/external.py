"""Graph files with their weights in a second file: model.onnx and model.onnx.data.

A protobuf message ends at 2 GB, so the weights of a larger graph are kept outside it ("external
data", https://onnx.ai/onnx/repo-docs/ExternalData.html). Here that is always one file with a fixed
name in the graph's own folder. A graph that points anywhere else is refused before a runtime
follows it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modelops.base.errors import ExportError, IntegrityError, UsageError
from modelops.base.files import atomic_path, check_writable, is_hub_blob

EXTERNAL_BYTES = 1_500_000_000  # weights above this leave the graph; protobuf's own limit is 2 GiB
SMALL_BYTES = 1024  # what is smaller stays in the graph: shape inference reads it there
_ALIGNMENT = 4096  # a page, so that a runtime can map a tensor instead of copying it
_SLACK = 64 << 20
_GRAPH, _INITIALIZER, _RAW = 7, 5, 9  # field numbers in onnx.proto
_PAYLOADS = (4, 5, 7, 9, 10, 11)  # of TensorProto: its values, in whichever form


def data_path(path: Path) -> Path:
    """Return the path of a graph's weights if they are not in the graph."""
    return path.with_name(path.name + ".data")


def load_structure(path: Path) -> Any:
    """Load a graph without the values of its larger weights; almost none of the file is read.

    Args:
        path: model.onnx, of any size.

    Returns:
        An onnx.ModelProto; initializers above SMALL_BYTES have a type and a shape but no values.

    Raises:
        UsageError: no such file.
        ExportError: not an ONNX graph.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if not size:
                raise ExportError(f"{path}: an empty file, not an ONNX graph")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                model = onnx.ModelProto.FromString(_without_payloads(buffer, size))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (DecodeError, IndexError, ValueError) as error:
        raise ExportError(f"{path}: not an ONNX graph, or a damaged one") from error
    if not model.HasField("graph"):
        raise ExportError(f"{path}: not an ONNX graph")
    return model


def load_graph(path: Path) -> Any:
    """Load a graph with all of its weights into memory.

    Raises:
        UsageError: no such file.
        ExportError: not an ONNX graph.
        IntegrityError: see `check_data`.
    """
    import onnx

    check_data(path)
    return onnx.load(str(path))


def save_graph(model: Any, path: Path, *, external_bytes: int = EXTERNAL_BYTES) -> None:
    """Check and write a graph; equal graphs give equal bytes, and a killed process leaves no graph.

    Weights that together exceed `external_bytes` go to the file beside it, one after the other, and
    are removed from `model`. A former graph at `path` is removed first, so that old and new files
    are never mixed.

    Raises:
        ExportError: the graph breaks ONNX's own rules.
        ModelopsError: no room on the disk.
    """
    values = [item for item in model.graph.initializer if len(item.raw_data) > SMALL_BYTES]
    total = sum(len(item.raw_data) for item in values)
    check_writable(path.parent, need_bytes=total + _SLACK)
    remove_graph(path)
    if total > external_bytes:
        spans = write_values(path, (item.raw_data for item in values))
        for item, (offset, length) in zip(values, spans, strict=True):
            point_outside(item, path, offset, length)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        check_graph(temporary, label=f"{path.parent.name}/{path.name}")


def write_values(path: Path, values: Iterable[bytes]) -> list[tuple[int, int]]:
    """Write tensors' bytes to the data file of the graph `path`, each on a page of its own.

    Returns:
        (offset, length) of each.
    """
    spans = []
    with atomic_path(data_path(path)) as temporary, temporary.open("wb") as handle:
        for value in values:
            offset = -(-handle.tell() // _ALIGNMENT) * _ALIGNMENT
            handle.write(b"\0" * (offset - handle.tell()))
            handle.write(value)
            spans.append((offset, len(value)))
    return spans


def point_outside(tensor: Any, path: Path, offset: int, length: int) -> None:
    """Make a TensorProto of the graph `path` refer to its bytes in the data file."""
    import onnx

    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", data_path(path).name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def check_graph(path: Path, *, label: str) -> None:
    """Check a file against ONNX's rules, types and shapes.

    Raises:
        ExportError: the file breaks a rule.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        text = " ".join(str(error).split())
        raise ExportError(f"{label}: not a valid ONNX graph: {text[:300]}") from error


def remove_graph(path: Path) -> None:
    """Delete a graph, then its data file: in this order, so that no half of it can be loaded."""
    path.unlink(missing_ok=True)
    data_path(path).unlink(missing_ok=True)


def copy_graph(source: Path, target: Path) -> None:
    """Copy a graph with its data file, if it has one, to a path of the same file name."""
    import shutil

    if source.name != target.name:
        raise ValueError(f"{source.name}: the data file's name is bound to the graph's")
    remove_graph(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for origin, copy in ((data_path(source), data_path(target)), (source, target)):
        if origin.is_file():
            with atomic_path(copy) as temporary:
                shutil.copyfile(origin, temporary)


def check_data(path: Path, model: Any | None = None) -> Path | None:
    """Return the path of a graph's weights, after checking that they are where they may be.

    Args:
        path: model.onnx.
        model: its structure, if it is at hand.

    Returns:
        The data file, or None for a graph that holds its weights itself.

    Raises:
        IntegrityError: a weight lies outside the graph's own data file, or beyond its end; the
            file is missing or a symbolic link.
    """
    model = load_structure(path) if model is None else model
    data = data_path(path)
    size: int | None = None
    for tensor, is_weight in _all_tensors(model):
        if tensor.data_location != 1:
            continue
        entries = {item.key: item.value for item in tensor.external_data}
        if not is_weight or entries.get("location") != data.name:
            raise IntegrityError(
                f"{path}: {tensor.name or 'a constant'} lies in {entries.get('location', '')!r}; "
                f"weights may only lie in {data.name}",
                hint="do not use this file; export it again",
            )
        if size is None:
            linked = data.is_symlink() and not is_hub_blob(data.parent, data.resolve())
            if linked or not data.is_file():
                fault = "is a symbolic link" if linked else "is missing"
                raise IntegrityError(f"{data}: {fault}", hint="export it again")
            size = data.stat().st_size
        offset, length = _number(entries.get("offset")), _number(entries.get("length"))
        if min(offset, length) < 0 or length != _bytes_of(tensor) or offset + length > size:
            raise IntegrityError(
                f"{data}: {tensor.name} does not lie within it", hint="export it again"
            )
    return None if size is None else data


def _all_tensors(model: Any) -> Iterator[tuple[Any, bool]]:
    """Yield every TensorProto of a model, and whether it is an initializer of the main graph."""
    yield from ((tensor, True) for tensor in model.graph.initializer)
    yield from ((tensor, False) for tensor in _graph_tensors(model.graph, skip_weights=True))
    for function in model.functions:
        for node in function.node:
            yield from ((tensor, False) for tensor in _node_tensors(node))


def _graph_tensors(graph: Any, *, skip_weights: bool = False) -> Iterator[Any]:
    if not skip_weights:
        yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)


def check_memory(need_bytes: int, *, doing: str) -> None:
    """Refuse a task before its start if it needs more than the machine's free memory.

    Raises:
        ExportError: there is too little memory; the message gives both numbers.
    """
    free = free_memory()
    if free is not None and free < need_bytes:
        raise ExportError(
            f"{doing} needs about {need_bytes / 1e9:.1f} GB of memory beside what is loaded; "
            f"{free / 1e9:.1f} GB are free",
            hint="stop other programs, or use a larger machine",
        )


def free_memory() -> int | None:
    """Return the bytes that this process may still take, by machine and control group."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable")))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            used = int((group / "memory.current").read_text())
            stat = dict(s.split() for s in (group / "memory.stat").read_text().splitlines())
            found.append(int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, StopIteration, ValueError):
        pass  # not Linux, or no control group: what was found so far counts
    return min(found) if found else None


def _bytes_of(tensor: Any) -> int:
    import math

    import onnx

    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        return -1
    return math.prod(tensor.dims) * int(width)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else -1


def _varint(buffer: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("not a varint")


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _fields(buffer: Any, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, its start, start of its value, its end) of a message's fields."""
    while at < end:
        start = at
        key, at = _varint(buffer, at)
        kind, value = key & 7, at
        if kind == 0:
            _, at = _varint(buffer, at)
        elif kind == 2:
            length, value = _varint(buffer, at)
            at = value + length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no such wire type: {kind}")
        if at > end:
            raise ValueError("a field reaches beyond its message")
        yield key >> 3, start, value, at


def _without_payloads(buffer: Any, size: int) -> bytes:
    """Return the bytes of a ModelProto without the values of its larger initializers."""
    parts: list[bytes] = []
    for number, start, value, end in _fields(buffer, 0, size):
        if number != _GRAPH:
            parts.append(buffer[start:end])
            continue
        graph: list[bytes] = []
        for inner, inner_start, inner_value, inner_end in _fields(buffer, value, end):
            if inner != _INITIALIZER:
                graph.append(buffer[inner_start:inner_end])
                continue
            kept = b"".join(
                buffer[s:e]
                for n, s, v, e in _fields(buffer, inner_value, inner_end)
                if n not in _PAYLOADS or e - v <= SMALL_BYTES
            )
            graph.append(_message(_INITIALIZER, kept))
        parts.append(_message(_GRAPH, b"".join(graph)))
    return b"".join(parts)


def _message(number: int, content: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(content)) + content
