"""Probe of an artifact: rows with the answers it was gated with, to test a runtime on any machine.

probe.safetensors is beside the denoiser's graph:

input:NAME       real inputs of eight rows
output           torch's first output for them
answer           that of the runtime and precision that the artifact was gated in
exact            INT8 only: what the graph itself says, its rounded numbers multiplied and added
                 without error, as on any processor whose sums do not saturate
exact:FILE       of a variant that onnxruntime takes: its answer, from exact sums too, but with the
                 biases that it rounds itself

Imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.errors import ExportError
from modelops.base.files import write_bytes
from modelops.export.graphs.graph import Array, Graph, RuntimeName
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph

PROBE = "probe.safetensors"
PROBE_ROWS = 8
# An INT8 graph's outputs cannot be compared value by value: where one number falls on the other
# side of a rounding step, so do many after it, and two runtimes that both add exactly may be as far
# from each other as each is from torch. How far from torch is the same to three digits, though, and
# grows to two to twelve times that where sums saturate (bench/README.md).
SAME_ERROR = 1.1
_NOTHING_LIKE_IT = 1e6  # for outputs of another shape, or that are not finite
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Probe:
    """Content of probe.safetensors; arrays of `PROBE_ROWS` rows."""

    feed: dict[str, Array]
    output: Array
    answer: Array | None
    exact: dict[str, Array]  # file name of a graph to what it says; "" is the artifact's own

    def exact_of(self, file: str) -> Array | None:
        """Return the exact output of the graph in that file, if it is INT8."""
        return self.exact.get(file, self.exact.get(""))


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Result of the test whether a runtime gives the artifact's numbers on this machine.

    Attributes:
        runtime: its name.
        precision: of the nodes that are not INT8.
        error: relative error against torch: for an INT8 graph the root mean square over the rows,
            for another the largest row's.
        bound: largest allowed error; for an INT8 graph 1.1 times that of exact sums.
        fault: reason why there is no error value; "" if there is one.
    """

    runtime: str
    precision: str
    error: float
    bound: float
    fault: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault and self.error <= self.bound


def write_probe(
    folder: Path,
    feed: Mapping[str, Array],
    output: Array,
    answer: Array,
    *,
    quantised: Path | None = None,
    variant: Path | None = None,
) -> None:
    """Write the probe beside a denoiser's graph.

    Args:
        folder: where it goes.
        feed: real inputs, at most a few rows.
        output: torch's.
        answer: of the runtime that the artifact is gated in.
        quantised: the graph, if it is INT8.
        variant: that of onnxruntime, if there is one.
    """
    from safetensors.numpy import save

    arrays = {f"input:{name}": array for name, array in feed.items()}
    arrays |= {"output": output, "answer": answer}
    if quantised is not None:
        arrays["exact"] = OrtGraph(quantised, provider="cpu", as_written=True).run(dict(feed))
    if variant is not None:
        arrays[f"exact:{variant.name}"] = OrtGraph(variant, provider="cpu").run(dict(feed))
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(folder / PROBE, save(whole))


def read_probe(folder: Path) -> Probe:
    """Read what `write_probe` wrote.

    Raises:
        ExportError: there is no readable probe.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(folder / PROBE)
        output = arrays.pop("output")
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"{folder / PROBE}: cannot be read", hint="export it again") from error
    return Probe(
        feed=_named(arrays, "input:"),
        output=output,
        answer=arrays.get("answer"),
        exact={name.removeprefix(":"): array for name, array in _named(arrays, "exact").items()},
    )


def _named(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def compare_with_probe(
    probe: Probe, graph: Graph, *, file: str, quantised: bool, bound: float = 0.0
) -> Reproduction:
    """Run a graph on the probe's rows.

    Args:
        probe: of the artifact.
        graph: as it would be served.
        file: the graph's file name.
        quantised: whether it is an INT8 graph.
        bound: for what is not.

    Raises:
        ExportError: the probe of an INT8 artifact lacks its answers, or the graph fails.
    """
    got = graph.run(probe.feed)
    if not quantised:
        error = _error(probe.output, got, largest=True)
        return Reproduction(graph.runtime, graph.precision, error, bound)
    exact = probe.exact_of(file)
    if exact is None or probe.answer is None:
        raise ExportError(
            "this INT8 artifact carries no answers to compare with", hint="export it again"
        )
    gated = _error(probe.output, exact)
    if graph.precision != "float32":  # as it was gated, with what 16 bits round beside INT8
        gated = max(gated, _error(probe.output, probe.answer))
    error = _error(probe.output, got)
    return Reproduction(graph.runtime, graph.precision, error, SAME_ERROR * gated)


def relative_errors(reference: Array, output: Array) -> Array:
    """Return ||output - reference|| / ||reference|| of each row [N], in L2."""
    flat, other = (a.reshape(len(a), -1).astype(np.float64) for a in (reference, output))
    scale = np.maximum(np.linalg.norm(flat, axis=1), 1e-12)
    result: Array = np.linalg.norm(other - flat, axis=1) / scale
    return result


def _error(reference: Array, output: Array, *, largest: bool = False) -> float:
    if reference.shape != output.shape or not np.isfinite(output).all():
        return _NOTHING_LIKE_IT
    errors = relative_errors(reference, output)
    return float(errors.max() if largest else np.sqrt(np.mean(np.square(errors))))


def compare_apart(path: Path, runtime: RuntimeName, *, isa: str = "") -> Reproduction:
    """Call `compare_with_probe` of an INT8 graph in a separate process, which may crash.

    OpenVINO's kernels for a processor that the artifact was not made on may crash, and would end
    the caller too.

    Args:
        path: the graph; its probe is beside it.
        runtime: the runtime to test.
        isa: a value of ONEDNN_MAX_CPU_ISA, such as "AVX2": OpenVINO then runs its kernels for such
            a processor; onnxruntime has no such limit.

    Raises:
        ExportError: the process fails otherwise than by crashing.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path), runtime],
        env={**os.environ, **({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})},
        capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode < 0:
        return Reproduction(runtime, "float32", _NOTHING_LIKE_IT, 0.0, _ended_by(-done.returncode))
    if done.returncode:
        said = done.stderr.strip().splitlines()
        where = f"{runtime} limited to {isa}" if isa else runtime
        raise ExportError(f"{where}: {said[-1] if said else 'it ended early'}")
    return Reproduction(**json.loads(done.stdout.splitlines()[-1]))


def _ended_by(number: int) -> str:
    try:
        return f"it crashed: {signal.Signals(number).name}"
    except ValueError:
        return f"it crashed: signal {number}"


def _main(path: str, runtime: Any) -> None:
    kept, graph = read_probe(Path(path).parent), open_graph(Path(path), runtime)
    found = compare_with_probe(kept, graph, file=Path(path).name, quantised=True)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
