"""Runs on data that are odd: captions too long, images that cannot be read, and what changes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from modelops.base.files import sha256_bytes, write_bytes
from modelops.data.manifest import read_manifest, write_manifest
from modelops.data.split import read_splits
from modelops.models.encoders import load_text_encoder
from modelops.records.read import read_record
from modelops.records.train import TrainRecord
from modelops.trainer.texts import measure_captions
from runs import freeze, losses

Write = Callable[..., Path]
Trainer = Callable[..., Any]


def test_captions_that_are_cut_are_counted() -> None:
    """64 captions whose last word alone differs are one caption to the model."""
    tokenizer, _ = load_text_encoder()
    long = " ".join(["a heart"] * 15)  # 30 tokens, and the marks are two
    captions = {f"id{number}": f"{long} word {number}" for number in range(64)}
    captions |= {"whole": long, "same": long, "short": "a sun"}
    found = measure_captions(captions, tokenizer)
    assert (found.max_tokens, found.n, found.n_cut, found.n_made_equal) == (32, 67, 64, 64)
    assert list(found.longest.values()) == [34] * 5 and "whole" not in found.longest
    assert found.warning.startswith("64 of 67 captions have more than 32 tokens")
    assert "64 became equal to another; longest: id0 (34 tokens), id1" in found.warning
    assert measure_captions({"a": long, "b": long}, tokenizer).warning == ""


def test_what_is_left_out_or_cut_is_said_before_the_first_step(
    write_config: Write, run_trainer: Trainer, workspace: Path, tmp_path: Path
) -> None:
    """One rule for an image that cannot be decoded, whether images are kept in memory or not."""
    shutil.copytree(workspace / "data", tmp_path / "data")
    manifest = read_manifest(tmp_path / "data" / "manifest.parquet")
    split = read_splits(tmp_path / "data" / "splits.parquet")
    rows = list(manifest.rows)
    train = [index for index, row in enumerate(rows) if split[row.id] == "train"]
    bad = rows[train[3]]
    cut = manifest.image_path(bad).read_bytes()[:200]
    manifest.image_path(bad).write_bytes(cut)
    rows[train[3]] = replace(bad, sha256=sha256_bytes(cut))
    long = rows[train[4]] = replace(rows[train[4]], caption="a heart " * 16)
    write_manifest(manifest.path, rows)
    runs = []
    for cache_gb in (0, 4):
        run_dir = tmp_path / f"run{cache_gb}"
        freeze(
            write_config(data={"manifest": "data/manifest.parquet", "cache_gb": cache_gb}), run_dir
        )
        done = run_trainer(run_dir)
        assert done.code == 0, done.err
        assert f"left out, as they cannot be used: {bad.id}: " in done.err
        record = read_record(run_dir / "train.json", TrainRecord)
        assert record.n_train_images == len(train) - 1
        assert list(record.quarantined) == [bad.id]
        assert record.captions is not None and record.captions.longest == {long.id: 34}
        for said in ("1 samples are left out", "captions have more than 32 tokens"):
            assert f"warning: {said}" in done.err.replace(f"1 of {record.captions.n} ", "")
            assert any(said in line for line in record.warnings)
            assert said in (run_dir / "report.md").read_text()
        runs.append(losses(run_dir))
    assert runs[0] == runs[1]


def test_an_image_that_changes_while_training_costs_no_step(
    write_config: Write, run_trainer: Trainer, workspace: Path, tmp_path: Path
) -> None:
    shutil.copytree(workspace / "data", tmp_path / "data")
    run_dir = tmp_path / "run"
    options = {"manifest": "data/manifest.parquet", "cache_gb": 0}
    training = {"total_steps": 100_000, "save_every_steps": 100_000}
    freeze(write_config(data=options, training=training), run_dir)
    manifest = read_manifest(tmp_path / "data" / "manifest.parquet")
    split = read_splits(tmp_path / "data" / "splits.parquet")
    paths = [manifest.image_path(row) for row in manifest.rows if split[row.id] == "train"]

    def replace_it() -> None:
        stats = run_dir / "stats.jsonl"
        while not (stats.is_file() and '"loss"' in stats.read_text()):
            time.sleep(0.01)
        write_bytes(paths[0], paths[1].read_bytes())

    thread = threading.Thread(target=replace_it, daemon=True)
    thread.start()
    done = run_trainer(run_dir)
    thread.join()
    assert done.code == 1
    assert "changed while training" in done.err and paths[0].name in done.err
    record = read_record(run_dir / "train.json", TrainRecord)
    assert record.steps > 0 and [ref.step for ref in record.checkpoints] == [record.steps]


def test_a_run_does_not_go_on_with_another_text_encoder(
    write_config: Write, run_trainer: Trainer, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_checkpoint / "text_encoder", encoder)
    shutil.copytree(tiny_checkpoint / "tokenizer", encoder, dirs_exist_ok=True)
    run_dir = tmp_path / "run"
    freeze(write_config(model={"text_encoder": str(encoder)}, training={"total_steps": 1}), run_dir)
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    weights = load_file(encoder / "model.safetensors")
    name = next(name for name in weights if "word_embeddings" in name)
    save_file({**weights, name: weights[name][::-1].copy()}, encoder / "model.safetensors")
    done = run_trainer(run_dir, "--resume")
    assert done.code == 1
    assert "its text encoder is not that of this run now" in done.err


def test_changed_data_stop_the_run(
    write_config: Write, run_trainer: Trainer, workspace: Path, tmp_path: Path
) -> None:
    shutil.copytree(workspace / "data", tmp_path / "data")
    run_dir = tmp_path / "run"
    freeze(write_config(data={"manifest": "data/manifest.parquet"}), run_dir)
    splits = tmp_path / "data" / "splits.parquet"
    splits.write_bytes(splits.read_bytes() + b"\0")
    done = run_trainer(run_dir)
    assert done.code == 1
    assert "the splits changed" in done.err
    assert read_record(run_dir / "train.json", TrainRecord).status == "failed"
