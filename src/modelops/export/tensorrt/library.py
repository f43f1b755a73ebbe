"""The package tensorrt and the GPU, or one line that says which of them is not there."""

from __future__ import annotations

import importlib
import importlib.util

from modelops.base.errors import ExportError, MissingExtraError

MINIMUM_VERSION = (10, 1)  # the first with contexts in memory that the caller owns
PIP_COMMAND = 'pip install "modelops[gpu]"'


def has_tensorrt() -> bool:
    """Return whether the package tensorrt is installed, without importing it.

    tensorrt-stubs leave a folder of that name that imports as an empty package; that is not it.
    """
    try:
        found = importlib.util.find_spec("tensorrt")
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None


def require_tensorrt(needed_for: str = "a TensorRT engine") -> str:
    """Make sure that `import tensorrt` works.

    Args:
        needed_for: what the user asked for, in a few words.

    Returns:
        TensorRT's version.

    Raises:
        MissingExtraError: it is not installed, or its libraries do not load.
        ExportError: it is older than MINIMUM_VERSION.
    """
    if not has_tensorrt():
        raise MissingExtraError(
            f"{needed_for} needs the package tensorrt, which is not installed", hint=PIP_COMMAND
        )
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingExtraError(
            f"the package tensorrt is installed but does not load: {reason}",
            hint="pip install --force-reinstall tensorrt",
        ) from error
    version = str(getattr(module, "__version__", ""))
    if not hasattr(module, "Builder") or version_numbers(version) < MINIMUM_VERSION:
        least = ".".join(map(str, MINIMUM_VERSION))
        raise ExportError(
            f"TensorRT {version or '(no version)'} cannot be used: {least} or newer is needed",
            hint=PIP_COMMAND,
        )
    return version


def require_gpu(device: int = 0) -> None:
    """Make sure that torch sees the CUDA device.

    Raises:
        ExportError: it does not.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= device < count:
        found = f"torch finds {count} CUDA devices here" if count else "torch finds none here"
        raise ExportError(
            f"TensorRT needs an NVIDIA GPU (cuda:{device}), and {found}",
            hint="run it where there is one, or use --runtime onnxruntime or openvino",
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """ "10.13.0.35" as (10, 13, 0, 35); what is no number ends it."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
