"""Networks from Hugging Face-style directories, loaded whole or not at all.

Only safetensors are read, no custom code is run, and a network of which any weight is missing is
refused: the libraries would fill it with random numbers and go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import IntegrityError, MissingWeightsError, first_line
from modelops.base.files import read_json, sha256_file, sha256_json, sha256_tree
from modelops.base.private import PrivateCopy, private_copy
from modelops.models.hub import not_given, parse_hub_id

Image = npt.NDArray[np.uint8]
_NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a repository; the latter are words


def fetch_directory(target: str, *, revision: str | None = None) -> Path:
    """Return the directory of a network: the path itself, or a hub repository's snapshot.

    Args:
        target: a path, or a hub id, with or without an owner.
        revision: of the hub's repository; or as NAME@REVISION.

    Raises:
        UsageError: a file, or neither a path here nor a hub id.
        MissingWeightsError: the network is neither here nor available from the hub.
    """
    if Path(target).is_dir():
        return Path(target)
    repository, named = parse_hub_id(target)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=revision or named, allow_patterns=list(_NEEDED))
        )
    except Exception as error:  # the hub's client raises many kinds, of three libraries
        raise not_given(target) from error


def directory_digests(directory: Path, extractor: Path | None = None) -> dict[str, str]:
    """Digests of weights, config and preprocessing.

    Raises:
        MissingWeightsError: a part is not there.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise MissingWeightsError(
            f"{directory}: no weights as *.safetensors",
            hint="load the model where it came from and save_pretrained it; pickles are not read",
        )
    parts = (directory / "config.json", (extractor or directory) / "preprocessor_config.json")
    for part in parts:
        if not part.is_file():
            raise MissingWeightsError(f"{part}: not found", hint="copy the whole repository")
    digests = {path.name: sha256_file(path) for path in weights}
    single = next(iter(digests.values())) if len(digests) == 1 else sha256_json(digests)
    return {
        "weights_sha256": single,
        "config_sha256": sha256_json(read_json(parts[0])),
        "preprocessing_sha256": sha256_json(read_json(parts[1])),
    }


def load_part(kind: Any, directory: Path, **options: Any) -> Any:
    """`from_pretrained` of a class of diffusers or transformers, of a folder's own files alone.

    Code that lies in the folder is never run, nor is the user asked to run it, as transformers does
    on a terminal.

    Raises:
        Exception: any of what the libraries raise.
    """
    if kind.__module__.split(".")[0] == "transformers":
        options["trust_remote_code"] = False
    return kind.from_pretrained(directory, local_files_only=True, **options)


@contextlib.contextmanager
def no_code_offered() -> Iterator[None]:
    """Make what loads through transformers refuse a folder's code, not ask whether to run it.

    For libraries that do not pass `trust_remote_code` on, such as open_clip.
    """
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


@contextlib.contextmanager
def own_copy(directory: Path, store: Path | None = None) -> Iterator[PrivateCopy]:
    """Copy a network's files to where nobody changes them: its weights stay mapped to its files.
    Processes with one store share a copy.

    Raises:
        IntegrityError, ModelopsError: see `private_copy`.
    """
    if not directory.is_dir():
        raise MissingWeightsError(f"{directory}: no such directory")
    others = [
        entry.name for entry in directory.iterdir()
        if entry.suffix not in (".json", ".safetensors")
    ]  # fmt: skip
    digest = sha256_tree(directory, exclude=others) if store else None
    with private_copy(directory, exclude=others, sha256=digest, store=store) as copy:
        yield copy


def load_whole(kind: Any, directory: Path) -> Any:
    """A model in float32, ready to run.

    Raises:
        IntegrityError: it cannot be loaded, or weights are missing or have another shape.
    """
    _quiet()
    try:
        model, loading = load_part(kind, directory, use_safetensors=True, output_loading_info=True)
    except Exception as error:
        raise IntegrityError(f"{directory}: cannot be loaded: {first_line(error)}") from error
    faults = {key: loading.get(key) for key in ("missing_keys", "mismatched_keys", "error_msgs")}
    for key, found in faults.items():
        if found:
            raise IntegrityError(
                f"{directory}: {len(found)} weights: {key.replace('_', ' ')}, such as "
                f"{next(iter(found))}",
                hint="the weights belong to another config; copy the whole repository again",
            )
    return model.float().eval()


def load_processor(directory: Path) -> Any:
    """The image processor that the directory describes.

    Raises:
        IntegrityError: it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    _quiet()
    try:
        return load_part(AutoImageProcessor, directory)
    except Exception as error:
        raise IntegrityError(
            f"{directory}: its preprocessing cannot be loaded: {first_line(error)}"
        ) from error


def images_to_inputs(processor: Any, batch: Sequence[Image]) -> Any:
    """Convert images uint8 [H, W, 3] of any sizes to a network's inputs."""
    images = [image.copy() for image in batch]  # torch warns of arrays that cannot be written
    return processor(images=images, return_tensors="pt", input_data_format="channels_last")


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
