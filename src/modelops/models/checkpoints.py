"""Writing of a pipeline as a checkpoint directory, for training runs and tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelops.models.sources import pipeline_code


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Write a PixelFlowPipeline as a diffusers directory with its code beside it.

    Every directory has files of its own, the frozen text encoder's too: with hard links, damage to
    one would be damage to all. Writing MiniLM's 92 MB takes about 0.3 s more than a link.

    Args:
        pipeline: the pipeline.
        directory: an existing, empty directory.
    """
    pipeline.save_pretrained(directory)
    index = directory / "model_index.json"
    config = json.loads(index.read_text("utf-8"))
    config["_class_name"] = ["pipeline", type(pipeline).__name__]
    config.pop("_name_or_path", None)
    index.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (directory / "pipeline.py").write_bytes(pipeline_code())
