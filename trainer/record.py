"""train.json and report.md: a run's counters and rows as a record."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from modelops.base.environment import current_environment
from modelops.metrics.overfitting import find_overfitting, rows_to_losses
from modelops.records.train import TrainRecord, read_stats

from .checkpoint import checkpoint_refs
from .report import loss_trend, write_report
from .stats import event, memory_gb

if TYPE_CHECKING:
    from .train import Run


def write_record(run: Run, *, status: Any, error: str | None = None) -> None:
    """Write train.json, report.md and loss.png of a run that has ended, however it did."""
    progress, config = run.progress, run.config
    rows = read_stats(run.run_dir / "stats.jsonl")
    values = {
        name: [row[name] for row in rows if name in row]
        for name in ("loss", "validation_loss", "train_probe_loss")
    }
    last = {name: column[-1] if column else None for name, column in values.items()}
    overfitting = find_overfitting(rows_to_losses(rows))
    record = TrainRecord(
        status=status,
        error=error,
        inputs=dict(run.spec.inputs),
        seeds={"training": config.training.seed},
        environment=current_environment(),
        started_at=run.started_at,
        duration_s=round(time.monotonic() - run.started, 3),
        run_name=run.spec.run_name,
        parameters=run.parameters,
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
        checkpoints=checkpoint_refs(run.checkpoints, progress),
        config_sha256=run.spec.config_sha256,
        planned_steps=progress.total_steps or None,
        stop_reason=run.stop_reason,
        sessions=progress.sessions,
        processes=run.spec.processes,
        device=run.device_name,
        precision=progress.precision,
        precision_reason=progress.precision_reason,
        precision_images_per_second=progress.precision_rates,
        images_per_second=None if run.rate is None else round(run.rate, 2),
        peak_memory_gb=round(memory_gb(run.device), 3) if run.accelerator else None,
        n_train_images=run.n_train,
        n_validation_images=run.n_validation,
        quarantined=run.quarantined,
        warnings=[*progress.warnings, *([str(overfitting)] if overfitting else [])],
    )
    record.write(run.run_dir / "train.json")
    write_report(run.run_dir, record, config)
    event("end", status=status, step=progress.step, total=progress.total_steps)
