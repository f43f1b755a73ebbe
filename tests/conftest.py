"""What every area shares: options of a run, a small real checkpoint and its artifact."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from browsers import chromium
from once import made_once

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores, not threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MODELOPS_CACHE"] = tempfile.mkdtemp(prefix="modelops-cache-")  # nobody's own

# glibc gives large freed blocks back to the kernel at once, and a network on a CPU asks for them
# again with its next layer: half of Lite0's time is page faults. Here they are kept.
_KEPT = 1 << 30
if sys.platform == "linux":
    for _variable in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(_variable, str(_KEPT))  # of processes that this one starts
    with contextlib.suppress(AttributeError):  # another C library
        for _option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(_option, _KEPT)

NOT_STARTED = "not started: --no-new-test-after had passed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-new-test-after", type=float, metavar="UNIX_SECONDS",
        help="Time after which no test is started; the tests left out are named at the end",
    )  # fmt: skip
    parser.addoption("--demo", metavar="DIR", help="A smoke demo, for the commands of the guides")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test, before any of its fixtures, that would start too late."""
    limit = item.config.getoption("--no-new-test-after")
    if limit is not None and time.time() > limit:
        pytest.skip(NOT_STARTED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    left = sorted(report.nodeid for report in skipped if NOT_STARTED in str(report.longrepr))
    if left:
        limit = terminalreporter.config.getoption("--no-new-test-after")
        clock = datetime.fromtimestamp(limit, UTC).strftime("%H:%M:%S UTC")
        terminalreporter.section(f"{len(left)} tests were not started: it was after {clock}")
        for name in left:
            terminalreporter.write_line(name)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["MODELOPS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: a small random UNet at 32x32, a small random text encoder with the
    tokenizer of the real one. Read only."""

    def make(folder: Path) -> None:
        import torch
        from transformers import BertConfig, BertModel

        from modelops.models.checkpoints import save_pipeline
        from modelops.models.encoders import load_text_encoder
        from modelops.models.networks import make_pipeline, make_unet

        torch.manual_seed(0)
        unet = make_unet(
            resolution=32, patch_size=2, channels=32, multipliers=(1, 2), attention_levels=(1,),
            layers_per_block=1, text_dim=64,
        )  # fmt: skip
        tokenizer, _ = load_text_encoder()
        sizes = BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=128,
        )  # fmt: skip
        text_encoder = BertModel(sizes).eval()
        pipeline = make_pipeline(unet, tokenizer, text_encoder, patch_size=2, default_steps=4)
        (folder / "step-0").mkdir()
        save_pipeline(pipeline, folder / "step-0")

    return made_once(tmp_path_factory, "checkpoint", make) / "step-0"


@pytest.fixture(scope="session")
def onnx_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 artifact of the tiny checkpoint. Read only."""

    def make(folder: Path) -> None:
        from modelops.export.to_onnx import export_onnx

        export_onnx(tiny_checkpoint, folder / "onnx")

    return made_once(tmp_path_factory, "artifact", make) / "onnx"


@pytest.fixture(scope="session")
def int8_artifact(
    onnx_artifact: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The INT8 artifact of the tiny checkpoint. Read only."""

    def make(folder: Path) -> None:
        from modelops.export.to_int8 import Int8Options, export_int8

        export_int8(
            onnx_artifact, tiny_checkpoint, folder / "int8",
            prompts=["red heart", "dog", "house", "bicycle"],
            options=Int8Options(steps=6, rows=32, speed_rounds=3, search_seconds=3),
            allow=True,  # a network this small is not faster in INT8 for sure
        )  # fmt: skip

    return made_once(tmp_path_factory, "int8_artifact", make) / "int8"


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
