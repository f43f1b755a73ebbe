"""Worker processes of a node behind one port: their number, this worker, and its own resources.

Every worker has its own engine, filters, queue and device. BentoML starts them, and restarts a dead
one (it checks every 10 seconds). What they share is in a run directory that only their user can
read: a socket of each (`peers`) and the rates of limited keys (`limits`).

All share one listening socket. The kernel gives a connection to the worker that accepts it first,
and a client that keeps its connection keeps its worker. So a full worker may answer 429 while
another one is idle.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.private import PrivateFolder
from modelops.serving.settings import MAX_WORKERS, NodeSettings

RUN_VARIABLE = "MODELOPS_RUN_DIRECTORY"
_PREFIX = "modelops-run-"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_MAX_PATH = 103  # bytes of a Unix socket's path, with some to spare
_held: list[PrivateFolder] = []  # run directories, until this process ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Worker of a node.

    Attributes:
        index: 1 to `count`; a restarted worker has its predecessor's.
        count: workers of the node.
        directory: their run directory; None for a node of one.
    """

    index: int = 1
    count: int = 1
    directory: Path | None = None

    def threads(self, wanted: int, cores: int) -> int | None:
        """Return the CPU threads of its model: `wanted` if not 0, else its share of the cores.

        None, for a single worker, means all cores, as each runtime counts them.
        """
        if wanted or self.count == 1:
            return wanted or None
        return max(1, cores // self.count)

    def cuda_number(self, device: str, visible: int) -> int:
        """Return the number of its CUDA device: K of "cuda:K", else its own of the `visible` ones.

        Raises:
            UsageError: there is no such device.
        """
        named = re.fullmatch(r"cuda:(\d+)", device)
        if named is None:
            return (self.index - 1) % max(visible, 1)
        if int(named[1]) >= max(visible, 1):
            raise UsageError(
                f"device {device!r}: {visible} CUDA devices are visible",
                hint="use cuda, which gives each worker one, or cpu",
            )
        return int(named[1])

    def torch_device(self, device: str, visible: int) -> str:
        """Return a checkpoint's device, from "cpu", "cuda", "cuda:K", "auto" or torch's others.

        Raises:
            UsageError: CUDA was asked for and there is no such device.
        """
        if device == "auto":
            device = "cuda" if visible else "cpu"
        if device.split(":")[0] != "cuda":
            return device
        if not visible:
            raise UsageError(
                f"device {device!r}: no CUDA device is visible", hint="see `modelops doctor`"
            )
        return f"cuda:{self.cuda_number(device, visible)}"


def this_worker(number: int | None, settings: NodeSettings) -> Worker:
    """Return the worker that this process is.

    Args:
        number: BentoML's, from 1 on; it goes beyond the count when workers are replaced by new ones
            before they end (SIGHUP).

    Raises:
        ModelopsError: there are several workers, and their run directory is missing.
    """
    count = settings.workers
    if count == 1:
        return Worker()
    directory = settings.shared_directory
    if directory is None or not directory.is_dir():
        raise ModelopsError(
            f"MODELOPS_RUN_DIRECTORY={directory}: {count} workers have no directory in common",
            hint="start them with `modelops serve` or `bentoml serve`",
        )
    with contextlib.suppress(OSError):
        _held.append(PrivateFolder(directory))
    return Worker(index=((number or 1) - 1) % count + 1, count=count, directory=directory)


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends (Linux only). Otherwise the
    workers of a killed BentoML would hold its port."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def prepare_workers(
    settings: NodeSettings, environment: MutableMapping[str, str] = os.environ
) -> Path | None:
    """Make the run directory of several workers, and their environment.

    Runs in the process that starts the workers, before they start. The directory (mode 0700) is
    removed when that process ends; if it was killed, the next start removes it.

    Returns:
        The run directory, or None for a node of one worker.

    Raises:
        ModelopsError: the directory cannot be made.
    """
    count = settings.workers
    environment.pop(RUN_VARIABLE, None)
    if count == 1:
        return None
    folder = PrivateFolder.make(_PREFIX)
    _held.append(folder)
    directory = folder.path
    atexit.register(_remove, directory, os.getpid())
    if len(os.fsencode(directory / f"{MAX_WORKERS}.sock")) > _MAX_PATH:
        raise UsageError(f"{directory}: too long for a socket", hint="set TMPDIR to a shorter path")
    environment[RUN_VARIABLE] = str(directory)
    # Before a worker imports anything that counts the cores.
    from modelops.export.graphs.graph import process_cores

    share = max(1, process_cores() // count)
    environment.setdefault("OMP_NUM_THREADS", str(share))
    # In a container BentoML counts on the container's restart and starts no dead worker again; of
    # several workers the others would go on without it for ever.
    environment.pop("BENTOML_CONTAINERIZED", None)
    return directory


@contextlib.contextmanager
def one_at_a_time(worker: Worker, name: str) -> Any:
    """Let only one worker of a node into this block at a time."""
    if worker.directory is None:
        yield
        return
    handle = os.open(
        worker.directory / f"{name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class WorkerField(logging.Filter):
    """Log filter that adds the worker's number to the fields of records."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the number; return True always, so that no record is dropped."""
        if self._worker.count > 1:
            record.fields = {**getattr(record, "fields", {}), "worker": self._worker.index}
        return True


def _remove(directory: Path, process: int) -> None:
    if os.getpid() == process:  # a fork of it has the same list of what to do at its end
        shutil.rmtree(directory, ignore_errors=True)
