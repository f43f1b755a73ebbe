"""Whole runs of the trainer as a process, on real images."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from modelops.base.files import sha256_tree
from modelops.base.locks import output_lock
from modelops.records.read import read_record
from modelops.records.train import TrainRecord
from runs import freeze, losses

Write = Callable[..., Path]
Trainer = Callable[..., Any]


def _tensors(checkpoint: Path) -> dict[str, Any]:
    return {
        f"{name}:{key}": value
        for name in (
            "unet/diffusion_pytorch_model", "training_state/weights", "training_state/optimizer",
        )
        for key, value in load_file(checkpoint / f"{name}.safetensors").items()
    }  # fmt: skip


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    write_config: Write, run_trainer: Trainer, trainer_environment: dict[str, str], tmp_path: Path
) -> None:
    config = write_config(training={"total_steps": 12, "save_every_steps": 5})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    freeze(config, whole)
    freeze(config, killed)
    done = run_trainer(whole)
    assert done.code == 0, done.err

    child = subprocess.Popen(
        [sys.executable, "-m", "modelops.trainer", str(killed / "config.json")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=trainer_environment,
    )  # fmt: skip
    while not (killed / "checkpoints" / "step-5").exists() and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (killed / "train.json").exists()

    done = run_trainer(killed, "--resume")
    assert done.code == 0, done.err
    assert "going on from step" in done.out
    assert losses(killed) == losses(whole)
    ours, theirs = (_tensors(run / "checkpoints" / "step-12") for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name
    record = read_record(killed / "train.json", TrainRecord)
    assert (record.status, record.steps, record.sessions) == ("ok", 12, 2)
    assert [ref.step for ref in record.checkpoints] == [5, 10, 12]
    for ref in record.checkpoints:
        assert sha256_tree(killed / ref.path, exclude=["training_state"]) == ref.sha256


def test_microbatches_split_the_same_batch(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    config = write_config(training={"total_steps": 3})
    runs = []
    for microbatch, accumulation in ((8, 1), (4, 2)):
        run_dir = tmp_path / f"{microbatch}x{accumulation}"
        freeze(
            config, run_dir,
            overrides=[
                f"training.microbatch={microbatch}", f"training.grad_accum_steps={accumulation}"
            ],
        )  # fmt: skip
        done = run_trainer(run_dir)
        assert done.code == 0, done.err
        runs.append(run_dir)
    for (_, one), (_, other) in zip(losses(runs[0]), losses(runs[1]), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    first, second = (
        load_file(run / "checkpoints" / "step-3" / "training_state" / "weights.safetensors")
        for run in runs
    )
    for name, value in first.items():
        # Adam divides by the gradient's own size, so tiny gradients may differ by a whole step.
        assert np.abs(value - second[name]).mean() < 1e-4, name


def test_the_checkpoint_loads_where_modelops_is_not_installed(
    write_config: Write, run_trainer: Trainer, trainer_environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "a"
    freeze(write_config(training={"total_steps": 2, "save_every_steps": 2}), run_dir)
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    assert (run_dir / "report.md").read_text().count("![") >= 2
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "grids" / "step-2.png").is_file()
    code = f"""
