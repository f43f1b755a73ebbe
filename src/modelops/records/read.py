"""Read a record of any kind from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from modelops.base.errors import UsageError
from modelops.base.files import parse_json, read_json, read_text
from modelops.records.base import Record
from modelops.records.comparison import AbTestRecord, ComparisonRecord
from modelops.records.data import DedupReport, SmokeReport, SplitReport
from modelops.records.evaluation import AlignmentModelRecord, EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.monitoring import MonitorRecord
from modelops.records.release import PreflightRecord, ReleaseRecord, SignOff, Verdict
from modelops.records.train import TrainRecord

RecordT = TypeVar("RecordT", bound=Record)
# No default stands for what a file does not say.
STATED = ("schema_version", "status", "started_at")

RECORD_KINDS: dict[str, type[Record]] = {
    "dedup": DedupReport,
    "split": SplitReport,
    "smoke": SmokeReport,
    "train": TrainRecord,
    "alignment_model": AlignmentModelRecord,
    "evaluation": EvaluationRecord,
    "comparison": ComparisonRecord,
    "abtest": AbTestRecord,
    "artifact": ArtifactRecord,
    "verdict": Verdict,
    "monitor": MonitorRecord,
    "preflight": PreflightRecord,
    "release": ReleaseRecord,
    "signoff": SignOff,
}


def read_record(path: str | Path, expected: type[RecordT]) -> RecordT:
    """Read and validate one record.

    Raises:
        UsageError: the file is missing, not JSON, of another kind, or does not fit the schema; or
            it does not say in which version it was written, when, and how it ended.
    """
    text = read_text(path)
    data = parse_json(text, source=str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a record")
    wanted = expected.model_fields["kind"].default
    if data.get("kind") != wanted:
        raise UsageError(f"{path}: a record of kind {data.get('kind')!r}, expected {wanted!r}")
    unstated = next((key for key in STATED if key not in data), None)
    if unstated is not None:
        raise UsageError(f"{path}: {unstated}: missing", hint="every record states it")
    try:
        # Strict: "0.1" is no number, and neither is true.
        return expected.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "record"
        raise UsageError(f"{path}: {where}: {first['msg']}") from error


def read_any_record(path: str | Path) -> Record:
    """Read a record of whatever kind the file says it is.

    Raises:
        UsageError: it is not a record of a known kind.
    """
    data = read_json(path)
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in RECORD_KINDS:
        known = ", ".join(sorted(RECORD_KINDS))
        raise UsageError(f"{path}: not a record (kind {kind!r}; known kinds: {known})")
    return read_record(path, RECORD_KINDS[kind])
