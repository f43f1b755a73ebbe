"""train.json and report.md: a run's counters and rows as a record."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from modelops.base.environment import current_environment
from modelops.metrics.overfitting import find_overfitting, rows_to_losses
from modelops.records.train import TrainRecord, read_stats
from modelops.training.config import RunSpec

from .checkpoint import Progress, checkpoint_refs
from .devices import device_name
from .report import loss_trend, write_report
from .run import Run
from .stats import event, memory_gb


def write_record(
    spec: RunSpec,
    run_dir: Path,
    run: Run | None,
    status: Any,
    error: str | None = None,
    *,
    started_at: datetime,
    seconds: float,
) -> None:
    """Write train.json, report.md and loss.png of a run that has ended, however it did.

    Args:
        spec: config.json.
        run_dir: the run's folder.
        run: None if it ended while it was set up.
        status: "ok" or "failed".
        error: what went wrong.
        started_at, seconds: of this process.
    """
    config = spec.config
    progress = run.progress if run else Progress(effective_batch=spec.effective_batch)
    rows = read_stats(run_dir / "stats.jsonl")
    values = {
        name: [row[name] for row in rows if name in row]
        for name in ("loss", "validation_loss", "train_probe_loss")
    }
    last = {name: column[-1] if column else None for name, column in values.items()}
    overfitting = find_overfitting(rows_to_losses(rows))
    record = TrainRecord(
        status=status,
        error=error,
        inputs=dict(spec.inputs),
        seeds={"training": config.training.seed},
        environment=current_environment(),
        started_at=started_at,
        duration_s=round(seconds, 3),
        run_name=spec.run_name,
        effective_batch=progress.effective_batch,
        steps=progress.step,
        images_seen=progress.images_seen,
        final_train_loss=last["loss"],
        final_validation_loss=last["validation_loss"],
        final_train_probe_loss=last["train_probe_loss"],
        overfitting_since_step=overfitting.since.step if overfitting else None,
        loss_trend=loss_trend(values["loss"]),
        training_seconds=round(progress.training_seconds, 3),
        setup_seconds=round(progress.setup_seconds, 3),
        time_limit_seconds=config.training.time_limit_seconds,
        checkpoints=checkpoint_refs(run_dir / "checkpoints", progress),
        config_sha256=spec.config_sha256,
        planned_steps=progress.total_steps or None,
        sessions=progress.sessions,
        processes=spec.processes,
        precision=progress.precision,
        precision_reason=progress.precision_reason,
        precision_images_per_second=progress.precision_rates,
        warnings=[
            *_warnings_of_data(run),
            *progress.warnings,
            *([str(overfitting)] if overfitting else []),
        ],
        **(_of_parts(run) if run else {"parameters": 0}),
    )
    record.write(run_dir / "train.json")
    write_report(run_dir, record, config)
    event("end", status=status, step=progress.step, total=progress.total_steps)


def _of_parts(run: Run) -> dict[str, Any]:
    parts, pictures = run.parts, run.parts.material.pictures
    return {
        "parameters": sum(weight.numel() for weight in parts.network.parameters()),
        "stop_reason": run.stop_reason,
        "device": device_name(parts.device),
        "images_per_second": None if run.rate is None else round(run.rate, 2),
        "peak_memory_gb": round(memory_gb(parts.device), 3),
        "n_train_images": len(pictures.train),
        "n_validation_images": len(parts.material.held_out or ()),
        "quarantined": pictures.quarantined,
        "captions": parts.material.captions,
    }


def _warnings_of_data(run: Run | None) -> list[str]:
    if run is None:
        return []
    material = run.parts.material
    return [line for line in (material.pictures.warning, material.captions.warning) if line]
