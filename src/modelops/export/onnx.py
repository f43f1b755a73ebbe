"""Checkpoint to ONNX: every network through torch.export, and proof that they are equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from modelops.environment import current_environment
from modelops.errors import ExportError, UsageError
from modelops.export.artifact import (
    DENOISER,
    GRAPH,
    RECORD,
    TEXT_ENCODER,
    carry_over,
    check_destination,
    describe_graph,
    is_artifact,
    other_files,
    portable_path,
)
from modelops.export.calibration import DEFAULT_PROMPTS, check_prompts, collect_rows
from modelops.export.onnxruntime import OrtGraph
from modelops.export.parity import (
    BOUNDS,
    denoiser_parity,
    image_parity,
    require_parity,
    text_encoder_parity,
)
from modelops.export.runtime import assemble
from modelops.export.writer import Example, write_graph
from modelops.files import atomic_directory, check_writable, sha256_tree, tree_files, write_json
from modelops.models.sources import TRAINING_STATE, load_checkpoint
from modelops.records import ArtifactRecord, InputRef

MAX_OPSET = 20  # from 21 on, S8S8 MatMul + Add can fail when a session is created
_PARITY_SEED = 20
Stage = Callable[[int, int], None]


def export_onnx(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    opset: int = MAX_OPSET,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    allow: bool = False,
    overwrite: bool = False,
    on_progress: Stage | None = None,
) -> ArtifactRecord:
    """Export a checkpoint's networks in float32 and compare them with their source.

    The directory appears only when everything is written and compared.

    Args:
        checkpoint: a diffusers directory of a PixelFlowPipeline.
        out_dir: the artifact's directory.
        opset: of the graphs, 18 to 20.
        prompts: what parity is measured with.
        allow: keep an export that is outside its parity bounds and record the waiver.
        overwrite: replace an artifact that is there.
        on_progress: called with (stages done, stages).

    Returns:
        The record that is also in the directory as artifact.json.

    Raises:
        UsageError: not a checkpoint, out_dir is taken, opset out of range.
        ExportError: weights that are missing or not finite, an operator without an ONNX form, or an
            export that differs from its source.
    """
    if not 18 <= opset <= MAX_OPSET:
        raise UsageError(f"opset must be 18 to {MAX_OPSET}, got {opset}")
    texts = check_prompts(prompts)
    started, clock = datetime.now(UTC), time.monotonic()
    check_destination(out_dir, overwrite=overwrite)
    pipeline, source_sha256 = load_source(checkpoint)
    source_bytes = checkpoint_bytes(checkpoint)
    check_writable(Path(out_dir).parent, need_bytes=2 * source_bytes)
    tick = _ticker(on_progress, 4)
    with atomic_directory(out_dir) as root:
        write_denoiser(pipeline, root / DENOISER, opset=opset)
        tick()
        write_text_encoder(pipeline, root / TEXT_ENCODER, opset=opset)
        carry_over(Path(checkpoint), root)
        tick()
        denoiser, text_encoder = (OrtGraph(root / n / GRAPH) for n in (DENOISER, TEXT_ENCODER))
        rows = collect_rows(
            pipeline, denoiser.input_names, prompts=texts[:8], seed=_PARITY_SEED, purpose="parity",
            steps=8, rows=32,
        )  # fmt: skip
        checks = denoiser_parity(pipeline.unet, denoiser, rows, BOUNDS["float32"])
        checks += text_encoder_parity(pipeline, text_encoder, texts)
        tick()
        checks.append(
            image_parity(
                pipeline, assemble(root, denoiser, text_encoder), name="images/onnxruntime",
                prompts=texts[:4], seed=_PARITY_SEED, bounds=BOUNDS["float32"],
            )
        )  # fmt: skip
        waiver = require_parity(checks, allow=allow)
        components = [
            describe_graph(root, name, precision="float32") for name in (DENOISER, TEXT_ENCODER)
        ]
        record = ArtifactRecord(
            format="onnx",
            precision="float32",
            runtime="onnxruntime",
            error=waiver,
            inputs={"checkpoint": InputRef(path=portable_path(checkpoint), sha256=source_sha256)},
            seeds={"parity": _PARITY_SEED},
            environment=current_environment(),
            started_at=started,
            components=components,
            parity=checks,
            files=other_files(root, components),
            bytes_total=sum(path.stat().st_size for path in tree_files(root).values()),
            source_bytes_total=source_bytes,
            duration_s=time.monotonic() - clock,
        )
        record.write(root / RECORD)
        tick()
    return record


def write_denoiser(pipeline: Any, folder: Path, *, opset: int) -> None:
    """Write the denoiser's model.onnx and config.json; the same weights give the same bytes."""
    write_graph(
        _Denoiser(pipeline.unet), _denoiser_example(pipeline), folder / GRAPH, opset=opset,
        outputs={"velocity": {0: "batch", 2: "height", 3: "width"}},
    )  # fmt: skip
    config = {k: v for k, v in dict(pipeline.unet.config).items() if k != "_name_or_path"}
    write_json(folder / "config.json", config)


