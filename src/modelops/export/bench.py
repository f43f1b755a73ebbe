"""Benchmark of model sources: latency and throughput, by batch size and number of threads."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from modelops.base.errors import UsageError
from modelops.base.files import sha256_tree
from modelops.export.artifact.directory import is_artifact, read_artifact
from modelops.export.graphs.graph import process_cores
from modelops.export.timing import speed_ratio
from modelops.models.request import ImageRequest
from modelops.models.sources import TRAINING_STATE, ModelSource, PipelineSource
from modelops.records.base import Measurement

_WARM_CALLS = 2  # TorchScript specialises in its second call
_WAY_OUT = "--baseline CHECKPOINT names one"


@dataclass(frozen=True)
class Contender:
    """Source to time.

    Attributes:
        open: opens the source with a number of threads; called once for each number.
        has_threads: whether this process chooses the threads; a service has its own.
        compiled: whether it runs under torch.compile, which may fail; it is then left out.
    """

    open: Callable[[int], ModelSource]
    has_threads: bool = True
    compiled: bool = False


@dataclass(frozen=True)
class BenchRow:
    """Result of one source at one batch size and number of threads.

    Attributes:
        name: the source's address; runtime and precision are separate fields.
        batch_size: images made together: one call of a pipeline, or this many concurrent requests
            to a service.
        threads: CPU threads; None for a service, which has its own.
        p50_s, p95_s: time of a batch, from prompts to images.
        images_per_second: batch_size / p50_s.
        first_s: time of the first call of that size, which compiles; not part of the others.
        speedup: speed relative to the reference row of the same batch size and threads: the first
            eager torch source, or the first source without one. None for the reference.
        n: number of rounds.
    """

    name: str
    runtime: str
    precision: str
    batch_size: int
    threads: int | None
    p50_s: float
    p95_s: float
    images_per_second: float
    first_s: float
    speedup: Measurement | None
    n: int


@dataclass(frozen=True)
class BenchResult:
    """Rows in the order batch size, threads, source; and one line for each thing left out."""

    rows: list[BenchRow]
    notes: list[str]


@dataclass
class _Cell:
    """Source opened for a number of threads."""

    index: int
    contender: Contender
    source: ModelSource
    threads: int | None
    first_s: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.index}:{self.source.info.uri}:{self.threads}"


class _WholeBatches(PipelineSource):
    """Pipeline that is called once for a batch. `PipelineSource` itself makes 8 rows or 1 in every
    call on a CPU, so that images do not depend on the batch. A timing would then measure other
    work."""

    def rows_per_call(self, request: ImageRequest) -> int:
        return self.batch_size


def bench_sources(
    contenders: Sequence[Contender],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    threads: Sequence[int] = (),
    steps: int = 8,
    rounds: int = 5,
    guidance: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Time whole images, all sources taking turns in every round, every second round backwards.

    Args:
        contenders: sources to compare; see `make_contenders`.
        batch_sizes: images made together.
        threads: CPU threads, each with every batch size; all cores of this process if empty.
        steps: network evaluations of an image.
        rounds: times that each source makes each batch, after calls that warm up.
        guidance: guidance scale; the source's own when not given.
        on_progress: called with (rounds done, rounds in all).

    Raises:
        UsageError: no sources, a folder of images, or a number below 1.
        ModelopsError: a source fails. One under torch.compile is left out instead, with a note.
    """
    if not contenders:
        raise UsageError("no source to measure")
    counts = tuple(dict.fromkeys(threads)) or (process_cores(),)
    if not batch_sizes or min((*batch_sizes, *counts, steps, rounds)) < 1:
        raise UsageError("batch sizes, threads, steps and rounds must be at least 1")
    notes: list[str] = []
    rows: list[BenchRow] = []
    with _torch_state(any(contender.compiled for contender in contenders)):
        cells = _open_all(contenders, counts)
        total = len(batch_sizes) * (rounds + 1)
        for done, batch in enumerate(batch_sizes):
            make = _Batch(batch, steps, guidance)
            cells = [cell for cell in cells if _warm_up(cell, make, notes)]
            seconds: dict[str, list[float]] = {cell.key: [] for cell in cells}
            for number in range(rounds):
                if on_progress:
                    on_progress(done * (rounds + 1) + number + 1, total)
                for cell in cells if number % 2 == 0 else reversed(cells):
                    seconds[cell.key].append(make.seconds(cell, number + _WARM_CALLS))
            rows += _rows(cells, seconds, batch=batch, steps=steps)
        if on_progress:
            on_progress(total, total)
    return BenchResult(rows, notes)


