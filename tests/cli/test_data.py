"""`modelops data` from the command line: what it prints and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.cli.main import main
from modelops.data.corpora.openmoji import build_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_corpus(tmp_path, resolution=32, limit=12)
    return tmp_path


def test_a_corpus_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "corpus", "openmoji", str(tmp_path / "d"), "--limit", "10", "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "planned"
    assert not (tmp_path / "d").exists()
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] <= 10 and result["drawings_without_name"] == 542
    assert "CC BY-SA 4.0" in result["attribution"]["text"]


def test_check_exits_1_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(folder / "manifest.parquet")
    assert main(["data", "check", manifest]) == 0
    assert "usable" in capsys.readouterr().out
    victim = next((folder / "images").iterdir())
    victim.write_bytes(victim.read_bytes()[:50])
    assert main(["data", "check", manifest]) == 1
    assert victim.stem in capsys.readouterr().out
    assert main(["data", "check", manifest, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["n_quarantined"] == 1 and victim.stem in result["quarantined"]


def test_a_bad_manifest_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.csv"
    path.write_text("id,filepath,caption\n")
    assert main(["data", "check", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "missing columns license" in captured.err
    assert main(["data", "stats", str(tmp_path / "none.parquet"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "UsageError"


def test_from_manifest_to_smoke(corpus_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(corpus_folder / "manifest.parquet")
    for arguments in (
        ["dedup", manifest],
        ["split", manifest, "--seed", "3"],
        ["shard", manifest, "--resolution", "32", "--samples-per-shard", "20"],
        ["smoke", str(corpus_folder / "shard_manifest.csv"), "--batch-size", "8"],
        ["stats", manifest, "--splits", str(corpus_folder / "splits.parquet")],
    ):
        assert main(["data", *arguments]) == 0, arguments
        assert capsys.readouterr().out
        assert main(["data", *arguments, "--json"]) == 0, arguments
        json.loads(capsys.readouterr().out)
    for name in ("dedup_report.json", "splits.parquet", "split.json", "smoke.json"):
        assert (corpus_folder / name).is_file()
    assert main(["data", "split", manifest, "--fractions", "1,2,3"]) == 2
    assert main(["data", "dedup", manifest, "--drop", "all"]) == 2


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    build_corpus(tmp_path, resolution=32, limit=24)
    return tmp_path
