"""Early checks: what they see, what they cost, and that no step depends on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import load_file

from modelops.models.sources import open_checkpoint
from modelops.records.read import read_record
from modelops.records.train import TrainRecord
from modelops.trainer.early import EarlyChecks, make_early_checks, new_overfitting
from modelops.trainer.pictures import Pictures, load_pictures
from modelops.training.config import load_config
from runs import freeze, stats_rows

Write = Callable[..., Path]
VALUES = {
    "early_nearest_train_distance", "early_nearest_train_distance_heldout",
    "early_nearest_train_gap", "early_near_copy_rate", "early_seen_prompt_gap",
}  # fmt: skip


@pytest.fixture
def pictures(write_config: Write, tmp_path: Path) -> Pictures:
    return load_pictures(load_config(write_config()), tmp_path)


def test_a_run_with_checks_learns_what_a_run_without_learns(
    write_config: Write, run_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    weights, losses = [], []
    for every in (4, 0):
        run_dir = tmp_path / f"every-{every}"
        freeze(write_config(training={"early_check_every_steps": every}), run_dir)
        done = run_trainer(run_dir)
        assert done.code == 0, done.err
        rows = stats_rows(run_dir)
        assert [row["step"] for row in rows if row.keys() >= VALUES] == ([4, 8] if every else [])
        losses.append([row["loss"] for row in rows if "loss" in row])
        state = run_dir / "checkpoints" / "step-8" / "training_state" / "weights.safetensors"
        weights.append(load_file(state))
    assert losses[0] == losses[1]
    for name, value in weights[0].items():
        assert np.array_equal(value, weights[1][name]), name
    report = (tmp_path / "every-4" / "report.md").read_text()
    assert "samples minus held-out images | not measured" not in report
    record = read_record(tmp_path / "every-4" / "train.json", TrainRecord)
    probe = [row["train_probe_loss"] for row in stats_rows(tmp_path / "every-4")
             if "train_probe_loss" in row]  # fmt: skip
    assert record.final_train_probe_loss == probe[-1]


def test_an_untrained_network_is_far_from_training_pictures_and_copies_are_seen(
    write_config: Write, pictures: Pictures, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = load_config(write_config(training={"early_check_every_steps": 1}))

    class Memory:
        """A pipeline that knows the images of some captions by heart."""

        def set_progress_bar_config(self, **_: Any) -> None: ...

        def __call__(self, prompt: list[str], **_: Any) -> Any:
            known = dict(zip(pictures.train.captions, pictures.train.cached, strict=True))
            made = [known.get(text, pictures.train.cached[0]) for text in prompt]
            return type("Made", (), {"images": np.stack(made).astype(np.float32) / 255})

    torch.manual_seed(5)
    before = torch.get_rng_state()
    checks = make_early_checks(pictures, config, Memory(), tmp_path)
    assert checks is not None
    row, verdict = checks.measure()
    assert verdict is not None and verdict.answer == "copies"
    assert row["early_near_copy_rate"] == 1.0 and row["early_nearest_train_gap"] < 0
    assert torch.equal(torch.get_rng_state(), before)

    real = open_checkpoint(tiny_checkpoint).pipeline
    checks = make_early_checks(pictures, config, real, tmp_path)
    assert checks is not None
    row, verdict = checks.measure()
    assert verdict is not None and verdict.answer == "cannot tell"
    assert set(row) == VALUES
    assert row["early_near_copy_rate"] == 0.0 and row["early_nearest_train_gap"] > 0.1
    assert checks.spent >= checks.last > 0  # type: ignore[operator]


def test_checks_keep_to_their_share_of_the_time(
    write_config: Write, pictures: Pictures, tmp_path: Path
) -> None:
    checks = EarlyChecks(pictures, load_config(write_config()), None, tmp_path)

    def due(seconds: float, validated: bool = True) -> bool:
        return checks.due(10, validated=validated, training_seconds=seconds, images=10_000)

    assert not due(60)  # loading the features' network alone would cost more than 3 %
    assert due(1000) and not due(1000, validated=False)
    checks.spent, checks.last = 20.0, 1.0
    assert not due(690) and due(710)


def test_checks_are_off_when_told_or_without_held_out_pictures(
    write_config: Write, pictures: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = load_config(write_config(training={"early_check_every_steps": 0}))
    assert make_early_checks(pictures, off, None, tmp_path) is None
    alone = Pictures(pictures.train, None, {})
    assert make_early_checks(alone, load_config(write_config()), None, tmp_path) is None
    assert capsys.readouterr().err == ""
    asked = load_config(write_config(training={"early_check_every_steps": 5}))
    assert make_early_checks(alone, asked, None, tmp_path) is None
    assert "no held-out images" in capsys.readouterr().err


def test_overfitting_is_said_once_for_each_kind() -> None:
    validation = [0.43, 0.27, 0.23, 0.21, 0.200, 0.1932, 0.1923, 0.1931, 0.1915, 0.1904, 0.1891,
                  0.1906, 0.1934, 0.1969]  # fmt: skip
    training = [0.45, 0.29, 0.23, 0.21, 0.189, 0.1744, 0.1643, 0.1558, 0.1485, 0.1412, 0.1350,
                0.1280, 0.1214, 0.1166]  # fmt: skip
    rows: list[dict[str, Any]] = []
    said = []
    for place, (held_out, probe) in enumerate(zip(validation, training, strict=True)):
        step = 100 * (place + 1)
        rows.append({"step": step, "loss": 0.2})
        rows.append({"step": step, "validation_loss": held_out, "train_probe_loss": probe})
        if found := new_overfitting(rows):
            said.append((step, found.kind, found.since.step))
    assert said == [(800, "stagnates", 500), (1400, "rises", 1100)]


@pytest.mark.slow
def test_a_run_on_few_pictures_overfits_and_says_since_when(
    write_config: Write, run_trainer: Callable[..., Any], workspace: Path, tmp_path: Path
) -> None:
    run_dir, splits = tmp_path / "run", tmp_path / "splits.parquet"
    table = parquet.read_table(workspace / "data" / "splits.parquet").to_pydict()
    seen = set([n for n, s in zip(table["id"], table["split"], strict=True) if s == "train"][:6])
    table["split"] = ["train" if name in seen else "val" for name in table["id"]]
    parquet.write_table(pa.table(table), splits)
    training = {"total_steps": 400, "save_every_steps": 400, "validate_every_steps": 25, "lr": 4e-3,
                "validation_samples": 54}  # fmt: skip
    freeze(write_config(training=training, data={"splits": str(splits)}), run_dir)
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert record.overfitting_since_step is not None and 0 < record.overfitting_since_step < 400
    line = f"overfitting since step {record.overfitting_since_step}"
    assert line in (run_dir / "report.md").read_text()
    assert "overfitting since step" in done.err
    assert '"event": "overfitting"' in done.out
