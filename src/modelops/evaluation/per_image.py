"""Per-image rows that an evaluation writes beside its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelops.base.errors import EvaluationError
from modelops.base.files import read_json, sha256_file
from modelops.records.evaluation import EvaluationRecord


def read_per_image(record_path: str | Path, record: EvaluationRecord) -> list[dict[str, Any]]:
    """Read the per-image values that a record names.

    Raises:
        EvaluationError: they are missing, or do not have the record's digest.
    """
    entry = record.files.get("per_image")
    path = Path(record_path).parent / entry.path if entry else None
    if entry is None or path is None or not path.is_file():
        raise EvaluationError(f"{record_path}: its per-image values are not there")
    if sha256_file(path) != entry.sha256:
        raise EvaluationError(f"{path}: differs from the digest in {record_path}")
    rows: list[dict[str, Any]] = read_json(path)
    return rows
