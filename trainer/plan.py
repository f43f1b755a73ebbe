"""The plan of a run: its steps, their learning rate, what happens between them, and the seconds
that all this takes. Functions of counters and measured seconds alone; `clock.py` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelops.training.config import TrainConfig, TrainingSection

AIM = 0.98  # share of a time limit that a plan fills
ENOUGH = 0.95  # of it: a plan that fills less is made anew
AT_MOST = 1.05  # of it: with long steps, the last one may begin when half of it still fits
ROWS = 40  # lines of stats.jsonl, if there are so many steps; a plan that is halved keeps 20
# Shares of a time limit that nobody asked for in the config and that are therefore saved first.
VALIDATION_SHARE = 0.1
GRID_SHARE = 0.1

Costs = Mapping[str, float]  # seconds of one step, validation, grid, checkpoint, early_check


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps of a run and the shape of its learning rate.

    The rate is a function of a phase that reaches 1 with the last step, linearly in the steps since
    an anchor. A correction while the rate decays moves the anchor to the current step: the rate
    continues from its value and still ends near 0.

    Attributes:
        total: steps of the whole run.
        warmup: the first steps, over which the rate grows.
        anchor_step, anchor_phase: where the phase began to be linear, and its value there.
    """

    total: int
    warmup: int
    anchor_step: int = 0
    anchor_phase: float = 0.0

    def phase(self, step: int) -> float:
        """Phase at `step`, in [0, 1]."""
        done = (step - self.anchor_step) / max(1, self.total - self.anchor_step)
        return self.anchor_phase + (1 - self.anchor_phase) * done


def new_plan(total: int, config: TrainConfig) -> Plan:
    """The plan of a run of `total` steps from its first step on."""
    warmup = config.warmup(total)
    return Plan(total, warmup, warmup if config.training.lr_schedule == "cosine" else 0)


def replanned(plan: Plan, step: int, total: int, config: TrainConfig) -> Plan:
    """The plan with another total, as seen after `step` steps; the learning rate does not jump.

    linear_decay keeps its share of the whole run as long as it has not begun under either total.
    """
    if step < max(1, plan.warmup):
        return new_plan(total, config)
    phase = plan.phase(step)
    if config.training.lr_schedule == "linear_decay":
        constant = 1 - config.training.lr_decay_fraction
        if max(phase, step / total) <= constant:
            return replace(plan, total=total, anchor_step=0, anchor_phase=0.0)
        phase = max(phase, constant)
    return replace(plan, total=total, anchor_step=step, anchor_phase=phase)


def lr_factor(step: int, plan: Plan, section: TrainingSection) -> float:
    """Learning rate of step `step` (from 0), as a fraction of the peak, in (0, 1]."""
    if step < plan.warmup:
        return (step + 1) / (plan.warmup + 1)
    phase = plan.phase(step)
    if section.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * phase))
    if section.lr_schedule == "linear_decay":
        return min(1.0, (1 - phase) / section.lr_decay_fraction)
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """Rhythm of a run: steps after which it writes, measures, draws or saves; always the last.

    Attributes:
        total: steps planned.
        rows, validations, checkpoints, early_checks: steps between two of them; 0 for none.
        grids: steps between two; 0 for those of checkpoints, None for none at all.
        early_step: step of the early checkpoint; 0 for none.
    """

    total: int
    rows: int
    validations: int
    checkpoints: int
    grids: int | None
    early_step: int
    early_checks: int

    def writes(self, step: int) -> bool:
        """True where a line of stats.jsonl is due."""
        return step % self.rows == 0 or step >= self.total

    def validates(self, step: int) -> bool:
        """True where the losses of fixed batches are due."""
        return step % self.validations == 0 or step >= self.total

    def saves(self, step: int) -> bool:
        """True where a checkpoint is due."""
        return step in (self.early_step, self.total) or step % self.checkpoints == 0

    def draws(self, step: int) -> bool:
        """True where a grid of samples is due."""
        if self.grids == 0:
            return self.saves(step)
        return self.grids is not None and (step % self.grids == 0 or step >= self.total)

    def counts(self, step: int) -> dict[str, int]:
        """Count how often each kind of work is due after `step`, up to the last step."""
        total = self.total

        def times(every: int) -> int:
            return total // every - step // every + (total % every != 0) if step < total else 0

        saves = times(self.checkpoints)
        saves += step < self.early_step < total and self.early_step % self.checkpoints != 0
        early = self.early_checks
        return {
            "step": max(0, total - step),
            "validation": times(self.validations),
            "checkpoint": saves,
            "grid": 0 if self.grids is None else times(self.grids) if self.grids else saves,
            "early_check": total // early - step // early if early else 0,
        }


def make_rhythm(
    config: TrainConfig, total: int, *, early_step: int, costs: Costs, limit: float | None
) -> Rhythm:
    """Make the rhythm that the config asks for in a run of `total` steps.

    With a time limit, intervals that the config leaves open follow from the measured costs:
    validations take at most a tenth of the time of the steps, and grids a tenth of the limit.
    """
    training = config.training
    validations = training.validate_every_steps or max(1, total // 20)
    if limit is not None and training.validate_every_steps is None and costs.get("step"):
        dear = costs.get("validation", 0.0) / (VALIDATION_SHARE * costs["step"])
        validations = max(validations, math.ceil(dear))
    rhythm = Rhythm(
        total=total,
        rows=max(1, min(config.logging.log_every_steps, total // ROWS)),
        validations=validations,
        checkpoints=training.save_every_steps,
        grids=training.sample_every_steps or 0,
        early_step=early_step,
        early_checks=training.early_check_every_steps or 0,
    )
    grid = costs.get("grid", 0.0)
    if limit is not None and training.sample_every_steps is None:
        if grid > GRID_SHARE * limit:
            return replace(rhythm, grids=None)
        if grid * rhythm.counts(0)["grid"] > GRID_SHARE * limit:
            return replace(rhythm, grids=total)
    return rhythm


def early_step(config: TrainConfig, total: int, *, step: int = 0, before: int = 0) -> int:
    """The step whose checkpoint is kept for comparison, 0 for none.

    Args:
        step: steps done.
        before: the early step of the plan so far; one that is behind us stays.
    """
    share = config.training.early_checkpoint
    if not share or 0 < before <= step:
        return before
    return max(round(total * share), min(step + 1, total))


def seconds_left(rhythm: Rhythm, step: int, costs: Costs) -> float:
    """Expected seconds from after `step` to the end of the last checkpoint."""
    return sum(count * costs.get(kind, 0.0) for kind, count in rhythm.counts(step).items())


def steps_in_time(
    config: TrainConfig, step: int, *, seconds: float, costs: Costs, limit: float, early: int = 0
) -> int:
    """Total steps of a run that is at `step` and has `seconds` left of its time limit.

    Args:
        early: the early step of the plan so far, or 0.
    """
    room = seconds - (1 - AIM) * limit
    room = min(room + costs.get("step", 0.0) / 2, seconds + (AT_MOST - 1) * limit)

    def fits(total: int) -> bool:
        kept = early_step(config, total, step=step, before=early)
        rhythm = make_rhythm(config, total, early_step=kept, costs=costs, limit=limit)
        return seconds_left(rhythm, step, costs) <= room

    low, high = max(step, 1), max(step, config.training.total_steps)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
