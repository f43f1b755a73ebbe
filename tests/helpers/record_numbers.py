"""What an evaluation record says, without when, how long and where it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record


def numbers(path: Path) -> dict[str, Any]:
    """The record and, as "rows", its per-image values."""
    record = read_record(path, EvaluationRecord)
    kept = record.model_dump(
        mode="json", exclude={"started_at", "duration_s", "environment", "files", "n_reused_images"}
    )
    rows = json.loads((path.with_suffix("") / "per_image.json").read_text("utf-8"))
    return {**kept, "rows": rows}