import sys
sys.modules["modelops"] = None
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(
    {str(run_dir / "checkpoints" / "step-2")!r}, trust_remote_code=True
)
made = pipeline("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
print(made.images[0].size)
"""
    made = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**trainer_environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert made.stdout.strip() == "(16, 16)", made.stderr


def test_a_diverging_run_stops_before_the_optimizer(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    freeze(
        write_config(
            training={"lr": 1e30, "warmup_steps": 0, "total_steps": 20, "grad_clip": 1e30}
        ),
        run_dir,
    )
    done = run_trainer(run_dir)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "error: loss is" in done.err or "error: gradient norm is" in done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert record.status == "failed"
    assert "at step" in (record.error or "")
    assert record.steps < 20


def test_sigterm_saves_a_checkpoint_and_says_so(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    freeze(write_config(training={"total_steps": 100_000, "save_every_steps": 100_000}), run_dir)
    stats = run_dir / "stats.jsonl"

    def stop() -> None:
        while not (stats.is_file() and '"loss"' in stats.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    done = run_trainer(run_dir)
    assert done.code == 128 + signal.SIGTERM, done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert record.status == "failed"
    assert "SIGTERM" in (record.error or "")
    assert [ref.step for ref in record.checkpoints] == [record.steps]
    assert (run_dir / record.checkpoints[0].path / "model_index.json").is_file()


def test_a_damaged_checkpoint_is_passed_over(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    """Damage in place, to the trained weights and to the frozen encoder, stays in that checkpoint
    and is not carried into the next ones."""
    run_dir = tmp_path / "run"
    freeze(write_config(), run_dir)
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    newest = run_dir / "checkpoints" / "step-8"
    before, tree = _tensors(newest), sha256_tree(newest, exclude=["training_state"])
    for damaged, said in (
        ("training_state/weights.safetensors", "missing or damaged"),
        ("text_encoder/model.safetensors", "its model files differ"),
    ):
        with (newest / damaged).open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(range(100)))
        done = run_trainer(run_dir, "--resume")
        assert done.code == 0, done.err
        assert said in done.err
        assert "going on from step 4" in done.out
        for name, value in _tensors(newest).items():
            assert np.array_equal(value, before[name]), name
        assert sha256_tree(newest, exclude=["training_state"]) == tree


def test_retention_keeps_the_newest_and_the_early_one(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    freeze(
        write_config(
            training={
                "total_steps": 10,
                "save_every_steps": 2,
                "keep_checkpoints": 2,
                "early_checkpoint": 0.1,
                "sample_every_steps": 10,
            }
        ),
        run_dir,
    )
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    there = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert there == ["step-1", "step-10", "step-8"]
    record = read_record(run_dir / "train.json", TrainRecord)
    assert [ref.step for ref in record.checkpoints] == [1, 8, 10]
    links = [path.stat().st_nlink for path in run_dir.rglob("*") if path.is_file()]
    assert set(links) == {1}, "what is written into one checkpoint stays there"


def test_a_time_limit_plans_fewer_steps_and_still_decays(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    freeze(
        write_config(
            training={
                "total_steps": 1_000_000,
                "time_limit_seconds": 8,
                "save_every_steps": 10**6,
                "validate_every_steps": 10**6,
            }
        ),
        run_dir,
    )
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert record.planned_steps is not None
    assert record.planned_steps == record.steps < 100_000
    assert record.stop_reason == "the steps that fit into 8 s are done"
    assert record.checkpoints[-1].step == record.steps
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == record.steps and "validation_loss" in rows[-1]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert len(rates) >= min(20, record.steps)
    told = any("of the learning rate" in line for line in record.warnings)
    assert told or rates[-1] < 0.2 * max(rates)  # a busy machine fits few steps in


def test_a_limit_shorter_than_a_step_gives_one_step_and_says_so(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    freeze(write_config(training={"time_limit_seconds": 0.01}), run_dir)
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert (record.steps, record.planned_steps) == (1, 1)
    assert [ref.step for ref in record.checkpoints] == [1]
    assert record.final_validation_loss is not None
    assert "only one step made: " in done.err and "time limit is 0.01 s" in done.err
    assert any("of a time limit of" in line for line in record.warnings)


def test_shards_and_manifest_give_the_same_run(
    write_config: Write, run_trainer: Trainer, workspace: Path, tmp_path: Path
) -> None:

    from modelops.data.shards import write_shards

    shutil.copytree(workspace / "data", tmp_path / "data")
    shards = write_shards(
        tmp_path / "data" / "manifest.parquet", tmp_path / "data" / "splits.parquet",
        tmp_path / "data", resolution=16, samples_per_shard=20,
    )  # fmt: skip
    run_dir = tmp_path / "run"
    freeze(
        write_config(
            data={"manifest": "data/manifest.parquet", "shards": str(shards.relative_to(tmp_path))},
            training={"total_steps": 2},
        ),
        run_dir,
    )
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert (record.n_train_images, record.n_validation_images) == (48, 8)
    assert set(record.inputs) == {"manifest", "shards", "splits"}


def test_two_processes_of_one_run_do_not_meet(
    write_config: Write, run_trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    freeze(write_config(), run_dir)
    monkeypatch.setattr("modelops.trainer.process.WAIT_S", 0.0)
    with output_lock(run_dir, inside=True):
        done = run_trainer(run_dir)
    assert done.code == 1
    assert f"{run_dir}: in use by process" in done.err
    assert not (run_dir / "train.json").exists()


@pytest.mark.slow
def test_the_loss_goes_down_on_real_pictures(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    freeze(write_config(training={"total_steps": 120, "save_every_steps": 120}), run_dir)
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert record.loss_trend == "down"
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert held_out[-1] < 0.5 * held_out[0]
