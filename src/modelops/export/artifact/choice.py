"""Choice of an artifact's runtime: the fastest of those that give its numbers on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.environment import current_environment
from modelops.base.errors import ModelopsError, NotReproducedError
from modelops.base.files import cache_directory, read_json, sha256_json, write_json
from modelops.base.processor import this_processor
from modelops.export.graphs.graph import RuntimeName, available_runtimes
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.probe import (
    Reproduction,
    compare_apart,
    compare_with_probe,
    read_probe,
)
from modelops.export.timing import interleaved_seconds
from modelops.records.export import ArtifactRecord

_ROUNDS = 5
# A runtime other than the one the artifact was made and measured for must be clearly faster. So the
# evaluated runtime is normally served, and a busy moment does not decide.
_MARGIN = 1.15


@dataclass(frozen=True, slots=True)
class RuntimeChoice:
    """Runtime of an artifact on this machine.

    Attributes:
        runtime: one of `graph.RUNTIMES`.
        precision: of the nodes that are not INT8.
        reason: one line.
        error: relative error of its outputs against torch, see `probe.Reproduction`.
        bound: largest error at which they count as the numbers that the artifact was gated with.
        processor: the kind of processor that this was measured on.
    """

    runtime: RuntimeName
    precision: str
    reason: str
    error: float
    bound: float
    processor: str

    @property
    def details(self) -> dict[str, str | int | float | bool | None]:
        """Return the values for `SourceInfo.details`."""
        return {
            "runtime": self.reason, "error": self.error, "error_bound": self.bound,
            "processor": self.processor,
        }  # fmt: skip


def choose_runtime(
    root: Path,
    record: ArtifactRecord,
    digest: str,
    *,
    runtime: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    device_id: int = 0,
) -> RuntimeChoice:
    """Run the denoiser's probe in every runtime that is installed here, or in the one named.

    The answer is cached for this artifact, machine (with its accelerators) and versions, so that it
    does not change from one start to the next.

    Args:
        root: the artifact's directory, which was verified.
        record: its record.
        digest: of the directory.
        runtime: "auto", or the only one to try.
        precision: of the nodes that are not INT8; "auto" is `precision.served_precision`.
        threads, device_id: see `open_graph`.

    Raises:
        NotReproducedError: no runtime that was tried gives the artifact's numbers.
    """
    names: list[Any] = [runtime]
    if runtime == "auto":  # torch.export's programs run expressions of the file: only if named
        names = [name for name in available_runtimes(record.format) if name != "torch-export"]
    machine, processor = current_environment(), this_processor().kind
    packages = {*names, "onnxruntime-gpu", "torch"}
    identity = {
        "artifact": digest, "cpu": machine.cpu, "processor": processor, "cores": machine.cores,
        "threads": threads, "accelerators": machine.accelerators, "device": device_id,
        "runtime": runtime, "precision": precision,
        "packages": {name: machine.packages.get(name) for name in sorted(packages)},
    }  # fmt: skip
    cached = cache_directory("runtimes") / f"{sha256_json(identity)}.json"
    try:
        known = RuntimeChoice(**read_json(cached))
        if known.runtime in names:
            return known
    except (ModelopsError, TypeError):
        pass  # not chosen yet, or the file is damaged: choose again
    found, reason = _measure(root, record, names, precision, threads, device_id)
    if runtime != "auto":
        reason = "asked for, and gives the artifact's numbers here"
    chosen: Any = found.runtime
    choice = RuntimeChoice(chosen, found.precision, reason, found.error, found.bound, processor)
    with suppress(OSError, ModelopsError):  # without a cache the next start takes a second longer
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_json(cached, asdict(choice))
    return choice


@dataclass(frozen=True, slots=True)
class Tried:
    """Runtime that was tried: its error, or the reason why it does not run the graph."""

    runtime: RuntimeName
    found: Reproduction | None
    fault: str = ""
    run: Callable[[], object] | None = None

    @property
    def refusal(self) -> str:
        """Reason why the runtime is not taken; "" if it may be."""
        if self.found is None:
            return f"{self.runtime} does not run it ({self.fault})"
        if self.found.fault:
            return f"{self.runtime} does not run it here ({self.found.fault})"
        if not self.found.passed:
            error, bound = self.found.error, self.found.bound
            return f"{self.runtime} is off by {error:.2g} here (bound {bound:.2g})"
        return ""


def try_runtimes(
    root: Path,
    record: ArtifactRecord,
    names: Sequence[RuntimeName],
    *,
    precision: str = "auto",
    threads: int | None = None,
    device_id: int = 0,
) -> list[Tried]:
    """Run the denoiser's probe in each of these runtimes; see `choose_runtime`.

    Raises:
        ModelopsError: the only named runtime cannot run the graph at all, or there is no probe.
    """
    from modelops.export.artifact.directory import denoiser_of, graph_file
    from modelops.export.parity import BOUNDS
    from modelops.export.runtimes.precision import served_precision

    denoiser = denoiser_of(record)
    probe = read_probe((root / denoiser.file).parent)
    bound = BOUNDS["int8" if record.precision.startswith("int8") else record.precision].relative
    if precision in BOUNDS:  # asked for
        bound = max(bound, BOUNDS[precision].relative)
    tried = []
    for name in names:
        path = graph_file(root, denoiser, name)
        try:
            if record.format == "int8" and not _ran_on_this_kind(record, name):
                apart = compare_apart(path, name)
                if apart.fault:
                    tried.append(Tried(name, apart))
                    continue
            graph = open_graph(
                path, name, threads=threads, device_id=device_id,
                precision=served_precision(record, name) if precision == "auto" else precision,
            )  # fmt: skip
            found = compare_with_probe(
                probe, graph, file=path.name, quantised=record.format == "int8", bound=bound
            )
        except ModelopsError as fault:
            if len(names) == 1:
                raise
            tried.append(Tried(name, None, fault.message))
            continue
        tried.append(Tried(name, found, run=partial(graph.run, probe.feed)))
    return tried


def _ran_on_this_kind(record: ArtifactRecord, runtime: str) -> bool:
    """Return whether a runtime is known to run an INT8 graph on this kind of processor without a
    crash.
    """
    here = this_processor().kind
    known = (one for one in record.reproduced if (one.processor, one.runtime) == (here, runtime))
    return any(not one.fault for one in known)


def _measure(
    root: Path,
    record: ArtifactRecord,
    names: Sequence[RuntimeName],
    precision: str,
    threads: int | None,
    device_id: int,
) -> tuple[Reproduction, str]:
    tried = try_runtimes(
        root, record, names, precision=precision, threads=threads, device_id=device_id
    )
    refused = [one.refusal for one in tried if one.refusal]
    good = {one.runtime: one for one in tried if not one.refusal}
    if not good:
        raise NotReproducedError(
            f"{root.name}: does not give the numbers it was gated with on this processor "
            f"({this_processor().kind}): {'; '.join(refused)}",
            hint="serve an artifact that does, or export this one again here",
        )
    runs: dict[str, Any] = {name: one.run for name, one in good.items()}
    best, reason = _fastest(runs, record.runtime, refused)
    found = good[best].found
    assert found is not None
    return found, reason


def _fastest(
    runs: Mapping[str, Callable[[], object]], home: str, refused: list[str]
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
