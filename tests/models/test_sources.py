"""Checkpoints open without running what lies in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modelops.base.errors import UsageError
from modelops.base.files import sha256_bytes
from modelops.models import sources
from modelops.models.pipeline import PixelFlowPipeline
from modelops.models.sources import load_checkpoint

HARMFUL = b"raise SystemExit('the directory was run')\n"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_other_code_is_refused(checkpoint: Path) -> None:
    (checkpoint / "pipeline.py").write_bytes(HARMFUL)
    with pytest.raises(UsageError, match="custom code that this modelops did not write"):
        load_checkpoint(checkpoint)


def test_an_earlier_pipelines_checkpoint_runs_this_ones(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "pipeline.py").write_bytes(HARMFUL)
    monkeypatch.setattr(sources, "EARLIER_PIPELINES", (sha256_bytes(HARMFUL),))
    assert type(load_checkpoint(checkpoint)) is PixelFlowPipeline


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_said_in_one_line(checkpoint: Path, part: str) -> None:
    shutil.rmtree(checkpoint / part)
    with pytest.raises(UsageError, match="cannot be loaded as a checkpoint") as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"unet": ["os", "system"]}', '{"unet": ["diffusers", "no"]}']
)
def test_a_spoilt_index_is_said_in_one_line(checkpoint: Path, index: str) -> None:
    (checkpoint / "model_index.json").write_text(index)
    with pytest.raises(UsageError, match="cannot be loaded as a checkpoint"):
        load_checkpoint(checkpoint)
