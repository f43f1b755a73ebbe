"""`modelops compare` as a user types it: words, exit codes, JSON and the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.cli.main import main
from modelops.records.base import Measurement
from modelops.records.comparison import ComparisonRecord
from modelops.records.evaluation import EvaluationRecord, SourceInfo
from modelops.records.read import read_record


def write(path: Path, value: float, *, seed: int = 0) -> str:
    """A record of one number, 1 either side, whose lower values are better."""
    EvaluationRecord(
        source=SourceInfo(kind="endpoint", uri="somewhere"),
        protocols={"p": {"metric": "a number", "sampling": {"seed": seed}}},
        metrics={
            "m": Measurement(
                value=value, low=value - 1, high=value + 1, n=100, method="m",
                higher_is_better=False, protocol="p",
            ),
            "fid": Measurement.missing("no weights"),
        },
    ).write(path)  # fmt: skip
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [write(tmp_path / "a.json", 10.0), write(tmp_path / "b.json", 14.0)]


@pytest.mark.parametrize(
    ("order", "options", "code"),
    [
        ((0, 0), [], 0),
        ((0, 1), [], 3),
        ((1, 0), [], 0),
        ((0, 1), ["--margin", "m=6"], 0),
        ((0, 1), ["--margin", "m=20%"], 3),
        ((0, 1), ["--margin", "m=4"], 4),
        ((0, 0), ["--default-margins"], 4),
        ((0, 0), ["--margin", "fid=1"], 4),
        ((0, 0), ["--margin", "m"], 2),
        ((0, 0), ["--margin", "n=1"], 2),
    ],
)
def test_exit_codes(
    pair: list[str],
    order: tuple[int, int],
    options: list[str],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [pair[index] for index in order]
    assert main(["compare", *files, *options]) == code
    capsys.readouterr()
    assert main(["compare", *files, *options, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == ("failed" if code == 2 else "ok")
    assert code == 2 or found["exit_code"] == code


def test_other_protocols_are_refused_with_what_differs(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "c.json", 10.0, seed=1)
    assert main(["compare", pair[0], other]) == 4
    shown = capsys.readouterr().out
    assert "sampling.seed: 0 against 1" in shown
    assert "undecided: nothing could be compared" in shown


def test_a_person_reads_the_verdict_and_what_it_would_take(
    pair: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *pair, "--margin", "m=4"]) == 4
    shown = capsys.readouterr()
    assert "worse" in shown.out and "4 [2.59, 5.41]" in shown.out
    assert "undecided: m may be worse by more than its margin of 4" in shown.out
    assert "measured in neither: fid" in shown.err
    assert "not paired" in shown.err


def test_the_record_is_written_and_is_what_was_printed(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparisons" / "c.json"
    assert main(["compare", *pair, "--json", "--out", str(out)]) == 3
    printed = json.loads(capsys.readouterr().out)
    record = read_record(out, ComparisonRecord)
    assert record.answer == printed["answer"] == "fail"
    assert [row.model_dump() for row in record.comparisons] == printed["comparisons"]
    assert record.metrics["m"].value == 4.0
    assert record.inputs["second"].path == pair[1]


def test_help_documents_the_exit_codes_and_the_default_margins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("Exits 0", "3 something is worse", "4 undecided", "0.01 for unsafe_rate"):
        assert text in shown
