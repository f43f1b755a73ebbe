"""Steps of every export: catch the networks' calls, prove the graphs equal, write the record."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelops.base.environment import current_environment
from modelops.base.files import sha256_path, tree_files
from modelops.base.seeding import image_seed
from modelops.export.artifact.directory import describe_graph, other_files, portable_path
from modelops.export.artifact.open import assemble
from modelops.export.calibration import (
    Feed,
    TrajectoryRows,
    catch_feeds,
    collect_rows,
    parity_prompts,
    rows_at_once,
)
from modelops.export.components import Component
from modelops.export.graphs.graph import Graph
from modelops.export.lora import Lora
from modelops.export.parity import (
    Bounds,
    component_parity,
    errors_by_noise,
    image_parity,
)
from modelops.export.runtimes.probe import PROBE_ROWS, write_probe
from modelops.export.source import ExportSource
from modelops.models.pipelines.watch import OMITTED
from modelops.records.base import InputRef
from modelops.records.export import ExportedComponent, ParityCheck

PARITY_SEED = 20
OnProgress = Callable[[int, int], None]
OnStage = Callable[[str, int, int], None]  # name, number from 1, how many


class Stages:
    """Progress of an export through its stages.

    Args:
        total: number of stages.
        on_stage: called with a stage's name, its number and the total when it begins.
        on_progress: called with (done, of how many) within a stage; without `on_stage`, with
            (stages done, stages).
    """

    def __init__(
        self, total: int, *, on_stage: OnStage | None, on_progress: OnProgress | None
    ) -> None:
        self._total, self._done = total, -1
        self._on_stage, self._on_progress = on_stage, on_progress

    def begin(self, name: str) -> None:
        """Begin the next stage, which ends the one before."""
        self._done += 1
        if self._on_stage:
            self._on_stage(name, self._done + 1, self._total)
        elif self._on_progress:
            self._on_progress(self._done, self._total)

    def rename(self, name: str) -> None:
        """Rename the stage, which continues with another task."""
        if self._on_stage:
            self._on_stage(name, self._done + 1, self._total)

    def count(self, done: int, total: int) -> None:
        """Report the progress within the stage."""
        if self._on_stage and self._on_progress:
            self._on_progress(done, total)

    def end(self) -> None:
        """End all stages."""
        if self._on_progress and not self._on_stage:
            self._on_progress(self._total, self._total)


@dataclass
class Calls:
    """Inputs that a pipeline called its networks with on the prompts of parity.

    Attributes:
        feeds: component's name to feeds of its graph.
        rows: inputs of each denoiser over its whole trajectory.
    """

    feeds: dict[str, list[Feed]]
    rows: dict[str, TrajectoryRows]


def catch_calls(
    source: ExportSource, components: Sequence[Component], prompts: Sequence[str]
) -> Calls:
    """Call the pipeline with the prompts of parity and keep the inputs of every network."""
    chosen = parity_prompts(source.traits, prompts, 8)
    texts = chosen[: rows_at_once(source.traits, *source.size)]
    feeds = catch_feeds(
        source.pipeline, source.traits, [c for c in components if c.role != "denoiser"], texts,
        [image_seed(PARITY_SEED, text) for text in texts], 4, source.size,
    )  # fmt: skip
    calls = Calls(feeds={}, rows={})
    for component in components:
        if component.role == "denoiser":
            rows = collect_rows(
                source.pipeline, component, prompts=chosen, seed=PARITY_SEED, purpose="parity",
                steps=8, rows=32, size=source.size, traits=source.traits,
            )  # fmt: skip
            calls.rows[component.name] = rows
            calls.feeds[component.name] = rows.batches(min(8, len(rows)))
        else:
            calls.feeds[component.name] = feeds[component.name] or [_example_feed(component)]
    return calls


def prove(
    source: ExportSource,
    root: Path,
    components: Sequence[Component],
    graphs: Mapping[str, Graph],
    calls: Calls,
    bounds: Bounds,
    prompts: Sequence[str],
    stages: Stages,
) -> tuple[list[ParityCheck], list[dict[str, float]]]:
    """Compare every network and the images with their source; write the denoiser's probe.

    Returns:
        The checks, some of which may have failed, and the denoiser's error by noise level.
    """
    checks: list[ParityCheck] = []
    stages.begin("comparing networks")
    for done, component in enumerate(components):
        stages.count(done, len(components))
        feeds = calls.feeds[component.name]
        checks += component_parity(component, graphs[component.name], feeds, bounds)
    name, rows = next(iter(calls.rows.items()))
    denoiser = next(component for component in components if component.name == name)
    errors = errors_by_noise(denoiser, graphs[name], rows)
    carry_probe(root / name, denoiser, graphs[name], rows)
    stages.begin("comparing images")
    checks += image_parity(
        source.pipeline, assemble(root, graphs), traits=source.traits,
        name=f"images/{graphs[name].runtime}", prompts=parity_prompts(source.traits, prompts, 4),
        seed=PARITY_SEED, bounds=bounds, size=source.size,
    )  # fmt: skip
    return checks, errors


def carry_probe(
    folder: Path,
    denoiser: Component,
    graph: Graph,
    rows: TrajectoryRows,
    *,
    quantised: Path | None = None,
    variant: Path | None = None,
) -> None:
    """Write rows spread over the noise levels, torch's answers and the graph's beside it; see
    `runtimes.probe`."""
    feed = rows.take(rows.spread(PROBE_ROWS))
    expected, answer = denoiser.run(feed)[0], graph.run(feed)
    write_probe(folder, feed, expected, answer, quantised=quantised, variant=variant)


def about_source(
    checkpoint: str | Path, source: ExportSource, lora: Lora | None = None
) -> dict[str, Any]:
    """Return the fields of a record about the source of an artifact and the machine."""
    return {
        "inputs": source_inputs(checkpoint, source, lora),
        "lora": {} if lora is None else {"fused": lora.fused, "scale": lora.scale},
        "environment": current_environment(),
        "pipeline": type(source.pipeline).__name__,
        "size": [side for side in source.size if side],
        "omitted": omitted_parts(source.pipeline),
        "source_bytes_total": source.bytes_total,
    }


def about_files(root: Path, components: list[ExportedComponent]) -> dict[str, Any]:
    """Return the fields of a record that name every file of the directory."""
    return {
        "components": components,
        "files": other_files(root, components),
        "bytes_total": sum(path.stat().st_size for path in tree_files(root).values()),
    }


def carry_parts(source: ExportSource, root: Path) -> None:
    """Copy the other parts: tokenizers, scheduler, image processors, the pipeline's index."""
    pipeline = source.pipeline
    for name, part in pipeline.components.items():
        if part is None or isinstance(part, torch.nn.Module) or name in OMITTED:
            continue
        if (source.directory / name).is_dir():
            shutil.copytree(source.directory / name, root / name)
        else:
            part.save_pretrained(root / name)
    for name in ("model_index.json", "pipeline.py"):
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, root / name)


