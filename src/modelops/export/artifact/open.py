"""Opening of an exported artifact as a model source: its pipeline with networks in a runtime."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modelops.base.errors import UsageError, first_line
from modelops.base.extras import missing_package
from modelops.base.files import read_json
from modelops.base.private import PrivateCopy, private_copy
from modelops.base.trust import require_trust
from modelops.export.artifact.directory import (
    denoiser_of,
    graph_file,
    read_artifact,
    read_signature,
    verify_artifact,
)
from modelops.export.graphs.graph import RUNTIMES, RUNTIMES_OF, Graph, RuntimeName
from modelops.export.runtimes.modules import ExportedControl, ExportedModule, Part, library_class
from modelops.export.runtimes.open import open_graph
from modelops.models.pipelines.signatures import Method
from modelops.models.pipelines.watch import OMITTED
from modelops.models.pretrained import load_part
from modelops.models.sources import PipelineSource
from modelops.records.evaluation import SourceInfo
from modelops.records.export import ArtifactRecord

OWN_PIPELINE = "PixelFlowPipeline"


def open_artifact(
    directory: str | Path,
    *,
    runtime: str = "auto",
    batch_size: int = 16,
    threads: int | None = None,
    precision: str = "auto",
    device_id: int = 0,
    sha256: str | None = None,
    store: Path | None = None,
) -> PipelineSource:
    """Open an artifact after comparing every file with its digest.

    What is opened is a private copy: later changes of the directory change nothing.

    Nothing in an ONNX, INT8 or TensorRT artifact is executed. One of TorchScript or .pt2 programs
    is code; it is opened only for callers who trust it, see `base.trust`.

    Args:
        directory: an artifact that `modelops export` wrote.
        runtime: one of RUNTIMES, or "auto": the fastest one that gives the artifact's gated numbers
            here; see `choice.choose_runtime`. A named runtime must give them, too.
        batch_size: images per call of the pipeline.
        threads: CPU threads; all cores of this process when not given.
        precision: of the nodes that are not INT8: "float32", "bfloat16" (OpenVINO), or "auto", see
            `served_precision`.
        device_id: CUDA device, for a runtime that computes on one.
        sha256: digest that the directory must have.
        store: see `private_copy`.

    Returns:
        A source over the pipeline of the checkpoint's own class; its `info` names the runtime, the
        precision and the reason for this runtime.

    Raises:
        UsageError: not a finished artifact; unknown runtime or precision; batch_size below 1; code
            that nobody said to trust.
        IntegrityError: a file differs from its digest.
        MissingExtraError: OpenVINO was asked for and is not installed.
        NotReproducedError: no runtime here gives the artifact's numbers.
        ExportError: the runtime refuses the graph.
    """
    if batch_size < 1:
        raise UsageError(f"batch size must be at least 1, got {batch_size}")
    if runtime not in ("auto", *RUNTIMES):
        raise UsageError(
            f"unknown runtime {runtime!r}", hint=f"choose one of auto, {', '.join(RUNTIMES)}"
        )
    if runtime == "onnxruntime" and precision not in ("auto", "float32"):
        raise UsageError("onnxruntime computes as the graph says", hint="--runtime openvino")
    read_artifact(directory)  # says what is wrong before anything is copied
    with private_copy(directory, sha256=sha256, store=store) as copy:
        source = _open_copy(
            copy, str(directory), runtime=runtime, precision=precision, batch_size=batch_size,
            threads=threads, device_id=device_id,
        )  # fmt: skip
        copy.keep_for(source.pipeline)
    return source


def _open_copy(
    copy: PrivateCopy,
    uri: str,
    *,
    runtime: str,
    precision: str,
    batch_size: int,
    threads: int | None,
    device_id: int,
) -> PipelineSource:
    from modelops.export.artifact.choice import choose_runtime

    root = copy.path
    record, digest = verify_artifact(root, copy.files)
    if record.format == "torchscript":
        require_trust(root)
    if runtime not in ("auto", *RUNTIMES_OF[record.format]):
        raise UsageError(
            f"{root}: {runtime} does not run artifacts in {record.format}",
            hint=f"--runtime {' or '.join(RUNTIMES_OF[record.format])}",
        )
    choice = choose_runtime(
        root, record, digest, runtime=runtime, precision=precision, threads=threads,
        device_id=device_id,
    )  # fmt: skip
    chosen, precision = choice.runtime, choice.precision
    pipeline = artifact_pipeline(
        root, record, chosen, precision=precision, threads=threads, device_id=device_id
    )
    denoiser = pipeline.components[denoiser_of(record).attribute]
    rest = precision if record.format == "int8" else record.precision
    info = SourceInfo(
        kind="artifact", uri=uri, sha256=digest,
        runtime=f"{chosen}-{denoiser.device.type}",
        precision=f"int8+{rest}" if record.format == "int8" else rest,
        details={"format": record.format, **choice.details},
    )  # fmt: skip
    return PipelineSource(pipeline, info, batch_size=batch_size)


def artifact_pipeline(
    root: Path,
    record: ArtifactRecord,
    runtime: RuntimeName,
    *,
    precision: str = "float32",
    threads: int | None = None,
    device_id: int = 0,
) -> Any:
    """Return the pipeline over the graphs of a directory, whose digests are not checked here.

    All networks but the denoiser run in float32: they run once, the denoiser at every step.
    """
    graphs = {
        item.name: open_graph(
            graph_file(root, item, runtime), runtime, threads=threads, device_id=device_id,
            precision=precision if item.role == "denoiser" else "float32",
        )
        for item in record.components
    }  # fmt: skip
    return assemble(root, graphs)


def assemble(root: Path, graphs: Mapping[str, Graph]) -> Any:
    """Assemble a pipeline from a directory's model_index.json and its networks' graphs.

    Args:
        root: holds model_index.json, tokenizers, the scheduler, and a folder for each graph with
            its signature.json and config.json.
        graphs: name of a component's folder to its graph.

    Raises:
        UsageError: the pipeline or one of its parts is of a class that is not known.
    """
    index = read_json(root / "model_index.json")
    pipeline_class = _pipeline_class(index)
    parts: dict[str, dict[Method, Part]] = {}
    for name, graph in graphs.items():
        signature = read_signature(root / name)
        attribute = _attribute_of(name, signature.method)
        parts.setdefault(attribute, {})[signature.method] = (graph, signature)
    expected = set(inspect.signature(pipeline_class.__init__).parameters)
    given: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_") or name not in expected:
            continue
        is_part = isinstance(value, list) and len(value) == 2
        if not is_part:
            given[name] = value
        elif value[0] is None or name in OMITTED:
            given[name] = None
        elif name in parts:
            config = read_json(root / _folder_of(name, parts[name]) / "config.json")
            kind = ExportedControl if "ControlNet" in value[1] else ExportedModule
            given[name] = kind(parts[name], config, library=value[0], class_name=value[1])
        else:
            given[name] = _load_part(root / name, *value)
    if "requires_safety_checker" in given:
        given["requires_safety_checker"] = False  # modelops' own filters stand in for it
    return _placed(pipeline_class(**given), next(iter(graphs.values())).device)


def _placed(pipeline: Any, device: str) -> Any:
    """Make the pipeline report that it computes on `device`: diffusers asks its torch modules at
    every call, and it has none."""
    kind, place = type(pipeline), torch.device(device)
    said = property(lambda self: place)
    members = {"__module__": kind.__module__, "device": said, "_execution_device": said}
    pipeline.__class__ = type(kind.__name__, (kind,), members)
    return pipeline


def _attribute_of(name: str, method: Method) -> str:
    return name if method == "forward" else name.removesuffix(f"_{method}r")


def _folder_of(attribute: str, parts: Mapping[Method, Part]) -> str:
    method = next(iter(parts))
    return attribute if method == "forward" else f"{attribute}_{method}r"


def _pipeline_class(index: dict[str, Any]) -> Any:
    import diffusers

    name = index.get("_class_name")
    if isinstance(name, list):  # [module, class]: a checkpoint that brings its own code
        name = name[-1]
    if name == OWN_PIPELINE:
        from modelops.export.runtimes.flow import ExportedFlowPipeline

        return ExportedFlowPipeline
    found = library_class("diffusers", str(name))
    if not issubclass(found, diffusers.DiffusionPipeline):
        raise UsageError(f"{name!r} is not a diffusers pipeline")
    return found


def _load_part(folder: Path, library: str, class_name: str) -> Any:
    """Load a tokenizer, scheduler or image processor."""
    if folder.name.startswith("tokenizer") and library == "transformers":
        class_name = "AutoTokenizer"
    part = library_class(library, class_name)
    if not hasattr(part, "from_pretrained"):
        raise UsageError(f"{folder}: {class_name} cannot be loaded")
    try:
        return load_part(part, folder)
    except ImportError as error:
        raise missing_package(error, needed_for=f"{folder}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder}: cannot be loaded: {first_line(error)}", hint="export it again"
        ) from error
