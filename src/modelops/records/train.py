"""Records of a training run: train.json and the rows of stats.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from modelops.records.base import Amount, Count, Record, RecordPart


class CheckpointRef(RecordPart):
    """One checkpoint of a run; sha256 is the tree digest without `training_state/`."""

    step: Count
    images_seen: Count
    path: str
    sha256: str


class CaptionLengths(RecordPart):
    """Lengths of the captions that a run is trained and validated on, in tokens.

    Attributes:
        max_tokens: number of tokens that the model reads of a text, with the marks around it.
        n: captions.
        n_cut: captions that have more; the model sees their beginning.
        n_made_equal: different captions that became equal to another one by that.
        longest: {sample id: tokens} of the longest captions that were cut.
    """

    max_tokens: Count
    n: Count
    n_cut: Count
    n_made_equal: Count
    longest: dict[str, Count] = {}

    @property
    def warning(self) -> str:
        """A line for a reader, or an empty one if no caption was cut."""
        if not self.n_cut:
            return ""
        named = ", ".join(f"{name} ({count} tokens)" for name, count in self.longest.items())
        return (
            f"{self.n_cut} of {self.n} captions have more than {self.max_tokens} tokens: the model "
            "learns their beginning only"
            + (f", and {self.n_made_equal} became equal to another" if self.n_made_equal else "")
            + f"; longest: {named}"
        )


class TrainRecord(Record):
    """runs/NAME/train.json"""

    kind: Literal["train"] = "train"
    run_name: str
    parameters: Count
    effective_batch: Count
    steps: Count
    images_seen: Count
    final_train_loss: Amount | None = None
    final_validation_loss: Amount | None = None
    final_train_probe_loss: Amount | None = None  # of the same weights, on training images
    overfitting_since_step: Count | None = None
    loss_trend: Literal["down", "flat", "up", "unknown"] = "unknown"
    training_seconds: Amount  # from planning to the last checkpoint, over all sessions
    setup_seconds: Amount | None = None  # before that: data, captions, networks
    time_limit_seconds: Amount | None = None
    checkpoints: list[CheckpointRef] = []
    config_sha256: str
    planned_steps: Count | None = None
    stop_reason: str = ""
    sessions: Count = 1
    processes: Count = 1
    device: str = ""
    precision: str = ""
    precision_reason: str = ""
    precision_images_per_second: dict[str, Amount | None] = {}  # of a few steps before the first
    images_per_second: Amount | None = None
    peak_memory_gb: Amount | None = None
    n_train_images: Count | None = None
    n_validation_images: Count | None = None
    quarantined: dict[str, str] = {}
    captions: CaptionLengths | None = None
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
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
