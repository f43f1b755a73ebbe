"""`modelops fit-lit` and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.cli.main import main


def test_what_is_no_manifest_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.parquet"
    manifest.write_bytes(b"")
    assert main(["fit-lit", str(manifest), "--out", str(tmp_path / "lit"), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert "manifest.parquet" in said["message"] and "\n" not in said["message"]
    assert not (tmp_path / "lit").exists()


def test_a_folder_with_files_of_its_users_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lit"
    out.mkdir()
    (out / "lit.json").write_text("{}")
    (out / "thesis.tex").write_text("years of work")
    assert main(["fit-lit", str(tmp_path / "m.parquet"), "--out", str(out)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (out / "thesis.tex").read_text() == "years of work"
