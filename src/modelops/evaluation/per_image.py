"""Per-image rows that an evaluation writes beside its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelops.base.errors import EvaluationError, IntegrityError
from modelops.base.files import read_json, safe_join, sha256_file
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


def measured_image(record_path: str | Path, row: dict[str, Any], name: str, folder: Path) -> Path:
    """Return the image of a row, if it is still the one that was measured.

    Args:
        row: of an image that was made.
        name, folder: of its file where the row, of an older record, does not name it.

    Raises:
        EvaluationError: it is gone.
        IntegrityError: it is another image than was measured.
    """
    named = row.get("image")
    path = safe_join(Path(record_path).with_suffix(""), named) if named else folder / name
    if not path.is_file():
        raise EvaluationError(
            f"{path}: an image of {record_path} is gone", hint="run `modelops eval` again"
        )
    digest = row.get("image_sha256")
    if digest is not None and sha256_file(path) != digest:
        raise IntegrityError(
            f"{path}: changed since it was measured for {record_path}",
            hint="run `modelops eval` again",
        )
    return path
