"""Source checkpoint of an export: any diffusers pipeline in float32 torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelops.base.errors import ExportError, UsageError, first_line
from modelops.base.files import sha256_file, sha256_json, sha256_tree, tree_files
from modelops.export.artifact.directory import is_artifact, read_signature
from modelops.export.components import Component, FlatModule
from modelops.export.lora import Lora, apply_lora
from modelops.export.onnx.writer import check_weights
from modelops.models.hub import pipeline_directory
from modelops.models.pipelines.observe import find_traits
from modelops.models.pipelines.traits import Traits
from modelops.models.sources import TRAINING_STATE, load_with_digest
from modelops.records.export import ArtifactRecord, ExportedComponent


@dataclass(frozen=True)
class ExportSource:
    """Loaded checkpoint.

    Attributes:
        pipeline: float32, in evaluation mode, on the CPU.
        sha256: digest of the checkpoint without its training state (and of the LoRA).
        bytes_total: size of the checkpoint without its training state.
        directory: path of the checkpoint; of its snapshot in the cache for a hub id.
        size: height and width in pixels that it is exported and compared at.
        traits: of the pipeline.
    """

    pipeline: Any
    sha256: str
    bytes_total: int
    directory: Path
    size: tuple[int | None, int | None]
    traits: Traits


def load_source(
    checkpoint: str | Path, *, size: tuple[int, int] | None = None, lora: Lora | None = None
) -> ExportSource:
    """Load a checkpoint to export.

    Raises:
        UsageError: neither a directory with a checkpoint nor an available hub id, weights are
            missing, or a size for a pipeline that takes none.
        ExportError: the checkpoint cannot be loaded, or weights are not finite.
    """
    directory = pipeline_directory(checkpoint)
    if is_artifact(directory):
        raise UsageError(
            f"{checkpoint}: an exported artifact, not a checkpoint",
            hint="name the checkpoint it was made from",
        )
    try:
        pipeline, digest = load_with_digest(directory)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ExportError(
            f"{checkpoint}: cannot be loaded: {first_line(error)}",
            hint="is the checkpoint complete?",
        ) from error
    if lora is not None:
        apply_lora(pipeline, lora)
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            module.eval()
            check_weights(module, f"{checkpoint}: {name}")
            if name.startswith("text_encoder") and hasattr(module, "set_attn_implementation"):
                # torch's fused attention has a form that the exporter cannot write for T5.
                set_attention: Any = module.set_attn_implementation
                set_attention("eager")
    pipeline.set_progress_bar_config(disable=True)
    traits = find_traits(pipeline)
    if size and traits.own_size == (None, None):
        raise UsageError(
            f"{type(pipeline).__name__} makes images of one size only", hint="leave --size out"
        )
    files = tree_files(directory, exclude=[TRAINING_STATE]).values()
    total = sum(path.stat().st_size for path in files)
    if lora is not None:
        parts = {"checkpoint": digest, "lora": _digest_of(lora.path), "fused": lora.fused}
        digest = sha256_json({**parts, "scale": lora.scale})
    return ExportSource(
        pipeline=pipeline,
        sha256=digest,
        bytes_total=total,
        directory=directory,
        size=size or traits.own_size,
        traits=traits,
    )


def component_from(pipeline: Any, folder: Path, exported: ExportedComponent) -> Component:
    """Return the torch network of an artifact's graph, without probing again."""
    signature = read_signature(folder)
    if exported.role == "":
        raise UsageError(f"{folder}: of an older export", hint="export it again")
    return Component(
        name=exported.name,
        attribute=exported.attribute,
        role=exported.role,
        flat=FlatModule(getattr(pipeline, exported.attribute), signature).eval(),
        example={},
        outputs={name: {} for name in signature.outputs},
        signature=signature,
    )


def lora_of(record: ArtifactRecord) -> Lora | None:
    """Return the low-rank weights that an artifact was exported with, to load its source again."""
    if "lora" not in record.inputs:
        return None
    return Lora(
        Path(record.inputs["lora"].path),
        fused=bool(record.lora.get("fused", True)),
        scale=float(record.lora.get("scale", 1.0)),
    )


def size_of(record: ArtifactRecord) -> tuple[int | None, int | None]:
    """Return the height and width that an artifact was exported at."""
    return (record.size[0], record.size[1]) if len(record.size) == 2 else (None, None)


def both_sides(size: tuple[int | None, int | None]) -> tuple[int, int] | None:
    """Return height and width if both are known."""
    return (size[0], size[1]) if size[0] and size[1] else None


def _digest_of(path: Path) -> str:
    return sha256_file(path) if path.is_file() else sha256_tree(path)
