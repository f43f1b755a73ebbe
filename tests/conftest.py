"""Fixtures shared by every area: real pictures and a small real checkpoint."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores, not threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MODELOPS_CACHE"] = tempfile.mkdtemp(prefix="modelops-cache-")  # nobody's own

import pytest


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["MODELOPS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: a small random UNet at 32x32 around the real MiniLM. Read only."""
    import torch

    from modelops.models.checkpoints import save_pipeline
    from modelops.models.encoders import load_text_encoder
    from modelops.models.networks import make_pipeline, make_unet

    torch.manual_seed(0)
    unet = make_unet(
        resolution=32, patch_size=2, channels=32, multipliers=(1, 2), attention_levels=(1,)
    )
    tokenizer, text_encoder = load_text_encoder()
    pipeline = make_pipeline(unet, tokenizer, text_encoder, patch_size=2, default_steps=4)
    directory = tmp_path_factory.mktemp("checkpoint") / "step-0"
    directory.mkdir()
    save_pipeline(pipeline, directory)
    return directory


@pytest.fixture(scope="session")
def onnx_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 artifact of the tiny checkpoint. Read only."""
    from modelops.export.onnx.export import export_onnx

    out = tmp_path_factory.mktemp("artifacts") / "onnx"
    export_onnx(tiny_checkpoint, out)
    return out


class _Stack(ctypes.Structure):
    _fields_ = (
        ("ss_sp", ctypes.c_void_p),
        ("ss_flags", ctypes.c_int),
        ("ss_size", ctypes.c_size_t),
    )


@pytest.fixture(autouse=True)
def signals_on_the_normal_stack() -> None:
    """In a long test process the alternate signal stack that pytest's faulthandler registers does
    not stay usable (seen as a SIGSEGV when SIGCHLD or SIGTERM arrives): do without it."""
    if sys.platform == "linux":
        disabled = _Stack(None, 2, 0)  # SS_DISABLE
        ctypes.CDLL(None).sigaltstack(ctypes.byref(disabled), None)
