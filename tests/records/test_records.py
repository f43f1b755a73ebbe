from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from modelops import records
from modelops.base.environment import current_environment
from modelops.base.errors import UsageError
from modelops.records.base import Measurement, Record
from modelops.records.data import SmokeReport
from modelops.records.evaluation import EvaluationRecord, SourceInfo
from modelops.records.read import RECORD_KINDS, read_any_record, read_record
from modelops.records.train import TrainRecord


def evaluation() -> EvaluationRecord:
    return EvaluationRecord(
        source=SourceInfo(kind="folder", uri="samples"),
        metrics={"m": Measurement(value=1.0, low=0.5, high=1.5, n=3, method="bootstrap")},
        environment=current_environment(),
    )


def test_a_record_survives_writing_and_keeps_its_digest(tmp_path: Path) -> None:
    record = evaluation()
    record.write(tmp_path / "e.json")
    again = read_record(tmp_path / "e.json", EvaluationRecord)
    assert again == record
    assert again.digest == record.digest
    assert read_any_record(tmp_path / "e.json") == record


def test_a_measurement_is_a_value_with_an_interval_or_a_reason() -> None:
    with pytest.raises(ValidationError, match="needs an interval"):
        Measurement(value=1.0)
    with pytest.raises(ValidationError, match="either a value or the reason"):
        Measurement()
    with pytest.raises(ValidationError, match="either a value or the reason"):
        Measurement(value=1.0, low=1.0, high=1.0, not_measured="no time")
    with pytest.raises(ValidationError, match="upside down"):
        Measurement(value=1.0, low=2.0, high=1.0)
    with pytest.raises(ValidationError):
        Measurement(value=float("nan"), low=0.0, high=1.0)
    assert Measurement.missing("no weights").value is None


def test_unknown_keys_other_kinds_and_newer_schemas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    record = evaluation()
    record.write(path)
    with pytest.raises(UsageError, match="kind 'evaluation', expected 'train'"):
        read_record(path, TrainRecord)
    path.write_text(record.model_dump_json().replace('"schema_version":1', '"schema_version":99'))
    with pytest.raises(UsageError, match="upgrade modelops"):
        read_record(path, EvaluationRecord)
    path.write_text(record.model_dump_json().replace('"seeds"', '"seedz"'))
    with pytest.raises(UsageError, match="seedz"):
        read_record(path, EvaluationRecord)
    path.write_text("[]")
    with pytest.raises(UsageError, match="not a record"):
        read_any_record(path)


def test_a_new_record_kind_is_in_the_table_of_kinds() -> None:
    folder = Path(records.__path__[0])
    names = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    modules = [importlib.import_module(f"modelops.records.{name}") for name in names]
    kinds = {
        model.model_fields["kind"].default
        for module in modules
        for model in vars(module).values()
        if isinstance(model, type) and issubclass(model, Record) and model is not Record
    }
    assert kinds == set(RECORD_KINDS)
    assert RECORD_KINDS["smoke"] is SmokeReport


def test_the_environment_names_versions_and_hardware() -> None:
    environment = current_environment()
    assert environment.packages["numpy"]
    assert environment.cores
    assert environment.cpu