@dataclass(frozen=True)
class _Batch:
    size: int
    steps: int
    guidance: float | None

    def seconds(self, cell: _Cell, number: int) -> float:
        """Return the wall time of one batch; each round has new seeds, as a service may cache."""
        requests = [
            ImageRequest(
                prompt=f"image {index}", seed=number * self.size + index, steps=self.steps,
                guidance=self.guidance,
            )
            for index in range(self.size)
        ]  # fmt: skip
        cell.source.batch_size = self.size
        if cell.threads is not None and torch.get_num_threads() != cell.threads:
            torch.set_num_threads(cell.threads)
        start = time.perf_counter()
        cell.source.generate(requests)
        return time.perf_counter() - start


def _open_all(contenders: Sequence[Contender], counts: Sequence[int]) -> list[_Cell]:
    """Open cells in the order threads, contender; services, with their own threads, come last."""
    cells = []
    for count in (*counts, None):
        for index, contender in enumerate(contenders):
            if contender.has_threads != (count is not None):
                continue
            source = contender.open(count or 0)
            if source.n_images is not None:
                raise UsageError(f"{source.info.uri}: a folder of images makes none")
            if source.runs_here:
                plain = cast("PipelineSource", source)
                source = _WholeBatches(plain.pipeline, plain.info, traits=plain.traits)
            cells.append(_Cell(index, contender, source, count))
    return cells


def _warm_up(cell: _Cell, make: _Batch, notes: list[str]) -> bool:
    """Make the first calls; return False, with a note, if torch.compile does not work."""
    try:
        cell.first_s = make.seconds(cell, 0)
    except Exception as error:
        if not cell.contender.compiled:
            raise
        # Whatever of dynamo, inductor or the compiler failed, eager torch and the rest stand.
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0].strip() if lines else type(error).__name__
        notes.append(
            f"torch.compile of {cell.source.info.uri} is left out at batch {make.size}, "
            f"{cell.threads} threads: {reason[:200]}"
        )
        return False
    for number in range(1, _WARM_CALLS):
        make.seconds(cell, number)
    return True


def _rows(
    cells: Sequence[_Cell], seconds: dict[str, list[float]], *, batch: int, steps: int
) -> list[BenchRow]:
    rows = []
    for cell in cells:
        peers = [c for c in cells if c.threads == cell.threads]
        if cell.threads is None and len(peers) < len(cells):  # a service: beside all our cores
            most = max(c.threads for c in cells if c.threads is not None)
            peers = [c for c in cells if c.threads == most]
        eager = [
            c for c in peers if c.source.info.kind == "checkpoint" and not c.contender.compiled
        ]
        reference = (eager or peers)[0]
        protocol: dict[str, Any] = {
            "batch": batch, "steps": steps, "threads": str(cell.threads), "what": "whole images",
        }  # fmt: skip
        p50, p95 = (float(value) for value in np.quantile(seconds[cell.key], [0.5, 0.95]))
        info = cell.source.info
        rows.append(
            BenchRow(
                name=info.uri,
                runtime=info.runtime,
                precision=info.precision,
                batch_size=batch,
                threads=cell.threads,
                p50_s=p50,
                p95_s=p95,
                images_per_second=batch / p50,
                first_s=cell.first_s,
                speedup=None
                if reference is cell
                else speed_ratio(seconds, of=cell.key, over=reference.key, protocol=protocol),
                n=len(seconds[cell.key]),
            )
        )
    return rows


@contextmanager
def _torch_state(compiles: bool) -> Iterator[None]:
    """Restore torch's threads afterwards, and let torch.compile make a program for every shape and
    number of threads: above its usual 8 it would silently continue in eager mode."""
    before = torch.get_num_threads()
    try:
        if not compiles:
            yield
            return
        from torch._dynamo import config

        with config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            yield
    finally:
        torch.set_num_threads(before)


