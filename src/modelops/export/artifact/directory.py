"""Directory of an exported artifact, and the check that it matches its record.

artifact.json                the ArtifactRecord; a directory without it is unfinished
COMPONENT/                   a folder for each network, named as the pipeline names it
  model.onnx                 the graph, and model.onnx.data with its weights if over 1.5 GB; or
                             model.pt (and model.pt2) of TorchScript
  signature.json             how the pipeline calls it
  config.json                as in the checkpoint
  probe.safetensors          of the denoiser: real inputs and torch's outputs, to choose a runtime
  engine.plan, engine.json, engine.layers.json   TensorRT only: the engine and its fingerprint
tokenizer/  scheduler/ ...   as in the checkpoint
model_index.json pipeline.py as in the checkpoint; pipeline.py documents, and is never run
calibration.json             INT8 only: the range of every quantised tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import read_json, safe_join, sha256_file, sha256_json, tree_files
from modelops.export.graphs.axes import read_multiples
from modelops.export.graphs.external import check_data, data_path, load_structure
from modelops.export.graphs.graph import RuntimeName
from modelops.models.pipelines.signatures import Signature
from modelops.records.base import InputRef
from modelops.records.export import ArtifactRecord, ExportedComponent
from modelops.records.read import read_record

RECORD = "artifact.json"
GRAPH = "model.onnx"


def is_artifact(directory: str | Path) -> bool:
    """Return whether a directory holds a finished artifact."""
    return (Path(directory) / RECORD).is_file()


def read_artifact(directory: str | Path) -> ArtifactRecord:
    """Read the record of an artifact, not yet verified.

    Raises:
        UsageError: there is no such directory, or no readable record in it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UsageError(f"{directory}: no such directory", hint="name an exported artifact")
    if not (root / RECORD).is_file():
        raise UsageError(
            f"{directory}: no {RECORD}: not an exported artifact, or an unfinished one",
            hint=f"modelops export CHECKPOINT --to onnx --out {directory}",
        )
    return read_record(root / RECORD, ArtifactRecord)


def verify_artifact(
    directory: str | Path, digests: Mapping[str, str] | None = None
) -> tuple[ArtifactRecord, str]:
    """Compare every file of an artifact with its digest in artifact.json.

    Args:
        directory: of the artifact.
        digests: posix path of each file in it, to its sha256, if they are known.

    Returns:
        The record and the sha256 of the whole directory (as `files.sha256_tree` gives it).

    Raises:
        UsageError: the directory is not a finished artifact.
        IntegrityError: a file is missing, added or different by a byte, or a graph takes weights
            from another place than its own data file.
    """
    record = read_artifact(directory)
    root = Path(directory)
    promised = _promised(record)
    for name in promised:
        safe_join(root, name)
    digests = digests or {name: sha256_file(path) for name, path in tree_files(root).items()}
    for name in sorted((set(digests) | set(promised)) - {RECORD}):
        if name not in digests:
            fault = "is missing"
        elif name not in promised:
            fault = f"is not in {RECORD}"
        elif digests[name] != promised[name]:
            fault = f"differs from its digest in {RECORD}"
        else:
            continue
        raise IntegrityError(f"{root / name}: {fault}", hint="export it again")
    kept_outside = {item.file for item in record.components if item.data}
    for name in sorted(n for n in promised if n.endswith(".onnx")):
        if check_data(root / name) is None and name in kept_outside:
            raise IntegrityError(
                f"{root / name}: {RECORD} names a data file that it does not use",
                hint="export it again",
            )
    return record, sha256_json(digests)


def _promised(record: ArtifactRecord) -> dict[str, str]:
    """Return the sha256 of every file of an artifact but its record, by path relative to it."""
    promised = {item.file: item.sha256 for item in record.components}
    promised |= {item.data.path: item.data.sha256 for item in record.components if item.data}
    return promised | {name: reference.sha256 for name, reference in record.files.items()}


