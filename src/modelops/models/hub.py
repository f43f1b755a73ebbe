"""Models of the Hugging Face hub: ids told from paths, and never asked for in silence."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from modelops.base.errors import MissingWeightsError, UsageError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".json")
_log = logging.getLogger(__name__)


def pipeline_directory(name: str | Path) -> Path:
    """Return the directory of a pipeline: the path itself, or a hub repository's snapshot.

    Args:
        name: a path, OWNER/NAME, or OWNER/NAME@REVISION.

    Raises:
        UsageError: a file, or neither a path here nor a hub id.
        MissingWeightsError: the hub does not give it, and its cache lacks it.
    """
    if Path(name).is_dir():
        return Path(name)
    repository, revision = parse_hub_id(str(name), owner=True)
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        return Path(
            DiffusionPipeline.download(repository, revision=revision, trust_remote_code=False)
        )
    except Exception as error:  # the hub's client raises many kinds, of three libraries
        raise not_given(name) from error


def parse_hub_id(name: str, *, owner: bool = False) -> tuple[str, str | None]:
    """Return (repository, revision) of a name that is no directory here, and say it on stderr.

    Args:
        name: NAME, OWNER/NAME, or one of them with @REVISION.
        owner: whether there must be an owner.

    Raises:
        UsageError: it is a file, it cannot be an id, or it begins with a folder that is here, as a
            mistyped path does, and the hub's cache lacks it.
    """
    repository, at, revision = name.partition("@")
    if Path(name).exists():
        raise UsageError(
            f"{name}: a file, not a directory",
            hint="name the directory of a whole model; diffusers makes one of a single file: "
            "from_single_file(FILE).save_pretrained(DIRECTORY)",
        )
    possible = _ID.fullmatch(repository) and not repository.endswith(_FILES)
    if not possible or (owner and "/" not in repository) or bool(at) != bool(revision):
        raise UsageError(
            f"{name}: no such directory", hint="name a directory, or OWNER/NAME of the hub"
        )
    first = repository.split("/")[0]
    if Path(first).is_dir() and not _is_cached(repository):
        raise UsageError(
            f"{name}: no such directory, though {first}/ is here; the hub was not asked",
            hint=f"correct the path, or run it where there is no folder {first}",
        )
    _log.warning("%s: no directory here; taken from the Hugging Face hub", name)
    return repository, revision or None


def _is_cached(repository: str) -> bool:
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()


def not_given(name: str | Path) -> MissingWeightsError:
    """Return the error for a repository that the hub's client could not fetch."""
    return MissingWeightsError(
        f"{name}: no directory here, not in the local Hugging Face cache, and the hub did not "
        "give it",
        hint="give a local directory, or check the id and the network",
    )
