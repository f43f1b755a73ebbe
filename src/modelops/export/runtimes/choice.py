"""Which runtime an artifact runs in here: the fastest of those that give its numbers here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelops.environment import current_environment
from modelops.errors import ExportError, ModelopsError
from modelops.export.calibration import Feed, TrajectoryRows
from modelops.export.components import Component
from modelops.export.runtimes.graphs import Array, RuntimeName, available_runtimes, open_graph
from modelops.export.timing import interleaved_seconds
from modelops.files import cache_directory, read_json, sha256_json, write_json
from modelops.records import ArtifactRecord

PROBE = "probe.safetensors"
_PROBE_ROWS = 8
_ROUNDS = 5
# A runtime other than the one the artifact was made and measured for must be clearly faster: what
# was evaluated is then what is served, and a busy moment does not decide.
_MARGIN = 1.15


def write_probe(folder: Path, denoiser: Component, rows: TrajectoryRows) -> None:
    """Write eight rows of the denoiser's real inputs and the torch outputs beside its graph."""
    from safetensors.numpy import save

    from modelops.files import write_bytes

    picks = np.linspace(0, len(rows) - 1, num=_PROBE_ROWS).astype(int)
    feed = rows.take(picks)
    arrays = {f"input:{name}": np.ascontiguousarray(array) for name, array in feed.items()}
    arrays["output"] = np.ascontiguousarray(denoiser.run(feed)[0])
    write_bytes(folder / PROBE, save(arrays))


def read_probe(folder: Path) -> tuple[Feed, Array]:
    """The inputs and the expected first output that `write_probe` wrote.

    Raises:
        ExportError: there is no readable probe.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(folder / PROBE)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder / PROBE}: cannot be read", hint="export it again") from error
    feed = {k.removeprefix("input:"): v for k, v in arrays.items() if k.startswith("input:")}
    return feed, arrays["output"]


def choose_runtime(
    root: Path,
    record: ArtifactRecord,
    digest: str,
    *,
    threads: int | None = None,
    device_id: int = 0,
) -> tuple[RuntimeName, str]:
    """Run the denoiser's probe in every runtime that is installed here.

    The answer is kept in the cache for this artifact on this machine (with its accelerators) with
    these versions, so that it does not change from one start to the next.

    Returns:
        The runtime, and one line that says why.

    Raises:
        ExportError: no runtime here gives the artifact's numbers.
    """
    names = available_runtimes(record.format)
    machine = current_environment()
    packages = {*names, "onnxruntime-gpu", "torch"}
    identity = {
        "artifact": digest, "cpu": machine.cpu, "cores": machine.cores, "threads": threads,
        "accelerators": machine.accelerators, "device": device_id,
        "packages": {name: machine.packages.get(name) for name in sorted(packages)},
    }  # fmt: skip
    cached = cache_directory("runtimes") / f"{sha256_json(identity)}.json"
    try:
        known = read_json(cached)
        if known["runtime"] in names:
            return known["runtime"], str(known["reason"])
    except (ModelopsError, KeyError, TypeError):
        pass  # not chosen yet, or the file is damaged: choose again
    runtime, reason = _measure(root, record, names, threads, device_id)
    with suppress(OSError, ModelopsError):  # without a cache the next start takes a second longer
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_json(cached, {"runtime": runtime, "reason": reason})
    return runtime, reason


def _measure(
    root: Path,
    record: ArtifactRecord,
    names: list[RuntimeName],
    threads: int | None,
    device_id: int,
) -> tuple[RuntimeName, str]:
    from modelops.export.parity import BOUNDS, relative_errors
    from modelops.export.runtime import default_precision, denoiser_of, graph_file

    denoiser = denoiser_of(record)
    feed, expected = read_probe((root / denoiser.file).parent)
    bound = BOUNDS["int8" if record.precision.startswith("int8") else record.precision].relative
    refused: list[str] = []
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        try:
            graph = open_graph(
                graph_file(root, denoiser, name), name, threads=threads, device_id=device_id,
                precision=default_precision(record.format, name),
            )  # fmt: skip
            error = float(relative_errors(expected, graph.run(feed)).max())
        except ModelopsError as fault:
            refused.append(f"{name} does not run it ({fault.message})")
            continue
        if not error <= bound:
            refused.append(f"{name} is off by {error:.2g} here (bound {bound:.2g})")
            continue
        runs[name] = partial(graph.run, feed)
    if not runs:
        raise ExportError(
            f"{root}: no runtime here gives the artifact's numbers: {'; '.join(refused)}",
            hint="name one with --runtime, or export it again on this machine",
        )
    return _fastest(runs, record.runtime, refused)


def _fastest(
    runs: dict[str, Callable[[], object]], home: str, refused: list[str]
) -> tuple[RuntimeName, str]:
    others = "".join(f"; {line}" for line in refused)
    if len(runs) == 1:
        only: Any = next(iter(runs))
        return only, f"the only one that passes parity here{others}"
    seconds = interleaved_seconds(runs, rounds=_ROUNDS, warmup=1)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    best: Any = min(medians, key=lambda name: medians[name])
    at_home: Any = home
    if home in medians and home != best and medians[home] <= _MARGIN * medians[best]:
        ratio = medians[home] / medians[best]
        said = f"it was made for it, and {best} is only {ratio:.2f} times as fast here"
        return at_home, f"{said}; both pass parity{others}"
    second = min((n for n in medians if n != best), key=lambda name: medians[name])
    ratio = medians[second] / medians[best]
    return best, f"passes parity here and is {ratio:.2f} times as fast as {second}{others}"
