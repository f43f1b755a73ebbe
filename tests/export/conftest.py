"""Artifacts of the small checkpoint, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from once import made_once


@pytest.fixture(scope="session")
def int8_artifact(
    onnx_artifact: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The INT8 artifact of the tiny checkpoint. Read only."""

    def make(folder: Path) -> None:
        from modelops.export.int8.export import Int8Options, export_int8

        export_int8(
            onnx_artifact, tiny_checkpoint, folder / "int8",
            prompts=["red heart", "dog", "house", "bicycle"],
            options=Int8Options(steps=6, rows=32, speed_rounds=3, search_seconds=5),
            allow=True,  # a network this small is not faster in INT8 for sure
        )  # fmt: skip

    return made_once(tmp_path_factory, "int8_artifact", make) / "int8"
