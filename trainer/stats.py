"""stats.jsonl, TensorBoard and Weights & Biases: one row of numbers, written to each."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.errors import ModelopsError
from modelops.base.extras import has_module
from modelops.base.files import write_text
from modelops.records.train import read_stats
from modelops.training.config import LoggingSection


class StatsWriter:
    """Appends rows to stats.jsonl and passes them on.

    Args:
        run_dir: the run's directory.
        step: rows after this step are removed first; they belong to work that was lost.
        section: which trackers to use.
        run_name, config: what Weights & Biases shows.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        step: int,
        section: LoggingSection,
        run_name: str,
        config: dict[str, Any],
    ) -> None:
        self.path = run_dir / "stats.jsonl"
        kept = [row for row in read_stats(self.path) if row["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("ab", buffering=0)
        self._board: Any = None
        self._wandb: Any = None
        if section.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=step + 1 if step else None
            )
        if section.wandb_project:
            self._wandb = _start_wandb(section.wandb_project, run_name, run_dir, config)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it has a `step` and numbers.

        Raises:
            ModelopsError: the disk is full.
        """
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise ModelopsError(
                f"{self.path}: cannot write: {error.strerror or error}", hint="check free space"
            ) from error
        numbers = {name: value for name, value in row.items() if name != "step"}
        for name, value in numbers.items():
            self._track("_board", "add_scalar", name, value, row["step"])
        self._track("_wandb", "log", numbers, step=row["step"])

    def picture(self, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """Show an image [H, W, 3] uint8 in TensorBoard."""
        self._track("_board", "add_image", name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._track("_board", "close")
        self._track("_wandb", "finish")

    def _track(self, tracker: str, method: str, *values: Any, **named: Any) -> None:
        """Call a tracker that is in use; one that fails is left off from then on."""
        if (found := getattr(self, tracker)) is None:
            return
        try:
            getattr(found, method)(*values, **named)
        except Exception as error:  # a tracker must not stop a run
            setattr(self, tracker, None)
            warn(f"{type(found).__name__} is left off from now on: {error}")


def memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the device, or resident memory of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def _start_wandb(project: str, run_name: str, run_dir: Path, config: dict[str, Any]) -> Any:
    """Start a Weights & Biases run; else return None and give the reason in one line."""
    if not has_module("wandb"):
        warn(
            f"wandb_project {project!r} is set but wandb is not installed: "
            'logging without it (pip install "modelops[wandb]")'
        )
        return None
    try:
        import wandb

        return wandb.init(
            project=project, name=run_name, id=run_name, resume="allow", dir=str(run_dir),
            config=config, mode=os.environ.get("WANDB_MODE") or "online",
        )  # fmt: skip
    except Exception as error:  # a tracker must not stop a run
        warn(
            f"Weights & Biases is not used: {str(error).splitlines()[0] if str(error) else error!r}"
        )
        return None


def warn(text: str) -> None:
    """One line for a person, on stderr."""
    _print(f"warning: {text}", sys.stderr)


def event(name: str, **values: Any) -> None:
    """One line of JSON on stdout, for the process that launched this one."""
    _print(json.dumps({"event": name, **values}), sys.stdout)


def _print(line: str, stream: TextIO) -> None:
    """Print; if the launching process is gone, end the run as a SIGTERM would."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        os.kill(os.getpid(), signal.SIGTERM)
