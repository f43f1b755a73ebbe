"""Artifacts of the small checkpoint, made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def int8_artifact(
    onnx_artifact: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The INT8 artifact of the tiny checkpoint. Read only."""
    from modelops.export.int8.export import Int8Options, export_int8

    out = tmp_path_factory.mktemp("artifacts") / "int8"
    export_int8(
        onnx_artifact, tiny_checkpoint, out, prompts=["red heart", "dog", "house", "bicycle"],
        options=Int8Options(steps=6, rows=32, speed_rounds=3, search_seconds=5),
        allow=True,  # a network this small is not faster in INT8 for sure
    )  # fmt: skip
    return out
