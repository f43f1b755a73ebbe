"""Writing of a pipeline as a checkpoint directory, for training runs and tests."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from modelops.models.sources import pipeline_code


def save_pipeline(pipeline: Any, directory: Path, *, frozen_from: Path | None = None) -> None:
    """Write a PixelFlowPipeline as a diffusers directory with its code beside it.

    Args:
        pipeline: the pipeline.
        directory: an existing, empty directory.
        frozen_from: an earlier checkpoint whose `text_encoder/` and `tokenizer/` are the same;
            they are hard-linked (or copied across file systems), not written again.
    """
    if frozen_from is None:
        pipeline.save_pretrained(directory)
    else:
        pipeline.unet.save_pretrained(directory / "unet")
        pipeline.scheduler.save_pretrained(directory / "scheduler")
        pipeline.save_config(directory)
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(frozen_from / name, directory / name, copy_function=_link_or_copy)
    index = directory / "model_index.json"
    config = json.loads(index.read_text("utf-8"))
    config["_class_name"] = ["pipeline", type(pipeline).__name__]
    config.pop("_name_or_path", None)
    index.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (directory / "pipeline.py").write_bytes(pipeline_code())


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
