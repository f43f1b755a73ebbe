"""Records of a training run: train.json and the rows of stats.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from modelops.records.base import Record, RecordPart


class CheckpointRef(RecordPart):
    """One checkpoint of a run; sha256 is the tree digest without `training_state/`."""

    step: int
    images_seen: int
    path: str
    sha256: str


class TrainRecord(Record):
    """runs/NAME/train.json"""

    kind: Literal["train"] = "train"
    run_name: str
    parameters: int
    effective_batch: int
    steps: int
    images_seen: int
    final_train_loss: float | None = None
    final_validation_loss: float | None = None
    final_train_probe_loss: float | None = None  # of the same weights, on training images
    overfitting_since_step: int | None = None
    loss_trend: Literal["down", "flat", "up", "unknown"] = "unknown"
    training_seconds: float  # from planning to the last checkpoint, over all sessions
    setup_seconds: float | None = None  # before that: data, captions, networks
    time_limit_seconds: float | None = None
    checkpoints: list[CheckpointRef] = []
    config_sha256: str
    planned_steps: int | None = None
    stop_reason: str = ""
    sessions: int = 1
    processes: int = 1
    device: str = ""
    precision: str = ""
    precision_reason: str = ""
    precision_images_per_second: dict[str, float | None] = {}  # of a few steps before the first
    images_per_second: float | None = None
    peak_memory_gb: float | None = None
    n_train_images: int | None = None
    n_validation_images: int | None = None
    quarantined: dict[str, str] = {}
    warnings: list[str] = []


def read_stats(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's stats.jsonl, each with its `step`; a last line that a kill cut short is
    left out, and a missing file has none."""
    rows: list[dict[str, Any]] = []
    if not Path(path).is_file():
        return rows
    for line in Path(path).read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
