"""A torch module as a file that torch alone runs: TorchScript (.pt) and torch.export (.pt2).

Neither needs modelops or diffusers to be loaded: `torch.jit.load("model.pt")(*inputs)` and
`torch.export.load("model.pt2").module()(*inputs)`. Beside the program each holds `interface.json`:
names and element types of its inputs and outputs, and its dynamic axes.

Both formats are programs, and torch's readers of them run what they find (.pt2: expressions that
sympy evaluates, unpickled objects). Load them only after their digests have been verified, and
never from a stranger.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelops.base.errors import ExportError, UsageError
from modelops.base.files import atomic_path
from modelops.base.seeding import torch_generator
from modelops.export.graphs.graph import Array
from modelops.models.pipelines.signatures import Example, is_variadic, quiet_libraries

INTERFACE = "interface.json"
_ROOT = "model"  # the folder inside an archive; torch would take the file's name
_ID = ".data/serialization_id"  # a hash that torch writes and nothing reads
_CLASS = b"__torch__.network"
_SAMPLES = "data/sample_inputs/"
_CODE = re.compile(r"code/(__torch__/.+)\.py")
# ||difference|| / ||reference|| of a check. Half precision rounds otherwise where kernels differ.
_BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_BOUND = 1e-4
_NOT_TAKEN = "its source does not take this length"


def write_torchscript(
    module: torch.nn.Module,
    example: Example,
    path: Path,
    *,
    outputs: Sequence[str] | Mapping[str, Any] = ("output",),
) -> list[str]:
    """Trace a module, freeze its weights into the trace, and write it; same weights, same bytes.

    A trace keeps what Python decided for the example, so the file is compared with the module at
    batch 1 and at one row more, on other values, and along every dynamic axis at twice its length.
    Devices that the module's code names are in the trace: it runs where it was traced.

    Args:
        module: takes the example's tensors as positions; returns a tensor or a tuple of them.
        example: input name to (tensor, names of its dynamic axes), as for `writer.write_graph`.
        path: where model.pt goes; its folder is made.
        outputs: names of the module's outputs, in its order.

    Returns:
        The axes along which the written file was seen to equal the module, "sample[2]=height". An
        axis other than the batch that did not is left out: the trace has its length built in.

    Raises:
        ExportError: torch cannot trace the module, this torch has no TorchScript any more, or the
            trace differs from the module along the batch.
    """
    label = path.parent.name
    if not hasattr(torch.jit, "trace"):
        raise ExportError("this torch has no TorchScript", hint="export to torch-export instead")
    tensors = tuple(value for value, _ in example.values())
    with _frozen(module), quiet_libraries(), torch.no_grad():
        try:
            traced: Any = torch.jit.trace(module, tensors, check_trace=False)  # checked below
            traced = torch.jit.freeze(traced)
        except (RuntimeError, ValueError, TypeError, torch.jit.TracingCheckError) as error:
            raise ExportError(f"{label}: cannot be traced: {_first_line(error)}") from error
        axes = _proven_axes(label, module, traced, example)
        interface = _interface(example, outputs, axes)
        with _rewritten(path, _tidy_torchscript) as raw:
            torch.jit.save(traced, str(raw), _extra_files={INTERFACE: interface})
    return axes


def write_exported_program(
    module: torch.nn.Module,
    example: Example,
    path: Path,
    *,
    outputs: Sequence[str] | Mapping[str, Any] = ("output",),
) -> list[str]:
    """Capture a module with torch.export and write it; same weights, same bytes.

    Args:
        module, example, outputs: as for `write_torchscript`.
        path: where model.pt2 goes; its folder is made.

    Returns:
        The dynamic axes; torch refuses at load or call what lies outside the ranges it proved.

    Raises:
        ExportError: torch cannot capture the module with these axes, or the capture differs.
    """
    label = path.parent.name
    dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _, axes in example.values())
    tensors = tuple(value for value, _ in example.values())
    shapes = (dynamic,) if is_variadic(module) else dynamic
    with _frozen(module), quiet_libraries(), torch.no_grad():
        try:
            program = torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)
            runnable = program.module()
        except (RuntimeError, ValueError, TypeError) as error:  # torch's own derive from these
            raise ExportError(f"{label}: cannot be captured: {_first_line(error)}") from error
        axes = _proven_axes(label, module, runnable, example)
        for part in program.graph_module.modules():
            for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # holds paths of this machine
        interface = _interface(example, outputs, axes)
        with _rewritten(path, _tidy_program) as raw:
            torch.export.save(program, str(raw), extra_files={INTERFACE: interface})
    return axes


class TorchGraph:
    """A file of `write_torchscript` or `write_exported_program` behind the `Graph` protocol.

    Runs in torch on the CPU. Loading runs code from the file: verify its digest first.

    Args:
        path: model.pt or model.pt2, told apart by their ending.
        threads: torch's threads during a call; as the process has them when not given.

    Raises:
        UsageError: another ending.
        ExportError: torch cannot load the file, or it holds a pickle.
    """

    device = "cpu"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if path.suffix not in (".pt", ".pt2"):
            raise UsageError(f"{path}: neither model.pt nor model.pt2")
        self.runtime: Any = "torchscript" if path.suffix == ".pt" else "torch-export"
        self.threads = threads
        try:
            with quiet_libraries():
                load = _load_torchscript if path.suffix == ".pt" else _load_program
                self._module, interface = load(path)
            about = json.loads(interface)
            self.input_names: list[str] = [item["name"] for item in about["inputs"]]
            self.output_names: list[str] = list(about["outputs"])
            self.dynamic_axes: list[str] = list(about["dynamic_axes"])
            self._dtypes = [getattr(torch, item["dtype"]) for item in about["inputs"]]
        except ExportError:
            raise
        except Exception as error:  # a damaged archive fails in torch, zipfile, json or sympy
            raise ExportError(f"{path}: torch cannot load it: {_first_line(error)}") from error
        floats = [dtype for dtype in self._dtypes if dtype.is_floating_point]
        self.precision = str(floats[0] if floats else torch.float32).removeprefix("torch.")

    def run(self, feed: dict[str, Array]) -> Array:
        return self.run_all(feed)[0]

    def run_all(self, feed: dict[str, Array]) -> list[Array]:
        """Return all outputs; 16-bit ones as float32, which numpy has.

        Raises:
            ExportError: an input outside the ranges that the file was proved for.
        """
        values = [
            torch.from_numpy(np.ascontiguousarray(feed[name])).to(dtype)
            for name, dtype in zip(self.input_names, self._dtypes, strict=True)
        ]
        before = torch.get_num_threads()
        if self.threads and self.threads != before:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                outputs = self._module(*values)
        except (RuntimeError, AssertionError) as error:
            shapes = {name: tuple(feed[name].shape) for name in self.input_names}
            raise ExportError(f"{self.runtime} refuses {shapes}: {_first_line(error)}") from error
        finally:
            if self.threads and self.threads != before:
                torch.set_num_threads(before)
        return [_array(value) for value in _as_tuple(outputs)]


def _load_torchscript(path: Path) -> tuple[Any, str]:
    extra = {INTERFACE: ""}
    module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    text: Any = extra[INTERFACE]
    return module, text.decode() if isinstance(text, bytes) else text


def _load_program(path: Path) -> tuple[Any, str]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(name)).get("config", {})
                if any(entry.get("use_pickle") for entry in entries.values()):
                    raise ExportError(f"{path}: holds a pickle, which is not read")
            sample = _SAMPLES in name and archive.getinfo(name).file_size
            if sample or "/constants/custom_obj" in name or "/constants/opaque_obj" in name:
                raise ExportError(f"{path}: holds a pickle ({name}), which is not read")
    extra = {INTERFACE: ""}
    program = torch.export.load(str(path), extra_files=extra)
    return program.module(), extra[INTERFACE]


def _interface(example: Example, outputs: Any, axes: list[str]) -> str:
    inputs = [
        {"name": name, "dtype": str(value.dtype).removeprefix("torch.")}
        for name, (value, _) in example.items()
    ]
    about = {"inputs": inputs, "outputs": list(outputs), "dynamic_axes": axes}
    return json.dumps(about, indent=1)


def _proven_axes(label: str, module: Any, exported: Any, example: Example) -> list[str]:
    """Compare an export with its module on other values and lengths; the axes that held."""
    sizes = {
        axis: value.shape[dim] for value, axes in example.values() for dim, axis in axes.items()
    }
    batch = next(iter(sizes), None)  # the first axis of the first input
    tries: list[tuple[str | None, dict[str, int]]] = [(None, {})]
    if batch is not None:
        tries += [(batch, {batch: 1}), (batch, {batch: sizes[batch] + 1})]
    tries += [(axis, {axis: 2 * size}) for axis, size in sizes.items() if axis != batch]
    failed: set[str] = set()
    for index, (axis, lengths) in enumerate(tries):
        fault = _difference(module, exported, _other_inputs(example, lengths, index))
        if fault is None:
            continue
        if fault != _NOT_TAKEN and (axis is None or axis == batch):
            at = f" at {lengths}" if lengths else ""
            raise ExportError(f"{label}: the export differs from its source{at}: {fault}")
        failed.add(axis or "")
    return [
        f"{name}[{dim}]={axis}"
        for name, (_, axes) in example.items()
        for dim, axis in axes.items()
        if axis not in failed
    ]


def _difference(module: Any, exported: Any, inputs: list[torch.Tensor]) -> str | None:
    """Return the difference of the export on some inputs, in words; None if there is none."""
    try:
        expected = _as_tuple(module(*inputs))
    except Exception:  # the module itself does not take this length: nothing to prove
        return _NOT_TAKEN
    try:
        outputs = _as_tuple(exported(*inputs))
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    if [value.shape for value in outputs] != [value.shape for value in expected]:
        return "another shape"
    for value, reference in zip(outputs, expected, strict=True):
        if not torch.isfinite(value).all():
            return "values that are not finite"
        scale = float(torch.linalg.vector_norm(reference.double()))
        off = float(torch.linalg.vector_norm(value.double() - reference.double()))
        relative = off / max(scale, 1e-12)
        if relative > _BOUNDS.get(reference.dtype, _BOUND):
            return f"relative error {relative:.2g}"
    return None


def _other_inputs(example: Example, lengths: Mapping[str, int], index: int) -> list[torch.Tensor]:
    """Tensors like the example's with other lengths along some axes and other values: floats are
    drawn from the example's own, so that they stay in range; integers keep their rows whole."""
    generator = torch_generator(0, "export-check", index)
    result = []
    for value, axes in example.values():
        shape = [lengths.get(axes.get(dim, ""), size) for dim, size in enumerate(value.shape)]
        if value.is_floating_point():
            picks = torch.randint(value.numel(), shape, generator=generator)
            result.append(value.flatten()[picks])
            continue
        other = value.flip(0) if value.ndim else value
        for dim, size in enumerate(shape):
            other = other.index_select(dim, torch.arange(size) % value.shape[dim])
        result.append(other)
    return result


