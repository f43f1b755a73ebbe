"""Loading of a diffusers directory: its own files alone, no code, and one line for what lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from modelops.base.errors import UsageError, first_line
from modelops.base.extras import missing_package
from modelops.base.files import read_json
from modelops.models.pretrained import load_part

_WEIGHTS = re.compile(
    r"(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?"
    r"\.(safetensors|bin)",
    re.ASCII,
)
# Of networks that pipelines take hidden states of; many are saved without them.
_UNUSED_HEADS = ("pooler", "lm_head", "classifier")
# What the libraries raise of files that are broken, lacking or of other versions.
_FAULTS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError,
    SafetensorError,
)  # fmt: skip


def load_diffusers(directory: Path, dtype: torch.dtype) -> Any:
    """Load any diffusers pipeline that needs no code of its own.

    A directory whose weights are there as a variant alone (`*.fp16.safetensors`) is loaded from
    that; the pipeline's configuration says so under "_variant".

    Raises:
        UsageError: it cannot be loaded.
        MissingExtraError: a package that one of its parts needs is not installed.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # the error is reported once, below
    transformers_logging.set_verbosity_error()
    variant = find_variant(directory)
    try:
        parts = _parts_of_transformers(directory, dtype, variant)
        pipeline = DiffusionPipeline.from_pretrained(
            directory, dtype=dtype, variant=variant, **parts
        )
    except ImportError as error:
        raise missing_package(error, needed_for=f"{directory}") from error
    except _FAULTS as error:
        if "pip install" in str(error):
            raise missing_package(error, needed_for=f"{directory}") from error
        raise UsageError(
            f"{directory}: cannot be loaded as a diffusers pipeline: {first_line(error)}",
            hint="give a complete diffusers directory, and install what it asks for",
        ) from error
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):  # diffusers leaves what files lack on no device
            _require_whole(
                directory / name,
                [key for key, value in module.state_dict().items() if value.is_meta],
            )
    if variant:
        pipeline.register_to_config(_variant=variant)
    return pipeline


def find_variant(directory: Path) -> str | None:
    """Return the variant that a directory's weights must be loaded from; None for plain files.

    Raises:
        UsageError: its networks are there as different variants.
    """
    found: dict[str, str] = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        found |= _variants_alone(folder)
    if len(found) > 1:
        raise UsageError(
            f"{directory}: weights of different variants alone: {', '.join(found.values())}",
            hint="keep one variant of every network, or plain *.safetensors",
        )
    return next(iter(found), None)


def _variants_alone(folder: Path) -> dict[str, str]:
    """Return {variant: a file of it} of a network that has no plain weights; {} for others."""
    files = [match for path in folder.iterdir() if (match := _WEIGHTS.fullmatch(path.name))]
    if not all(match["variant"] for match in files):
        return {}
    return {match["variant"]: f"{folder.name}/{match[0]}" for match in files}


def load_pixel_flow(directory: Path, dtype: torch.dtype) -> Any:
    """Load this package's pipeline around a directory's components.

    diffusers itself would run the directory's pipeline.py, from one folder that all processes of a
    user share and that a read-only home does not have.

    Raises:
        UsageError: it cannot be loaded.
        MissingExtraError: a package that one of its parts needs is not installed.
    """
    import diffusers
    import transformers

    from modelops.models.pipeline import PixelFlowPipeline

    variant = find_variant(directory)
    try:
        index = read_json(directory / "model_index.json")
        libraries = {"diffusers": diffusers, "transformers": transformers}
        parts: dict[str, Any] = {}
        for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
            library, class_name = index.pop(name)
            folder, wanted = directory / name, {}
            if name in ("unet", "text_encoder"):
                wanted = {"dtype": dtype, "variant": variant if _variants_alone(folder) else None}
            parts[name] = load_part(getattr(libraries[library], class_name), folder, **wanted)
        options = {name: value for name, value in index.items() if not name.startswith("_")}
        pipeline = PixelFlowPipeline(**parts, **options)
    except ImportError as error:
        raise missing_package(error, needed_for=f"{directory}") from error
    except _FAULTS as error:
        raise UsageError(
            f"{directory}: cannot be loaded as a checkpoint: {first_line(error)}",
            hint="give a complete checkpoint directory",
        ) from error
    pipeline.unet.eval()
    pipeline.text_encoder.eval()
    if variant:
        pipeline.register_to_config(_variant=variant)
    return pipeline


def _parts_of_transformers(
    directory: Path, dtype: torch.dtype, variant: str | None
) -> dict[str, Any]:
    """Load what diffusers would load of transformers, but whole or not at all.

    diffusers would take random numbers for weights that are missing, and let Auto classes ask to
    run code.

    Raises:
        UsageError: weights are missing.
    """
    import transformers

    parts: dict[str, Any] = {}
    for name, value in read_json(directory / "model_index.json").items():
        folder = directory / name
        if not (isinstance(value, list) and value[0] == "transformers" and folder.is_dir()):
            continue
        kind = getattr(transformers, str(value[1]), None)
        if not isinstance(kind, type):
            continue  # diffusers says so
        if issubclass(kind, transformers.PreTrainedModel) or "Model" in kind.__name__:
            parts[name], loading = load_part(
                kind, folder, dtype=dtype, output_loading_info=True,
                variant=variant if _variants_alone(folder) else None,
            )  # fmt: skip
            _require_whole(folder, loading["missing_keys"])
        elif kind.__name__.startswith("Auto"):
            parts[name] = load_part(kind, folder)
    return parts


def _has_adapter(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(path, "pt") as weights:
        return any(".lora_" in key or ".base_layer." in key for key in weights.keys())  # noqa: SIM118


def _require_whole(folder: Path, missing: Iterable[str]) -> None:
    lacking = sorted(key for key in missing if not any(head in key for head in _UNUSED_HEADS))
    if lacking:
        if any(_has_adapter(path) for path in folder.glob("*.safetensors")):
            raise UsageError(
                f"{folder}: saved with a LoRA adapter in it",
                hint="call fuse_lora() and unload_lora_weights() before save_pretrained(), or save "
                "the adapter by itself and give it with --lora",
            )
        raise UsageError(
            f"{folder}: its files lack {lacking[0]}"
            + (f" and {len(lacking) - 1} more weights" if len(lacking) > 1 else ""),
            hint="copy the whole network again",
        )
