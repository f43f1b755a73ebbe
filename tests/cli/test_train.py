"""`modelops train` as a user calls it, on real images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from modelops.cli.main import main
from modelops.records.read import read_record
from modelops.records.train import TrainRecord

CONFIG = {
    "model": {
        "resolution": 16, "patch_size": 2, "channels": 32, "multipliers": [1],
        "layers_per_block": 1,
    },
    "data": {"manifest": "data/manifest.parquet"},
    "training": {
        "microbatch": 4, "total_steps": 4, "save_every_steps": 4, "early_checkpoint": None,
        "validation_samples": 8, "sample_steps": 2, "sample_prompts": ["red heart"],
        "precision": "no",
    },
    "logging": {"log_every_steps": 1, "tensorboard": False, "wandb_project": "pilot_project"},
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with 24 images and a config; the current directory is elsewhere."""
    from modelops.data.corpora.openmoji import build_corpus

    root = tmp_path / "project"
    build_corpus(root / "data", resolution=16, limit=24, seed=0)
    (root / "pilot_config.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return root


def test_dry_run_prints_the_command_and_writes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "project/pilot_config.yaml", "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["command"][1:3] == ["-m", "modelops.trainer"]
    assert result["run_dir"] == "project/runs/pilot"
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["project/none.yaml"], ["none.yaml"]),
        (["project/pilot_config.yaml", "--set", "training.total_steps=0"], ["total_steps"]),
        (["project/pilot_config.yaml", "--set", "training.stps=1"], ["training.stps"]),
        (["project/pilot_config.yaml", "--set", "data.manifest=x.csv"], ["x.csv", "folder"]),
        (["project/pilot_config.yaml", "--processes", "0"], ["--processes"]),
        (["project/pilot_config.yaml", "--run-name", "../x"], ["run name"]),
    ],
)  # fmt: skip
def test_a_mistake_costs_one_line_and_code_2(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for part in parts:
        assert part in error
    assert not (project / "runs").exists()


@pytest.mark.slow
def test_train_then_again_then_resume(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "project/pilot_config.yaml", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == "ok"
    assert captured.err.count("wandb is not installed") == 1
    run_dir = project / "runs" / "pilot"
    record = read_record(run_dir / "train.json", TrainRecord)
    assert (record.steps, record.effective_batch) == (4, 4)
    frozen = json.loads((run_dir / "config.json").read_text())
    assert frozen["root"] == "../.."
    assert str(project) not in (run_dir / "config.json").read_text()

    assert main(arguments) == 2
    assert "--resume" in json.loads(capsys.readouterr().out)["hint"]
    assert main([*arguments, "--resume", "--set", "training.lr=1e-5"]) == 2
    assert "training.lr: 0.001 -> 1e-05" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0  # nothing is left to do
    assert read_record(run_dir / "train.json", TrainRecord).steps == 4


def test_ctrl_c_is_forwarded_and_the_run_can_go_on(project: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "modelops.cli.main", "train", "project/pilot_config.yaml",
         "--set", "training.total_steps=100000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    stats = project / "runs" / "pilot" / "stats.jsonl"
    while not (stats.is_file() and '"loss"' in stats.read_text()) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate()
    assert child.returncode == 130, error
    record = read_record(project / "runs" / "pilot" / "train.json", TrainRecord)
    assert "SIGINT" in (record.error or "")
    assert [ref.step for ref in record.checkpoints][-1] == record.steps


@pytest.mark.slow
def test_two_processes_train_like_one(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, arguments in {
        "one": ["--set", "training.microbatch=4"],
        "two": ["--set", "training.microbatch=2", "--processes", "2"],
    }.items():
        assert main(["train", "project/pilot_config.yaml", "--run-name", name, *arguments]) == 0
    capsys.readouterr()
    rows = {}
    for name in ("one", "two"):
        lines = (project / "runs" / name / "stats.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines if '"loss"' in line]
        record = read_record(project / "runs" / name / "train.json", TrainRecord)
        assert record.processes == (1 if name == "one" else 2)
        assert record.images_seen == 16
    for one, two in zip(rows["one"], rows["two"], strict=True):
        assert one["images_seen"] == two["images_seen"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_two_processes_agree_on_the_precision_and_on_the_end(project: Path) -> None:
    settings = ["training.microbatch=2", "training.precision=auto", "training.total_steps=100000",
                "training.save_every_steps=100000", "training.time_limit_seconds=8"]  # fmt: skip
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", "project/pilot_config.yaml", "--processes", "2", *arguments]) == 0
    run_dir = project / "runs" / "pilot"
    record = read_record(run_dir / "train.json", TrainRecord)
    assert (record.status, record.processes) == ("ok", 2)
    assert record.precision in record.precision_images_per_second
    assert record.steps == record.planned_steps == record.checkpoints[-1].step < 100_000


def test_training_does_not_load_torch_in_the_command(project: Path) -> None:
    code = (
        "import sys; from modelops.cli.main import main; "
        "main(['train', 'project/pilot_config.yaml', '--dry-run']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == 0