@contextmanager
def _frozen(module: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode and no gradients, which constants of a trace must not have."""
    module.eval()
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@contextmanager
def _rewritten(path: Path, tidy: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Iterator[Path]:
    """Yield a file for torch to write an archive to; then write it to `path` without dates, torch's
    own folder name and what `tidy` changes. Only records of code and notes are given to `tidy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, atomic_path(path) as temporary:
        raw = Path(folder) / path.name  # torch warns of other endings
        yield raw
        with zipfile.ZipFile(raw) as source, zipfile.ZipFile(temporary, "w") as target:
            names = {name.partition("/")[2]: name for name in source.namelist()}
            small = {n for n in names if _SAMPLES in n or n.endswith((".json", ".py", "data.pkl"))}
            changed = tidy({name: source.read(names[name]) for name in sorted(small)})
            for name in [*(n for n in names if n not in small), *changed]:
                if name == _ID or name.endswith(".debug_pkl"):
                    continue
                data = changed[name] if name in changed else source.read(names[name])
                target.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), data)


def _tidy_torchscript(records: dict[str, bytes]) -> dict[str, bytes]:
    """Give a frozen module's class one name: torch numbers classes through a process's life."""
    found = [match for name in records if (match := _CODE.fullmatch(name))]
    if len(found) != 1:
        return records  # of several classes each keeps the name it has
    old = found[0].group(1).replace("/", ".").encode()
    return {
        ("code/__torch__/network.py" if name == found[0].group(0) else name): (
            data.replace(old + b"\n", _CLASS + b"\n").replace(old + b".", _CLASS + b".")
            if name.endswith((".py", "data.pkl"))
            else data
        )
        for name, data in records.items()
    }


def _tidy_program(records: dict[str, bytes]) -> dict[str, bytes]:
    """Empty the example inputs, which torch pickles; it takes an empty record for none."""
    return {name: b"" if _SAMPLES in name else data for name, data in records.items()}


def _as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _array(value: torch.Tensor) -> Array:
    wide = value.float() if value.dtype in _BOUNDS else value
    result: Array = wide.numpy()
    return result


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