def write_text_encoder(pipeline: Any, folder: Path, *, opset: int) -> None:
    """Write the text encoder's model.onnx and config.json."""
    write_graph(
        _TextEncoder(pipeline.text_encoder), _text_example(pipeline), folder / GRAPH, opset=opset,
        outputs={"last_hidden_state": {0: "batch", 1: "tokens"}},
    )  # fmt: skip
    config = pipeline.text_encoder.config.to_dict()
    config.pop("_name_or_path", None)  # where the checkpoint lay
    write_json(folder / "config.json", config)


def load_source(checkpoint: str | Path) -> tuple[Any, str]:
    """A checkpoint as a float32 torch pipeline in evaluation mode, and its digest.

    Raises:
        UsageError: not a directory with a checkpoint.
        ExportError: of another pipeline, or with weights that are missing or not finite.
    """
    directory = Path(checkpoint)
    if not directory.is_dir():
        raise UsageError(f"{checkpoint}: no such directory", hint="name a checkpoint's directory")
    if is_artifact(directory):
        raise UsageError(
            f"{checkpoint}: an exported artifact, not a checkpoint",
            hint="name the checkpoint it was made from",
        )
    digest = sha256_tree(directory, exclude=[TRAINING_STATE])
    try:
        pipeline = load_checkpoint(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"{checkpoint}: cannot be loaded: {str(error).splitlines()[0]}",
            hint="is the checkpoint complete?",
        ) from error
    if type(pipeline).__name__ != "PixelFlowPipeline":  # diffusers loads its own copy of the class
        raise ExportError(
            f"{checkpoint}: a {type(pipeline).__name__}; only PixelFlowPipeline can be exported"
        )
    for name, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        module.eval()
        for key, value in module.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ExportError(f"{checkpoint}: {name} has a weight that is not finite: {key}")
    return pipeline, digest


def checkpoint_bytes(checkpoint: str | Path) -> int:
    """Bytes of a checkpoint without its training state."""
    files = tree_files(checkpoint, exclude=[TRAINING_STATE]).values()
    return sum(path.stat().st_size for path in files)


class _Denoiser(torch.nn.Module):
    """A UNet with the graph's inputs as positions: timestep [N], so rows may differ in noise."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        output: torch.Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels=class_labels,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
        return output


class _TextEncoder(torch.nn.Module):
    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask
        )[0]
        return output


def _denoiser_example(pipeline: Any) -> Example:
    channels, height, width = pipeline.latent_shape(pipeline.resolution, pipeline.resolution)
    text_dim = int(pipeline.text_encoder.config.hidden_size)
    tokens = int(pipeline.config["max_text_tokens"])
    generator = torch.Generator().manual_seed(0)
    example: Example = {
        "sample": (
            torch.randn(2, channels, height, width, generator=generator),
            {0: "batch", 2: "height", 3: "width"},
        ),
        "timestep": (torch.tensor([250.0, 750.0]), {0: "batch"}),
        "class_labels": (torch.randn(2, text_dim, generator=generator), {0: "batch"}),
    }
    if pipeline.uses_tokens:
        example["encoder_hidden_states"] = (
            torch.randn(2, tokens, text_dim, generator=generator), {0: "batch", 1: "tokens"}
        )  # fmt: skip
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[1, tokens // 2 :] = 0
        example["encoder_attention_mask"] = (mask, {0: "batch", 1: "tokens"})
    return example


def _text_example(pipeline: Any) -> Example:
    encoded = pipeline.tokenizer(
        ["a red heart", "two words more than that"], padding="max_length", return_tensors="pt",
        max_length=pipeline.config["max_text_tokens"], truncation=True,
    )  # fmt: skip
    axes = {0: "batch", 1: "tokens"}
    return {name: (encoded[name], axes) for name in ("input_ids", "attention_mask")}


def _ticker(on_progress: Stage | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, total)

    return tick
