"""What a node opens at its start: the model and the two filters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelops.models.sources import load_checkpoint
from modelops.records import SourceInfo


def open_model(
    directory: Path, *, runtime: str = "auto", device: str = "cpu", batch_size: int = 16
) -> tuple[Any, SourceInfo]:
    """(pipeline, what runs it) of an exported artifact or a checkpoint directory.

    Raises:
        ModelopsError: it cannot be opened.
    """
    if (directory / "artifact.json").is_file():
        from modelops.export.runtime import open_artifact

        source = open_artifact(directory, runtime=runtime, batch_size=batch_size)
        return source.pipeline, source.info
    pipeline = load_checkpoint(directory, device=device)
    pipeline.set_progress_bar_config(disable=True)
    info = SourceInfo(
        kind="checkpoint", uri=directory.name, runtime=f"torch-{device}",
        precision=str(pipeline.dtype).removeprefix("torch."),
    )  # fmt: skip
    return pipeline, info


def prompt_filter_loader(name: str) -> Callable[[], Any]:
    """What opens a prompt filter; the name is sure to be known."""
    from modelops.safety.registry import check_prompt_filter, open_prompt_filter

    check_prompt_filter(name)
    return lambda: open_prompt_filter(name)


def image_filter_loader(name: str) -> Callable[[], Any]:
    """What opens an image filter; the name is sure to be known."""
    from modelops.safety.registry import check_image_filter, open_image_filter

    def open_nsfw() -> Any:
        from modelops.safety.image import OpenNsfwFilter

        return OpenNsfwFilter(threads=1)  # the cores belong to the engine

    if check_image_filter(name).name == "open_nsfw":
        return open_nsfw
    return lambda: open_image_filter(name)
