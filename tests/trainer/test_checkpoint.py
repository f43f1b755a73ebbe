"""Checkpoints on a full disk, and after a process was killed while it wrote one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import disks
from modelops.base.errors import ModelopsError
from modelops.base.files import sha256_tree
from modelops.models.sources import open_checkpoint
from modelops.trainer.checkpoint import (
    Progress,
    list_checkpoints,
    save_checkpoint,
)


def save(directory: Path, pipeline: Any, step: int) -> Path:
    return save_checkpoint(
        directory, Progress(step=step), pipeline=pipeline, network=pipeline.unet,
        optimizer=torch.optim.Adam(pipeline.unet.parameters()), scaler=None,
        identity={"effective_batch": 1}, keep=None,
    )  # fmt: skip


def test_a_full_disk_leaves_the_checkpoints_that_were_there(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pipeline = open_checkpoint(tiny_checkpoint).pipeline
    save(tmp_path, pipeline, 1)
    before = sha256_tree(tmp_path)
    for limit in (100, 5_000, 200_000):
        with disks.file_limit(limit), pytest.raises(ModelopsError, match="cannot write") as caught:
            save(tmp_path, pipeline, 2)
        assert "File too large" in caught.value.message
        assert sha256_tree(tmp_path) == before
    save(tmp_path, pipeline, 2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
