"""`modelops report`, the report of `modelops eval`, and the progress it shows."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from rich.console import Console

from modelops.cli import output
from modelops.cli.main import main
from modelops.records.base import Measurement
from modelops.records.evaluation import EvaluationRecord, SourceInfo


@pytest.fixture
def record(tmp_path: Path) -> Path:
    source = SourceInfo(kind="checkpoint", uri="runs/a/step-7", sha256="ab" * 32)
    value = Measurement(value=0.5, low=0.25, high=0.75, n=8, method="exact")
    EvaluationRecord(source=source, metrics={"unsafe_rate": value}).write(tmp_path / "final.json")
    return tmp_path / "final.json"


def test_a_report_lies_beside_its_record_in_the_words_of_the_cards(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(record)]) == 0
    page = record.with_suffix(".html")
    assert capsys.readouterr().out == f"written: {page}\n"
    text = page.read_text("utf-8")
    assert "Unsafe images" in text and '<b class="value">0.5</b> [0.25, 0.75]' in text


def test_check_says_whether_the_page_belongs_to_the_record(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = record.with_suffix(".html")
    check = ["report", str(record), "--check", str(page)]
    assert main(["report", str(record), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "ok", "path": str(page)}
    assert main(check) == 0
    assert capsys.readouterr().out == f"{page} belongs to {record}\n"

    data = json.loads(record.read_text())
    data["metrics"]["unsafe_rate"]["value"] = 0.625
    record.write_text(json.dumps(data))
    assert main(check) == 3
    shown = capsys.readouterr()
    assert shown.out == "" and f"error: {page} is stale" in shown.err
    assert f"try: modelops report {record} --out {page}" in shown.err
    assert main([*check, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["status"] == "stale"
    assert main(["report", str(record)]) == 0 and main(check) == 0


def test_bad_input_is_one_line(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text('{"kind": "train"}')
    (tmp_path / "page.html").write_text("<p>mine")
    name = str(record)
    for arguments, said in (
        ([str(tmp_path / "none.json")], "No such file"),
        ([str(tmp_path / "other.json")], "'train', expected 'evaluation'"),
        ([name, "--against", str(tmp_path / "other.json")], "'train', expected 'evaluation'"),
        ([name, "--out", name], "is the record itself"),
        ([name, "--out", str(tmp_path / "page.html")], "is no report"),
        ([name, "--check", str(tmp_path / "page.html")], "not a report"),
        ([name, "--check", str(tmp_path / "none.html")], "No such file"),
        ([name, "--check", name, "--out", name], "--check writes nothing"),
    ):
        assert main(["report", *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and said in shown.err.splitlines()[0], arguments
    assert (tmp_path / "page.html").read_text() == "<p>mine"


def test_a_report_loads_no_torch(record: Path) -> None:
    code = (
        "import sys; from modelops.cli.main import main\n"
        f"assert main(['report', {str(record)!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_eval_writes_the_report_of_what_it_measured_and_of_what_failed(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\n<b>sun</b>\n")
    out = tmp_path / "a.json"
    arguments = ["eval", str(tiny_checkpoint), "--prompts", str(prompts), "--steps", "1",
                 "--resamples", "20", "--out", str(out), "--json"]  # fmt: skip
    assert main([*arguments, "--no-report"]) == 0
    assert not out.with_suffix(".html").exists()
    capsys.readouterr()

    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["status"] == "ok"
    assert shown.err == f"{out.with_suffix('.html')}\n"
    page = out.with_suffix(".html").read_text("utf-8")
    assert page.count('<img src="data:image/png;base64,') >= 2
    assert "&lt;b&gt;sun&lt;/b&gt;" in page and "changed since" not in page
    rows = json.loads((tmp_path / "a" / "per_image.json").read_text())
    assert [(tmp_path / "a" / row["image"]).is_file() for row in rows] == [True, True]
    assert main(["report", str(out), "--check", str(out.with_suffix(".html"))]) == 0
    capsys.readouterr()

    assert main([*arguments, "--lit", str(tmp_path / "none")]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "MissingWeightsError"
    assert "Read this first" in out.with_suffix(".html").read_text("utf-8")
    out.with_suffix(".html").write_text("mine")
    assert main(arguments) == 0
    assert "no report was written" in capsys.readouterr().err


@contextmanager
def json_mode(on: bool) -> Iterator[None]:
    """As within a command that was given --json, or not."""
    arguments = ["--json"] if on else []
    command = output.json_option(click.Command("any"))
    with click.Command("any", params=command.params).make_context("any", arguments).scope():
        yield


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_shows_the_stage_its_count_and_the_time_left(
    quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    monkeypatch.setattr(output, "stderr_console", lambda: console)
    monkeypatch.setattr(output, "DRAWN_AFTER", 0.0)
    with json_mode(quiet), output.progress("opening") as shown:
        shown.stage("sampling", 1, 9)
        shown(3, 12)
        for _ in range(0 if quiet else 1000):  # drawn by another thread, ten times a second
            if "1/9 sampling" in stream.getvalue() and "3/12" in stream.getvalue():
                break
            time.sleep(0.02)
        shown.stage("features", 2, 9)
    assert ("1/9 sampling" in stream.getvalue()) is not quiet
    assert ("3/12" in stream.getvalue() and "left" in stream.getvalue()) is not quiet


def test_progress_of_something_short_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    monkeypatch.setattr(output, "stderr_console", lambda: console)
    monkeypatch.setattr(output, "DRAWN_AFTER", 3600.0)
    with output.progress("opening") as shown:
        shown(1, 2)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_without_a_terminal_is_a_line_now_and_then(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "LINE_EVERY", 0.02)
    said = ""
    with json_mode(quiet), output.progress("opening") as shown:
        shown.stage("sampling", 1, 9)
        shown(3, 12)
        for _ in range(10 if quiet else 1000):
            said += capsys.readouterr().err
            if "12" in said:
                break
            time.sleep(0.02)
    assert ("\n1/9 sampling: 3 of 12, 0 min so far\n" in f"\n{said}") is not quiet
    assert quiet is (said == "")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # it ended with the command
