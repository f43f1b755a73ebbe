"""Export of a checkpoint to TorchScript and torch.export programs, compared like every export.

Every network becomes a TorchScript model.pt, so that the artifact runs as a whole; the networks
that make an image (denoiser, control, decoder) get a model.pt2 of torch.export as well. Both load
in plain torch, see `torchscript`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from modelops.base.errors import ExportError
from modelops.base.files import atomic_directory, check_writable, sha256_file, write_json
from modelops.export.artifact.directory import RECORD, SIGNATURE, check_destination
from modelops.export.calibration import DEFAULT_PROMPTS, check_prompts, own_prompts
from modelops.export.components import Component, find_components
from modelops.export.exporting import (
    PARITY_SEED,
    OnProgress,
    OnStage,
    Stages,
    about_files,
    about_source,
    carry_parts,
    catch_calls,
    config_of,
    prove,
)
from modelops.export.lora import Lora
from modelops.export.parity import BOUNDS, component_parity, require_parity
from modelops.export.runtimes.torchscript import (
    TorchGraph,
    write_exported_program,
    write_torchscript,
)
from modelops.export.source import both_sides, load_source
from modelops.records.export import ArtifactRecord, ExportedComponent

SCRIPT, PROGRAM = "model.pt", "model.pt2"  # `directory.VARIANTS` names the second
_ALSO_EXPORTED = ("denoiser", "control", "decoder")


def export_torchscript(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    size: tuple[int, int] | None = None,
    lora: Lora | None = None,
    allow: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> ArtifactRecord:
    """Export a checkpoint's networks for plain torch, in float32; else as `to_onnx.export_onnx`.

    A network that torch.export cannot capture has no model.pt2; `execution` in the record holds the
    reason.
    """
    check_prompts(prompts)
    started, clock = datetime.now(UTC), time.monotonic()
    check_destination(out_dir, overwrite=overwrite)
    stages = Stages(5, on_stage=on_stage, on_progress=on_progress)
    stages.begin("watching the pipeline")
    source = load_source(checkpoint, size=size, lora=lora)
    texts = own_prompts(source.traits, prompts)
    check_writable(Path(out_dir).parent, need_bytes=3 * source.bytes_total)
    components = find_components(
        source.pipeline,
        size=both_sides(source.size),
        traits=source.traits,
        on_progress=stages.count,
    )
    with atomic_directory(out_dir) as root:
        axes: dict[str, list[str]] = {}
        programs: dict[str, str] = {}
        stages.begin("writing programs")
        for done, component in enumerate(components):
            stages.count(done, len(components))
            folder = root / component.name
            folder.mkdir()
            axes[component.name] = write_torchscript(
                component.flat, component.example, folder / SCRIPT, outputs=component.outputs
            )
            if component.role in _ALSO_EXPORTED:
                programs[component.name] = _write_program(component, folder)
            write_json(folder / SIGNATURE, component.signature.model_dump(mode="json"))
            config = config_of(getattr(source.pipeline, component.attribute))
            write_json(folder / "config.json", config)
        carry_parts(source, root)
        stages.begin("drawing with the source")
        calls = catch_calls(source, components, texts)
        graphs = {c.name: TorchGraph(root / c.name / SCRIPT) for c in components}
        checks, error_by_noise = prove(
            source, root, components, graphs, calls, BOUNDS["float32"], texts, stages
        )
        for component in components:
            path = root / component.name / PROGRAM
            if path.is_file():
                feeds = calls.feeds[component.name]
                checks += component_parity(component, TorchGraph(path), feeds, BOUNDS["float32"])
        waiver = require_parity(checks, allow=allow)
        described = [_describe(root, component, axes[component.name]) for component in components]
        record = ArtifactRecord(
            format="torchscript",
            precision="float32",
            runtime="torchscript",
            error=waiver,
            seeds={"parity": PARITY_SEED},
            started_at=started,
            parity=checks,
            error_by_noise=error_by_noise,
            execution={"torch-export": programs},
            duration_s=time.monotonic() - clock,
            **about_source(checkpoint, source, lora),
            **about_files(root, described),
        )
        record.write(root / RECORD)
    stages.end()
    return record


def _write_program(component: Component, folder: Path) -> str:
    """Write a network's model.pt2; return its dynamic axes, or the reason why there is none."""
    try:
        axes = write_exported_program(
            component.flat, component.example, folder / PROGRAM, outputs=component.outputs
        )
    except ExportError as error:
        (folder / PROGRAM).unlink(missing_ok=True)
        return f"none: {error.message}"
    return f"dynamic axes: {', '.join(axes) or 'none'}"


def _describe(root: Path, component: Component, axes: list[str]) -> ExportedComponent:
    path = root / component.name / SCRIPT
    return ExportedComponent(
        name=component.name,
        attribute=component.attribute,
        role=component.role,
        file=f"{component.name}/{SCRIPT}",
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        precision="float32",
        dynamic_axes=axes,
    )
