"""Report on this machine: devices, runtimes, extras, conflicts, caches, disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from modelops.base.environment import current_environment
from modelops.base.extras import EXTRA_OF_MODULE, has_module

State = Literal["ok", "missing", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report; `remedy` is what to do about it, if anything."""

    area: str
    name: str
    state: State
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(directory: Path = Path()) -> list[Finding]:
    """Look at this machine. A `problem` makes something that is installed not work; `missing` is
    an optional part that is not there."""
    return [
        *_hardware(directory),
        *_torch(),
        *_arithmetic(),
        *_runtimes(),
        *_extras(),
        *_weights(),
        *_caches(),
    ]


def _hardware(directory: Path) -> list[Finding]:
    machine = current_environment()
    free = shutil.disk_usage(directory).free / 1e9
    return [
        Finding("machine", "python", "ok", f"{machine.python} on {machine.platform}"),
        Finding("machine", "cpu", "ok", f"{machine.cpu}, {machine.cores} cores"),
        Finding("machine", "memory", "ok", f"{machine.memory_gb} GiB"),
        Finding(
            "machine", "disk", "ok" if free > 2 else "warning", f"{free:.1f} GB free here",
            "" if free > 2 else "the demo needs about 2 GB",
        ),
    ]  # fmt: skip


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [
            Finding("torch", "torch", "problem", str(error), "pip install --force-reinstall torch")
        ]
    found = [
        Finding("torch", "torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            name = torch.cuda.get_device_name(index)
            found.append(Finding("torch", f"cuda:{index}", "ok", f"{name}, {memory:.0f} GiB"))
    else:
        found.append(
            Finding("torch", "cuda", "missing", "no CUDA device; everything runs on the CPU")
        )
    try:
        import torchvision

        found.append(Finding("torch", "torchvision", "ok", torchvision.__version__))
    except (ImportError, RuntimeError, OSError) as error:
        found.append(
            Finding(
                "torch", "torchvision", "problem", str(error).splitlines()[0],
                "install torch and torchvision together, from one index",
            )
        )  # fmt: skip
    return found


def _arithmetic() -> list[Finding]:
    """Find the number formats that this processor multiplies in hardware, and the choice for it."""
    try:
        from modelops.base.processor import this_processor

        processor = this_processor()
        ratio = _bfloat16_speed()
    except (ImportError, OSError):
        return []  # said above
    faster = ratio > 1.0
    bfloat16 = (
        f"matrix products run {ratio:.1f} times as fast as in fp32"
        if faster
        else f"emulated here: {1 / ratio:.0f} times slower than fp32"
    )
    trains = "training.precision auto takes " + ("bf16" if faster else "fp32")
    int8 = (
        "no VNNI: sums of 8-bit weights saturate in OpenVINO, those of 7-bit weights are exact; an "
        "export that is not faster than fp32 is refused"
        if processor.sums_saturate
        else "sums are exact in every runtime"
    )
    return [
        Finding("machine", "instructions", "ok", processor.kind),
        Finding("machine", "bf16", "ok" if faster else "missing", f"{bfloat16}; {trains} on a CPU"),
        Finding("machine", "int8", "warning" if processor.sums_saturate else "ok", int8),
    ]


def _bfloat16_speed() -> float:
    """Measure the speed of a matrix product in bf16 relative to fp32: the best of nine runs each,
    in turns.
    """
    import time

    import torch

    matrices = {
        dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(matrices, float("inf"))
    for _ in range(9):
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def _runtimes() -> list[Finding]:
    found = []
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        found.append(
            Finding(
                "runtime", "onnxruntime", "ok", f"{onnxruntime.__version__}: {', '.join(providers)}"
            )
        )
    except (ImportError, OSError) as error:
        found.append(
            Finding("runtime", "onnxruntime", "problem", str(error), "pip install onnxruntime")
        )
        providers = []
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) == 2:
        hidden = "CUDAExecutionProvider" not in providers
        found.append(
            Finding(
                "runtime", "onnxruntime + onnxruntime-gpu", "problem" if hidden else "warning",
                "both are installed and write the same module"
                + ("; the CUDA provider is hidden" if hidden else ""),
                "pip install --force-reinstall --no-deps onnxruntime-gpu",
            )
        )  # fmt: skip
    for module, purpose in (("openvino", "INT8 on CPUs"), ("tensorrt", "engines on NVIDIA GPUs")):
        version = _version(module)
        found.append(
            Finding("runtime", module, "ok", version)
            if version
            else Finding("runtime", module, "missing", f"for {purpose}", _pip(module))
        )
    return found


def _extras() -> list[Finding]:
    return [
        Finding("extra", module, "ok", f"extra {extra}")
        if has_module(module)
        else Finding("extra", module, "missing", f"extra {extra}", _pip(module))
        for module, extra in EXTRA_OF_MODULE.items()
        if module not in ("openvino", "tensorrt")
    ]


def _weights() -> list[Finding]:
    from modelops.base.errors import ModelopsError
    from modelops.models.encoders import (
        LITE0_SHA256,
        MINILM_SHA256,
        lite0_weights_path,
        minilm_directory,
        verify_weights,
    )

    found = []
    for name, locate, digest in (
        ("efficientnet-lite0", lite0_weights_path, LITE0_SHA256),
        ("all-MiniLM-L6-v2", lambda: minilm_directory() / "model.safetensors", MINILM_SHA256),
    ):
        try:
            verify_weights(locate(), digest)
            found.append(Finding("weights", name, "ok", f"sha256 {digest[:12]} as pinned"))
        except ModelopsError as error:
            missing = type(error).__name__ == "MissingExtraError"
            state: State = "missing" if missing else "problem"
            found.append(Finding("weights", name, state, error.message, error.hint or ""))
    return found


def _caches() -> list[Finding]:
    places = {
        "huggingface": Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser(),
        "bentoml": Path(os.environ.get("BENTOML_HOME", "~/bentoml")).expanduser(),
    }
    return [
        Finding("cache", name, "ok", "there" if path.is_dir() else "not made yet")
        for name, path in places.items()
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _pip(module: str) -> str:
    return f'pip install "modelops[{EXTRA_OF_MODULE[module]}]"'
