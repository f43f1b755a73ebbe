"""Export of an fp32 artifact to INT8: calibration, search, comparison, proof and timing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelops.base.errors import ExportError, IntegrityError, UsageError
from modelops.base.files import atomic_directory, check_writable
from modelops.export.artifact.directory import (
    RECORD,
    check_destination,
    denoiser_of,
    describe_graph,
    portable_path,
    verify_artifact,
)
from modelops.export.calibration import DEFAULT_PROMPTS, check_prompts, own_prompts
from modelops.export.exporting import OnProgress, OnStage, Stages, about_files, about_source
from modelops.export.int8.accept import require_budget, require_faster
from modelops.export.int8.job import Int8Job
from modelops.export.int8.options import Int8Options
from modelops.export.parity import require_parity
from modelops.export.source import both_sides, load_source, lora_of, size_of
from modelops.records.base import InputRef
from modelops.records.export import ArtifactRecord, ExportedComponent

__all__ = ["Int8Options", "export_int8", "refused_record"]


def export_int8(
    onnx_dir: str | Path,
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    seed: int = 0,
    options: Int8Options | None = None,
    allow: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> ArtifactRecord:
    """Quantise the denoiser of an fp32 artifact to symmetric INT8 (S8S8 QDQ).

    The search finds the fastest set of quantised groups of layers within an error budget. If
    outputs or images still differ too much on rows and noise that the search did not use, more
    groups are given up, those with most error first. Everything but the denoiser stays as it is.

    Args:
        onnx_dir: the float32 artifact of `export_onnx` from the same checkpoint.
        checkpoint: its trajectories calibrate, and its images are the reference.
        out_dir: the artifact's directory.
        prompts: for calibration; parity uses the same prompts with other noise.
        seed: of the calibration noise and of the choice of rows.
        options: options of the quantisation; Int8Options() when not given.
        allow: keep an export that is outside its bounds or not faster, and record the waiver.
        overwrite: replace an artifact that is there.
        on_progress: called with (done, of how many), see `Stages`.
        on_stage: called with (name, number from 1, stages) when a stage begins.

    Returns:
        The record that is also in the directory as artifact.json.

    Raises:
        UsageError: onnx_dir is not an fp32 artifact, out_dir is taken, no prompts.
        IntegrityError: onnx_dir is damaged or was made from another checkpoint.
        ExportError: a broken QDQ rule, no INT8 in the runtime, outputs or images too far off, an
            error above its budget, or a graph that is not surely faster than the fp32 one. What was
            measured until then is kept in a record, see `refused_record`.
        ModelopsError: not enough disk, here or among the temporary files.
    """
    check_prompts(prompts)
    options = options or Int8Options()
    stages = Stages(8, on_stage=on_stage, on_progress=on_progress)
    started, clock = datetime.now(UTC), time.monotonic()
    check_destination(out_dir, overwrite=overwrite)
    fp32, fp32_sha256 = verify_artifact(onnx_dir)
    if fp32.format != "onnx" or fp32.precision != "float32":
        raise UsageError(
            f"{onnx_dir}: a {fp32.precision} {fp32.format} artifact",
            hint="name the float32 onnx artifact",
        )
    lora = lora_of(fp32)
    stages.begin("loading")
    source = load_source(checkpoint, size=both_sides(size_of(fp32)), lora=lora)
    texts = own_prompts(source.traits, prompts)
    if fp32.inputs["checkpoint"].sha256 != source.sha256:
        raise IntegrityError(
            f"{onnx_dir}: was not exported from {checkpoint}", hint="export it to onnx again"
        )
    check_writable(Path(out_dir).parent, need_bytes=2 * fp32.bytes_total)
    # Candidates and the smoothed graph; what they take is only known while they are written.
    check_writable(tempfile.gettempdir(), need_bytes=3 * denoiser_of(fp32).bytes)
    refused = refused_record(out_dir)
    with atomic_directory(out_dir) as root, tempfile.TemporaryDirectory() as scratch:
        job = Int8Job(source, Path(onnx_dir), root, Path(scratch), fp32, texts, seed, options)

        def record(error: str | None, **files: Any) -> ArtifactRecord:
            made = ArtifactRecord(
                format="int8", runtime=job.runtime, error=error, started_at=started,
                seeds={"calibration": seed, "search": seed + 1, "parity": seed + 2},
                duration_s=time.monotonic() - clock,
                **{
                    **about_source(checkpoint, source, lora),
                    "source_bytes_total": fp32.bytes_total,
                },
                **job.measured(), **files,
            )  # fmt: skip
            made.inputs["onnx"] = InputRef(path=portable_path(onnx_dir), sha256=fp32_sha256)
            return made

        try:
            waived = _quantise(job, stages, allow=allow)
        except ExportError as error:
            found = record(error.message)
            found.status = "refused" if job.checks else "failed"
            found.write(refused)
            raise
        components = [
            _describe(root, item, precision="int8" if item.role == "denoiser" else "float32")
            for item in fp32.components
        ]
        artifact = record(waived, **about_files(root, components))
        artifact.write(root / RECORD)
    refused.unlink(missing_ok=True)
    stages.end()
    return artifact


def refused_record(out_dir: str | Path) -> Path:
    """Return the path of a refused INT8 export's record, beside the directory not made."""
    out = Path(out_dir)
    return out.with_name(f"{out.name}.refused.json")


def _quantise(job: Int8Job, stages: Stages, *, allow: bool) -> str | None:
    """Run all stages of a job; return what `allow` waived.

    Raises:
        ExportError: the graph is refused, or could not be made.
    """
    job.carry()
    stages.begin("calibrating")
    job.calibrate(stages.count)
    stages.begin("smoothing")
    job.smooth()
    stages.begin("measuring what rounding each group changes")
    job.scan(stages.count)
    stages.begin("searching the groups to quantise")
    job.search(stages.count)
    stages.begin("quantising and comparing")
    job.quantise_within_bounds()
    waived = [
        require_parity(job.checks, allow=allow),
        require_budget(job.error, job.found, allow=allow),
    ]
    stages.begin("proving that INT8 runs")
    job.prove()
    job.reproduce()
    stages.begin("measuring speed")
    job.measure_speed()
    waived.append(require_faster(job.speed, job.found.table, allow=allow))
    job.measure_noise()
    return "; ".join(text for text in waived if text) or None


def _describe(root: Path, item: ExportedComponent, *, precision: str) -> ExportedComponent:
    return describe_graph(root, item.name, precision=precision).model_copy(
        update={"attribute": item.attribute, "role": item.role, "shapes": item.shapes}
    )
