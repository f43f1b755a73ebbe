"""A small real corpus and a config that trains on it in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

SMALL: dict[str, Any] = {
    "model": {
        "resolution": 16, "patch_size": 2, "channels": 32, "multipliers": [1],
        "layers_per_block": 1,
    },
    "data": {"manifest": "data/manifest.parquet"},
    "training": {
        "lr": 2e-3, "microbatch": 8, "total_steps": 8, "save_every_steps": 4, "warmup_steps": 2,
        "keep_checkpoints": None, "early_checkpoint": None, "validate_every_steps": 4,
        "validation_samples": 8, "sample_steps": 2, "sample_prompts": ["red heart"],
        "precision": "no",
    },
    "logging": {"log_every_steps": 1, "tensorboard": False},
}  # fmt: skip


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/manifest.parquet and splits: 60 OpenMoji images. Read only."""
    import pyarrow as pa
    from pyarrow import parquet

    from modelops.data.corpora.openmoji import build_corpus
    from modelops.data.manifest import read_manifest

    root = tmp_path_factory.mktemp("workspace")
    manifest = build_corpus(root / "data", resolution=16, limit=60, seed=0)
    rows = read_manifest(manifest).rows
    table = {
        "id": [row.id for row in rows],
        "split": ["val" if index % 5 == 4 else "train" for index in range(len(rows))],
        "group": [row.group for row in rows],
    }
    parquet.write_table(pa.table(table), root / "data" / "splits.parquet")
    return root


@pytest.fixture
def write_config(workspace: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a config with changes, given as section={key: value}; its data is the workspace's."""

    def write(**changes: dict[str, Any]) -> Path:
        data = {section: dict(values) for section, values in SMALL.items()}
        data["data"]["manifest"] = str(workspace / "data" / "manifest.parquet")
        for section, values in changes.items():
            data.setdefault(section, {}).update(values)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.fixture(scope="session")
def trainer_environment() -> dict[str, str]:
    """One thread: small networks are faster so, and tests share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Done:
    """How a run of the trainer ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_trainer(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Run the trainer's main function on a run directory, in this process: it starts faster."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that tests start: sums round alike

    def run(run_dir: Path, *arguments: str) -> Done:
        from modelops.trainer.__main__ import main

        capsys.readouterr()
        code = main([str(run_dir / "config.json"), *arguments])
        return Done(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)
