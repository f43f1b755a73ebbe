"""An exported artifact as a model source: our own pipeline, its networks in another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelops.errors import UsageError
from modelops.export.artifact import DENOISER, GRAPH, TEXT_ENCODER, verify_artifact
from modelops.export.graphs import RUNTIMES, Graph, RuntimeName, available_runtimes, open_graph
from modelops.export.openvino import openvino_has_bfloat16
from modelops.files import read_json
from modelops.models.sources import PipelineSource
from modelops.records import ArtifactRecord, SourceInfo


def open_artifact(
    directory: str | Path,
    *,
    runtime: str = "auto",
    batch_size: int = 16,
    threads: int | None = None,
    precision: str = "auto",
) -> PipelineSource:
    """Open an artifact after comparing every file with its digest. Nothing in it is executed.

    Args:
        directory: what `modelops export` wrote.
        runtime: "onnxruntime", "openvino", or "auto": the runtime that the artifact was made and
            measured for if it is installed and its pictures passed parity in it, else onnxruntime.
        batch_size: images per call of the pipeline.
        threads: CPU threads; all cores of this process when not given.
        precision: what nodes that are not INT8 run in: "float32", "bfloat16" (OpenVINO), or "auto":
            bfloat16 for INT8 artifacts in OpenVINO on a processor that has it, else float32.

    Returns:
        A source whose `pipeline` is a PixelFlowPipeline; its `info` names runtime and precision.

    Raises:
        UsageError: not a finished artifact; unknown runtime or precision; batch_size below 1.
        IntegrityError: a file differs from its digest.
        MissingExtraError: OpenVINO was asked for and is not installed.
        ExportError: the runtime refuses the graph.
    """
    if batch_size < 1:
        raise UsageError(f"batch size must be at least 1, got {batch_size}")
    if runtime not in ("auto", *RUNTIMES):
        raise UsageError(
            f"unknown runtime {runtime!r}", hint=f"choose one of auto, {', '.join(RUNTIMES)}"
        )
    record, digest = verify_artifact(directory)
    chosen = choose_runtime(record) if runtime == "auto" else _known(runtime)
    if precision == "auto":
        precision = default_precision(record.format, chosen)
    root = Path(directory)
    pipeline = artifact_pipeline(root, chosen, precision=precision, threads=threads)
    info = SourceInfo(
        kind="artifact",
        uri=str(directory),
        sha256=digest,
        runtime=f"{chosen}-{getattr(pipeline.unet.graph, 'device', 'cpu')}",
        precision=f"int8+{precision}" if record.format == "int8" else precision,
        details={"format": record.format, "chosen": "auto" if runtime == "auto" else "asked"},
    )
    return PipelineSource(pipeline, info, batch_size=batch_size)


def choose_runtime(record: ArtifactRecord) -> RuntimeName:
    """The runtime that "auto" takes for an artifact here."""
    wanted = _known(record.runtime)
    passed = all(check.passed for check in record.parity if check.name.endswith(f"/{wanted}"))
    return wanted if wanted in available_runtimes() and passed else "onnxruntime"


def default_precision(artifact_format: str, runtime: str) -> str:
    """What the nodes that are not INT8 run in when nobody says."""
    if artifact_format == "int8" and runtime == "openvino" and openvino_has_bfloat16():
        return "bfloat16"
    return "float32"


def artifact_pipeline(
    root: Path,
    runtime: RuntimeName,
    *,
    precision: str = "float32",
    threads: int | None = None,
) -> Any:
    """A PixelFlowPipeline over the graphs of a directory whose digests are not checked here.

    The text encoder always runs in float32: it runs once where the denoiser runs at every step.
    """
    denoiser = open_graph(root / DENOISER / GRAPH, runtime, precision=precision, threads=threads)
    text_encoder = open_graph(root / TEXT_ENCODER / GRAPH, runtime, threads=threads)
    return assemble(root, denoiser, text_encoder)


def assemble(root: Path, denoiser: Graph, text_encoder: Graph) -> Any:
    """A PixelFlowPipeline from a directory's tokenizer, scheduler and configs, and two graphs.

    Raises:
        UsageError: the configs are not those of a PixelFlowPipeline.
    """
    import diffusers
    from transformers import AutoTokenizer

    from modelops.export.modules import ExportedDenoiser, ExportedTextEncoder
    from modelops.models.pipeline import PixelFlowPipeline

    index = read_json(root / "model_index.json")
    name = str(index["scheduler"][1])
    scheduler_class: Any = getattr(diffusers, name, None)
    known = isinstance(scheduler_class, type) and issubclass(
        scheduler_class, diffusers.SchedulerMixin
    )
    if not known:
        raise UsageError(f"{root}: unknown scheduler {name!r}")
    own = {"patch_size", "max_text_tokens", "prediction", "default_steps", "default_guidance"}
    return PixelFlowPipeline(
        unet=ExportedDenoiser(denoiser, read_json(root / DENOISER / "config.json")),
        text_encoder=ExportedTextEncoder(
            text_encoder, read_json(root / TEXT_ENCODER / "config.json")
        ),
        tokenizer=AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
        scheduler=scheduler_class.from_pretrained(root / "scheduler"),
        **{name: value for name, value in index.items() if name in own},
    )


def _known(runtime: str) -> RuntimeName:
    return "openvino" if runtime == "openvino" else "onnxruntime"
