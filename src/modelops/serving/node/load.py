"""Loading of a node at its start: the model and the two filters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.base.errors import NotReproducedError
from modelops.export.graphs.graph import process_cores
from modelops.models.sources import load_with_digest
from modelops.records.evaluation import SourceInfo
from modelops.records.release import ReleaseRecord
from modelops.serving.workers import Worker, one_at_a_time

log = logging.getLogger("modelops.serving")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """Model of a release, opened for a node.

    Attributes:
        pipeline: with its networks in the runtime that was chosen.
        source: names the runtime, and the reason for it.
        sha256: digest of the artifact or checkpoint that was opened.
        fallback: why the release's other artifact was opened in place of its model, or "".
    """

    pipeline: Any
    source: SourceInfo
    sha256: str
    fallback: str = ""


def open_released(
    release_dir: Path, release: ReleaseRecord, *, fallback: bool | None = None, **how: Any
) -> OpenedModel:
    """Open a release's model, or its fallback on processors where no runtime gives the model's
    numbers.

    Args:
        release_dir: verified.
        release: its record.
        fallback: True opens the fallback, False only the model; None the model if possible.
        how: arguments of `open_model`.

    Raises:
        NotReproducedError: the model does not give its numbers here and there is no fallback.
        ModelopsError: it cannot be opened for another reason.
    """
    why = "asked for"
    if not fallback:
        try:
            pipeline, source = open_model(
                release_dir / release.model, sha256=release.model_sha256, **how
            )
            return OpenedModel(pipeline, source, release.model_sha256)
        except NotReproducedError as error:
            if release.fallback is None or fallback is False:
                raise
            why = error.message
    if release.fallback is None or release.fallback_sha256 is None:
        raise NotReproducedError(f"{release_dir}: the release carries no fallback")
    log.warning("serving the release's fallback: %s", why)
    how["runtime"] = "auto"  # the runtime asked for was meant for the model
    pipeline, source = open_model(
        release_dir / release.fallback, sha256=release.fallback_sha256, **how
    )
    source = source.model_copy(update={"details": {**source.details, "fallback": why}})
    return OpenedModel(pipeline, source, release.fallback_sha256, why)


def open_model(
    directory: Path,
    *,
    runtime: str = "auto",
    device: str = "cpu",
    batch_size: int = 16,
    threads: int = 0,
    worker: Worker | None = None,
    sha256: str | None = None,
) -> tuple[Any, SourceInfo]:
    """Open an exported artifact or a checkpoint directory: (pipeline, its source with the runtime).

    What is opened is a private copy, one for all workers of the node; later changes of the
    directory change nothing.

    Args:
        device: of a checkpoint: "cpu", "cuda", "cuda:K" or "auto". An artifact's runtime chooses
            between processor and GPU itself; the GPU is K, or the worker's own.
        threads: CPU threads; 0 is all cores, divided by the workers.
        worker: this worker, if there are several. Not yet run with several GPUs.
        sha256: digest that the directory must have.

    Raises:
        IntegrityError: its digest is another.
        ModelopsError: the model cannot be opened.
    """
    import torch

    worker = worker or Worker()
    share = worker.threads(threads, process_cores())
    if share is not None:
        torch.set_num_threads(share)
    visible = torch.cuda.device_count()
    if (directory / "artifact.json").is_file():
        from modelops.export.artifact.open import open_artifact

        # The first one measures which runtime is the fastest, alone; the others read its choice.
        with one_at_a_time(worker, "runtime"):
            source = open_artifact(
                directory, runtime=runtime, batch_size=batch_size, threads=share,
                device_id=worker.cuda_number(device, visible), sha256=sha256,
                store=worker.directory,
            )  # fmt: skip
        return source.pipeline, source.info
    device = worker.torch_device(device, visible)
    pipeline, _ = load_with_digest(directory, device=device, sha256=sha256, store=worker.directory)
    pipeline.set_progress_bar_config(disable=True)
    info = SourceInfo(
        kind="checkpoint", uri=directory.name, runtime=f"torch-{device.split(':')[0]}",
        precision=str(pipeline.dtype).removeprefix("torch."),
    )  # fmt: skip
    return pipeline, info


def prompt_filter_loader(name: str) -> Callable[[], Any]:
    """Return the function that opens a prompt filter; the name is sure to be known."""
    from modelops.safety.registry import check_prompt_filter, open_prompt_filter

    check_prompt_filter(name)
    return lambda: open_prompt_filter(name)


def image_filter_loader(name: str, store: Path | None = None) -> Callable[[], Any]:
    """Return the function that opens an image filter; the name is sure to be known. Workers share
    its weights in `store`."""
    from modelops.safety.registry import check_image_filter, open_image_filter

    def open_nsfw() -> Any:
        from modelops.safety.image import OpenNsfwFilter

        return OpenNsfwFilter(threads=1)  # the cores belong to the engine

    if check_image_filter(name).name == "open_nsfw":
        return open_nsfw
    return lambda: open_image_filter(name, store=store)