def describe_components(
    root: Path, components: Sequence[Component], *, precision: str
) -> list[ExportedComponent]:
    """Describe the components of an artifact, from their graphs."""
    return [
        describe_graph(root, item.name, precision=precision).model_copy(
            update={
                "attribute": item.attribute,
                "role": item.role,
                "shapes": {name: list(tensor.shape) for name, (tensor, _) in item.example.items()},
            }
        )
        for item in components
    ]


def source_inputs(
    checkpoint: str | Path, source: ExportSource, lora: Lora | None
) -> dict[str, InputRef]:
    """Return the inputs that an artifact was made from."""
    inputs = {"checkpoint": InputRef(path=portable_path(checkpoint), sha256=source.sha256)}
    if lora is not None:
        inputs["lora"] = InputRef(path=portable_path(lora.path), sha256=sha256_path(lora.path))
    return inputs


def omitted_parts(pipeline: Any) -> list[str]:
    """Return the parts that an artifact leaves out."""
    return [name for name in OMITTED if pipeline.components.get(name) is not None]


def _example_feed(component: Component) -> Feed:
    """Make a feed for a network that the pipeline does not call, such as an encoder."""
    return {name: tensor.numpy() for name, (tensor, _) in component.example.items()}


def config_of(module: Any) -> dict[str, Any]:
    """Return a network's configuration without the path of its checkpoint."""
    config = module.config
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {k: v for k, v in plain.items() if k != "_name_or_path"}
