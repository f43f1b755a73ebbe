"""What a node opens at its start: the model and the two filters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelops.export.runtimes.graphs import process_cores
from modelops.models.sources import load_checkpoint
from modelops.records import SourceInfo
from modelops.serving.workers import Worker, one_at_a_time


def open_model(
    directory: Path,
    *,
    runtime: str = "auto",
    device: str = "cpu",
    batch_size: int = 16,
    threads: int = 0,
    worker: Worker | None = None,
) -> tuple[Any, SourceInfo]:
    """(pipeline, what runs it) of an exported artifact or a checkpoint directory.

    Args:
        device: of a checkpoint: "cpu", "cuda", "cuda:K" or "auto". An artifact's runtime chooses
            between processor and GPU itself; the GPU is K, or the worker's own.
        threads: CPU threads; 0 is all cores, divided by the workers.
        worker: which of several this is. Not yet run with several GPUs.

    Raises:
        ModelopsError: it cannot be opened.
    """
    import torch

    worker = worker or Worker()
    share = worker.threads(threads, process_cores())
    if share is not None:
        torch.set_num_threads(share)
    visible = torch.cuda.device_count()
    if (directory / "artifact.json").is_file():
        from modelops.export.runtime import open_artifact

        # The first one measures which runtime is the fastest, alone; the others read its choice.
        with one_at_a_time(worker, "runtime"):
            source = open_artifact(
                directory, runtime=runtime, batch_size=batch_size, threads=share,
                device_id=worker.cuda_number(device, visible),
            )  # fmt: skip
        return source.pipeline, source.info
    device = worker.torch_device(device, visible)
    pipeline = load_checkpoint(directory, device=device)
    pipeline.set_progress_bar_config(disable=True)
    info = SourceInfo(
        kind="checkpoint", uri=directory.name, runtime=f"torch-{device.split(':')[0]}",
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
