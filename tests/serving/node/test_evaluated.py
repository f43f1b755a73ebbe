"""`modelops eval` of a running node beside that of the checkpoint which it serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from live_node import served
from modelops.base.files import sha256_file
from modelops.cli.main import main
from modelops.evaluation.compare.agreement import compare_images
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record
from modelops.releases.verify import RECORD_FILE


def test_the_endpoint_is_measured_like_the_checkpoint_it_serves(
    tiny_release: Path, tiny_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The same images of the same prompts and seeds, and the release's digest in the record."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\nsun\ndog face\nhouse\n", "utf-8")
    options = ["--prompts", str(prompts), "--steps", "2", "--guidance", "1", "--resamples", "20"]
    records = {name: tmp_path / f"{name}.json" for name in ("checkpoint", "endpoint")}
    with served(tiny_release) as live:
        sources = {"checkpoint": str(tiny_checkpoint), "endpoint": live.url}
        for name, source in sources.items():
            assert main(["eval", source, *options, "--no-report", "--out", str(records[name])]) == 0
    found = {name: read_record(path, EvaluationRecord) for name, path in records.items()}
    endpoint = found["endpoint"]
    assert endpoint.status == "ok" and endpoint.n_failed_images == 0
    assert endpoint.source.kind == "endpoint"
    assert endpoint.source.sha256 == sha256_file(tiny_release / RECORD_FILE)
    agreement = compare_images(records["checkpoint"], records["endpoint"])
    assert (agreement.n, agreement.identical) == (4, 4), agreement
    protocols = {record.metrics["unsafe_rate"].protocol for record in found.values()}
    assert len(protocols) == 1
    capsys.readouterr()
    code = main(["compare", *map(str, records.values()), "--json"])
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["comparisons"]}
    assert code == 0 and rows["failed_image_rate"]["verdict"] == "within noise"
