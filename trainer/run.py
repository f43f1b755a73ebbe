"""A run under way: its parts, its progress, and the work that is done between steps."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from modelops.records.train import read_stats

from .checkpoint import Progress, save_checkpoint
from .clock import Clock
from .early import new_overfitting, say_copies, say_overfitting
from .grids import prompts_to_grid, save_png, validation_loss
from .parts import Parts, identity
from .plan import early_step, replanned
from .stats import event, memory_gb, warn
from .stepper import Stepper


class Run:
    """Run in progress.

    Attributes:
        parts: the parts that stay the same.
        progress: the state that a checkpoint keeps.
        clock: seconds of each kind of work.
        rhythm: the steps that something is done after.
        stepper: forward, backward and update in the chosen precision.
        rate: images per second over the steps since the last row of stats.jsonl.
        stop_reason: reason why the loop ended.
    """

    stepper: Stepper

    def __init__(self, parts: Parts, progress: Progress, *, started: float) -> None:
        self.parts, self.progress = parts, progress
        progress.setup_seconds += time.monotonic() - started
        self.clock = Clock(parts.config, before=progress.training_seconds, costs=progress.costs)
        self.rhythm = self.clock.rhythm(progress.total_steps, progress.early_step)
        self.rate: float | None = None
        self.stop_reason = ""
        self._copies_said = False

    def take_plan(self, total: int) -> None:
        """Take a plan of this many steps in all."""
        progress, config = self.progress, self.parts.config
        progress.plan = replanned(progress.plan, progress.step, total, config)
        progress.early_step = early_step(
            config, total, step=progress.step, before=progress.early_step
        )
        self.rhythm = self.clock.rhythm(total, progress.early_step)

    def remark(self, line: str) -> None:
        """Warn a person, now and in the record."""
        self.progress.warnings.append(line)
        if self.parts.is_main:
            warn(line)

    def validate(self) -> None:
        """Write losses of the averaged weights on the fixed batches as a row of stats.jsonl."""
        parts = self.parts
        if not parts.is_main:
            return
        row: dict[str, Any] = {"step": self.progress.step}
        with self.clock.work("validation"), self.stepper.autocast():
            for name, batch in parts.fixed_batches.items():
                value = validation_loss(parts.ema.network, batch, parts.config, parts.device)
                if math.isfinite(value):
                    row[name] = value
        if parts.stats is not None:
            parts.stats.write(row)
            if found := new_overfitting(read_stats(parts.stats.path)):
                say_overfitting(self.progress.step, found)

    def check_early(self, *, validated: bool) -> None:
        """Compare a few samples with their nearest training images; no step depends on it."""
        progress, early, stats = self.progress, self.parts.early, self.parts.stats
        if early is None or stats is None:
            return
        seconds, images = progress.training_seconds, progress.images_seen
        if early.due(progress.step, validated=validated, training_seconds=seconds, images=images):
            with self.clock.work("early_check"):
                row, verdict = early.measure()
            if row:
                stats.write({"step": progress.step, **row})
            if verdict and verdict.answer == "copies" and not self._copies_said:
                self._copies_said = True
                say_copies(progress.step, verdict)

    def sample(self) -> None:
        """Draw the grid of prompts."""
        parts, step = self.parts, self.progress.step
        if parts.is_main and parts.stats is not None:
            with self.clock.work("grid"):
                grid = prompts_to_grid(
                    parts.pipeline, parts.material.prompts, parts.config.training.seed
                )
                save_png(grid, parts.run_dir / "grids" / f"step-{step}.png")
                parts.stats.picture("samples", grid, step)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        if self.parts.is_main:
            with self.clock.work("checkpoint"):
                path = self.save_to(self.parts.checkpoints, self.progress)
            event("checkpoint", step=self.progress.step, path=f"checkpoints/{path.name}")

    def save_to(self, directory: Path, progress: Progress) -> Path:
        """Write a checkpoint below a directory; returns its path."""
        parts, scaler = self.parts, self.stepper.scaler
        return save_checkpoint(
            directory,
            progress,
            pipeline=parts.pipeline,
            network=parts.network,
            optimizer=parts.optimizer,
            scaler=None if scaler is None else scaler.state_dict(),
            identity=identity(parts.spec, parts.material),
            keep=parts.config.training.keep_checkpoints,
        )

    def write_row(self, **numbers: float | None) -> None:
        """Write a row of stats.jsonl; numbers that are None are left out."""
        if self.parts.stats is not None:
            row = {
                "step": self.progress.step,
                "images_seen": self.progress.images_seen,
                **{name: value for name, value in numbers.items() if value is not None},
                "images_per_second": round(self.rate or 0.0, 2),
                "memory_gb": round(memory_gb(self.parts.device), 3),
                "elapsed_s": round(self.progress.training_seconds, 2),
            }
            self.parts.stats.write(row)
