"""Criteria of a verdict beside the records of its release that they were decided on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from modelops.base.errors import IntegrityError, ModelopsError
from modelops.base.files import sha256_file
from modelops.records.base import Record
from modelops.records.bounds import relation_in
from modelops.records.export import ArtifactRecord
from modelops.records.measurements import measurement_of
from modelops.records.read import read_any_record
from modelops.records.release import Criterion, Verdict

Stated = tuple[float | str | None, float | None, float | None]


def check_evidence(verdict: Verdict, files: Iterable[Path]) -> None:
    """Check that a verdict's passes say what their records say, as far as these are among `files`.

    Records are known by the digests in the verdict's inputs.

    Raises:
        IntegrityError: a record has another value or interval, or a relative bound comes to another
            number.
    """
    wanted = {ref.sha256: name for name, ref in verdict.inputs.items()}
    records: dict[str, Record] = {}
    for path in files:
        name = wanted.get(sha256_file(path)) if path.suffix == ".json" else None
        if name is not None:
            try:
                records[name] = read_any_record(path)
            except ModelopsError:
                continue  # of another version
    by_path = {verdict.inputs[name].path: record for name, record in records.items()}
    for line in verdict.criteria:
        record = by_path.get(line.evidence)
        if record is None or line.answer != "pass":
            continue
        if (line.value, line.low, line.high) not in _stated(record, line):
            raise IntegrityError(
                f"the verdict's criterion {line.name!r} has other numbers than {line.evidence}",
                hint="run `modelops gate` again",
            )
        relation = relation_in(line.bound)
        base = measurement_of(records[relation.of], line.metric) if (
            relation is not None and relation.of in records
        ) else None  # fmt: skip
        if relation and base and not (base.value is not None and relation.gives(base.value)):
            raise IntegrityError(
                f"the verdict's criterion {line.name!r} has another bound, {line.bound!r}, than "
                f"{relation.of}'s {base.value} gives",
                hint="run `modelops gate` again",
            )


def _stated(record: Record, line: Criterion) -> list[Stated]:
    """Return the values with their intervals that a record gives a criterion's metric or field."""
    found: list[Stated] = []
    measured = measurement_of(record, line.metric)
    if measured is not None:
        found.append((measured.value, measured.low, measured.high))
    if isinstance(record, ArtifactRecord) and line.bound.endswith(" passed"):
        names = line.bound.removesuffix(" passed")
        of = None if names == "all checks" else names.split(", ")
        checks = [check for check in record.parity if of is None or check.name in of]
        found.append((f"{sum(check.holds for check in checks)} of {len(checks)}", None, None))
    value = getattr(record, line.metric, None) if line.metric in type(record).model_fields else None
    if isinstance(value, str | float):
        found.append((value, None, None))
    elif isinstance(value, int):
        found += [(str(value), None, None), (float(value), None, None)]
    return found