def check_destination(out_dir: str | Path, *, overwrite: bool) -> None:
    """Refuse a destination that is taken.

    Raises:
        UsageError: it exists and `overwrite` is not set, or it is not an artifact's directory, or
            holds a file that is not of the artifact.
    """
    out = Path(out_dir)
    if not out.exists():
        return
    if not overwrite:
        raise UsageError(f"{out_dir}: already exists", hint="add --overwrite, or name another")
    if not out.is_dir() or (any(out.iterdir()) and not is_artifact(out)):
        raise UsageError(
            f"{out_dir}: exists and is not an artifact, so it is not overwritten",
            hint="name another directory",
        )
    if is_artifact(out):
        ours = {*_promised(read_artifact(out)), RECORD}
        others = sorted(tree_files(out, empty_folders=False).keys() - ours)
        if others:
            raise UsageError(
                f"{out / others[0]}: not a file of the artifact, so it is not overwritten",
                hint="move it away, or name another directory",
            )


def other_files(root: Path, components: list[ExportedComponent]) -> dict[str, InputRef]:
    """Return name and digest of every file beside the components' graphs and the record."""
    graphs = {item.file for item in components} | {RECORD}
    graphs |= {item.data.path for item in components if item.data}
    return {
        name: InputRef(path=name, sha256=sha256_file(path))
        for name, path in tree_files(root).items()
        if name not in graphs
    }


def describe_graph(root: Path, name: str, *, precision: str) -> ExportedComponent:
    """Describe one component of an artifact from its graph file; weights are only hashed."""
    path = root / name / GRAPH
    model = load_structure(path)
    data = check_data(path, model)
    axes = [
        f"{value.name}[{index}]={dim.dim_param}"
        for value in model.graph.input
        for index, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_param
    ]
    return ExportedComponent(
        name=name,
        file=f"{name}/{GRAPH}",
        sha256=sha256_file(path),
        bytes=path.stat().st_size + (data.stat().st_size if data else 0),
        precision=precision,
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        dynamic_axes=axes,
        quantized_nodes=count_quantized(model),
        total_nodes=len(model.graph.node),
        data=InputRef(path=f"{name}/{data_path(path).name}", sha256=sha256_file(data))
        if data
        else None,
        axis_multiples=read_multiples(model),
    )


def count_quantized(model: Any) -> int:
    """Count a QDQ graph's nodes with int8 weights: fed by a DequantizeLinear of a constant."""
    constants = {item.name for item in model.graph.initializer}
    weights = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    return sum(
        node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and any(name in weights for name in node.input)
        for node in model.graph.node
    )


def portable_path(path: str | Path) -> str:
    """Return a path for a record: relative to the working directory, or the name if outside."""
    resolved = Path(path).resolve()
    here = Path.cwd().resolve()
    return resolved.relative_to(here).as_posix() if resolved.is_relative_to(here) else resolved.name


SIGNATURE = "signature.json"


ORT_CPU_GRAPH = "model.ort-cpu.onnx"


# Files that one runtime takes in place of a component's own.
VARIANTS: dict[str, RuntimeName] = {ORT_CPU_GRAPH: "onnxruntime", "model.pt2": "torch-export"}


def denoiser_of(record: ArtifactRecord) -> ExportedComponent:
    """Return the component that runs at every step.

    Raises:
        UsageError: the record has none.
    """
    for component in record.components:
        if component.role == "denoiser":
            return component
    raise UsageError("the artifact has no denoiser", hint="export it again")


def graph_file(root: Path, item: ExportedComponent, runtime: RuntimeName) -> Path:
    """Return the file of a component that a runtime opens: its own variant if there is one."""
    path = root / item.file
    for name, for_runtime in VARIANTS.items():
        if for_runtime == runtime and path.with_name(name).is_file():
            return path.with_name(name)
    return path


def read_signature(folder: Path) -> Signature:
    """Read the signature of the component in a folder.

    Raises:
        UsageError: there is no readable signature.json.
    """
    try:
        return Signature.model_validate(read_json(folder / SIGNATURE))
    except ValueError as error:
        raise UsageError(f"{folder / SIGNATURE}: not a signature", hint="export again") from error
