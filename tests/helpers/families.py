"""A tiny checkpoint of each family and its fp32 artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_pipelines
from modelops.export.to_onnx import export_onnx
from modelops.records.export import ArtifactRecord

PROMPTS = ["red heart", "dog", "house of the sun", "green flag"]
# The default suite has the smallest. One process runs a family: its tests share the artifact.
ALL = [
    pytest.param(
        family, marks=[pytest.mark.xdist_group(family), *[pytest.mark.slow] * (family != "ddpm")]
    )
    for family in tiny_pipelines.FAMILIES
]


def size_of(family: str) -> tuple[int, int] | None:
    """Height and width in pixels; None is the only one of the family."""
    return None if family == "ddpm" else (32, 32)


def saved(family: str, folder: Path) -> Path:
    tiny_pipelines.make(family).save_pretrained(folder / family)
    return folder / family


def exported(family: str, checkpoint: Path, out: Path, **options: Any) -> ArtifactRecord:
    return export_onnx(checkpoint, out, size=size_of(family), prompts=PROMPTS, **options)


def make(family: str, folder: Path) -> None:
    """Write the checkpoint `folder`/FAMILY, its artifact `folder`/onnx, and in stages.json what the
    export said of its stages."""
    told: list[tuple[str, int, int]] = []
    exported(
        family, saved(family, folder), folder / "onnx", on_stage=lambda *stage: told.append(stage)
    )
    (folder / "stages.json").write_text(json.dumps(told))