def make_contenders(
    uris: Sequence[str],
    *,
    open_source: Callable[[str], ModelSource],
    runtime: str = "auto",
    baseline: str | None = None,
    with_compile: bool = True,
) -> tuple[list[Contender], list[str]]:
    """Collect the sources to time: those that were named, with eager torch and torch.compile.

    Every artifact brings the checkpoint that it was made from, if that is found and unchanged.

    Args:
        uris: checkpoints, hub ids, artifacts and URLs.
        open_source: opens what is not an artifact.
        runtime: of artifacts.
        baseline: the checkpoint to compare with, in place of those that artifacts name.
        with_compile: also time every checkpoint under torch.compile.

    Returns:
        The contenders (baselines that were not named come first, and torch.compile follows its
        eager one) and a line for each source that is not available.
    """
    notes: list[str] = []
    found: list[str] = [baseline] if baseline else []
    for uri in uris if baseline is None else ():
        if is_artifact(uri):
            checkpoint, reason = find_checkpoint(uri)
            found += [str(checkpoint)] if checkpoint else []
            notes += [reason] if reason else []
        elif uri.startswith(("http://", "https://")):
            notes.append(f"{uri}: no baseline: a service names no checkpoint; {_WAY_OUT}")
    named = {Path(uri).resolve() for uri in uris}
    extra = [uri for uri in dict.fromkeys(found) if Path(uri).resolve() not in named]
    missing = _compiler_missing() if with_compile else None
    contenders: list[Contender] = []
    compile_wanted = False
    for uri in (*extra, *uris):
        if is_artifact(uri):
            contenders.append(Contender(_artifact_opener(uri, runtime)))
            continue
        source = open_source(uri)
        if not source.runs_here:
            contenders.append(Contender(_constant(source), has_threads=False))
            continue
        contenders.append(Contender(_constant(source)))
        compile_wanted = True
        if with_compile and missing is None:
            contenders.append(
                Contender(_constant(compiled_source(cast("PipelineSource", source))), compiled=True)
            )
    if compile_wanted and missing is not None:
        notes.append(missing)
    return contenders, notes


def find_checkpoint(artifact: str | Path) -> tuple[Path | None, str | None]:
    """Find the checkpoint that an artifact was made from: (its directory, None), or (None, reason).

    artifact.json holds its path relative to the place of the export. It is searched from the
    working directory, the artifact's folder and those above it, and is recognised by its digest.
    """
    reference = read_artifact(artifact).inputs.get("checkpoint")
    if reference is None:
        return None, f"{artifact}: no baseline: its record names no checkpoint; {_WAY_OUT}"
    places = [Path(), *Path(artifact).resolve().parents]
    there = [place / reference.path for place in places]
    there = [path for path in there if (path / "model_index.json").is_file()]
    for path in there:
        if sha256_tree(path, exclude=[TRAINING_STATE]) == reference.sha256:
            return path, None
    fault = f"{there[0]} has changed since" if there else f"{reference.path} is not here"
    return None, f"{artifact}: no baseline: {fault}; {_WAY_OUT}"


def compiled_source(source: PipelineSource) -> PipelineSource:
    """Return the same pipeline under torch.compile, with the same weights in memory.

    The networks of the loop and the image are compiled: every diffusers model, and the decoder of
    an autoencoder. Text encoders run once an image and stay eager. Shapes are static, where
    torch.compile is fastest.
    """
    from diffusers import ModelMixin

    pipeline = copy.copy(source.pipeline)
    for name, component in source.pipeline.components.items():
        if isinstance(component, ModelMixin):
            pipeline.__dict__[name] = _compiled(component)  # past diffusers' bookkeeping
    device = source.info.runtime.rpartition("-")[2]
    info = source.info.model_copy(update={"runtime": f"torch-compile-{device}"})
    return PipelineSource(pipeline, info)


def _compiled(module: Any) -> Any:
    """Make a shallow copy with shared weights that compiles itself at its first call."""
    twin = copy.copy(module)
    decoder = getattr(module, "decoder", None)
    if hasattr(module, "decode") and isinstance(decoder, torch.nn.Module):
        twin._modules = {**module._modules, "decoder": _compiled(decoder)}
        return twin
    twin.compile(dynamic=False)
    return twin


def _compiler_missing() -> str | None:
    """Return a line if torch.compile has no C++ compiler to call."""
    wanted = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if any(name and shutil.which(name) for name in wanted):
        return None
    return "torch.compile is left out: it needs a C++ compiler (g++ or clang++), and there is none"


def _artifact_opener(uri: str, runtime: str) -> Callable[[int], ModelSource]:
    def open_with(threads: int) -> ModelSource:
        from modelops.export.artifact.open import open_artifact

        return open_artifact(uri, runtime=runtime, threads=threads)

    return open_with


def _constant(source: ModelSource) -> Callable[[int], ModelSource]:
    return lambda threads: source
