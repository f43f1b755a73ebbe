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
