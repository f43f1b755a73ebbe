"""Open a model source from a path or URL: checkpoint, exported artifact, live endpoint, folder."""

from __future__ import annotations

from pathlib import Path

from modelops.base.errors import UsageError
from modelops.data.folders import is_image
from modelops.evaluation.sources.endpoint import TIMEOUT_S, EndpointSource
from modelops.evaluation.sources.folder import FolderSource
from modelops.models.sources import ModelSource


def open_source(
    uri: str,
    *,
    batch_size: int = 16,
    device: str = "cpu",
    runtime: str = "auto",
    timeout_s: float = TIMEOUT_S,
    sha256: str | None = None,
    store: str | Path | None = None,
) -> ModelSource:
    """Open the model source that the user named.

    Args:
        uri: a diffusers directory or hub id, an artifact directory (one with artifact.json), an
            http(s) URL of a service that speaks the OpenAI Images API, or a folder of images.
        batch_size: images per call; does not change any image.
        device: of torch, for a checkpoint.
        runtime: of an artifact: "auto", "onnxruntime" or "openvino".
        timeout_s: of an endpoint, for the answer to one request.
        sha256: digest that a checkpoint or artifact must have.
        store: folder in which several processes share one copy of it, see `private_copy`.

    Raises:
        UsageError: the address is none of these.
    """
    if uri.startswith(("http://", "https://")):
        return EndpointSource(uri, concurrency=min(batch_size, 4), timeout_s=timeout_s)
    path, shared = Path(uri), Path(store) if store else None
    if (path / "artifact.json").is_file():
        from modelops.export.artifact.open import open_artifact

        return open_artifact(
            path, runtime=runtime, batch_size=batch_size, sha256=sha256, store=shared
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        if any(map(is_image, path.iterdir())):
            return FolderSource(path)
        raise UsageError(
            f"{uri}: neither a diffusers checkpoint, an artifact, nor a folder of images",
            hint="name a directory such as runs/pilot/checkpoints/step-1000",
        )
    from modelops.models.sources import open_checkpoint

    return open_checkpoint(uri, device=device, batch_size=batch_size, sha256=sha256, store=shared)
