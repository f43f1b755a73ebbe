"""Plan and clock of a run: made before the first step, corrected after each, judged at the end."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from modelops.base.files import temporary_name

from .grids import prompts_to_images
from .plan import VALIDATION_SHARE
from .precision import Trial
from .run import Run

FORWARD = 1 / 3  # of the time of forward and backward, for a first guess
REHEARSAL_SHARE = 0.02  # of a time limit: a grid that is dearer to try is guessed
FEW_STEPS = 12  # fewer tell nothing about the trend of the loss
DECAYED = 0.1  # of the peak learning rate: a run that ends above it is told so
LATE = 1.1  # times the time limit: a run that ends after it is told so


def first_plan(run: Run, trials: dict[str, Trial]) -> None:
    """Measure the work of a run beside its steps, then decide its number of steps.

    This includes the losses before the first step, unless they would take a tenth of a limit.
    """
    parts, clock, limit = run.parts, run.clock, run.clock.limit
    total = 0
    _guess_costs(run, trials)
    if parts.is_main:
        if limit is None or clock.costs["validation"] <= VALIDATION_SHARE * limit:
            run.validate()
        if limit is not None:
            _rehearse(run, limit)
        total = clock.total_steps(0, None)
    total = parts.from_main(total)
    run.take_plan(total)
    if limit is not None and total < parts.config.training.total_steps:
        parts.say(f"{total} steps fit into {limit:g} s, {clock.costs['step']:.2g} s each")


def correct_plan(run: Run) -> None:
    """Correct the plan of a run with a time limit after a step, which may become the last."""
    parts, clock, progress = run.parts, run.clock, run.progress
    if clock.limit is None:
        return
    if parts.early is not None:
        per_image = clock.costs["step"] / progress.effective_batch
        clock.reserve = parts.early.reserve(clock.limit, per_image)
    total = parts.from_main(clock.total_steps(progress.step, run.rhythm) if parts.is_main else 0)
    if total != progress.total_steps:
        parts.say(f"plan: {progress.total_steps} -> {total} steps")
        run.take_plan(total)


def judge_time(run: Run, factor: float) -> None:
    """Say how a run ended; `factor` is the last one of its learning rate."""
    training, progress, limit = run.parts.config.training, run.progress, run.clock.limit
    run.stop_reason = "all planned steps are done"
    if limit is None:
        return
    if progress.total_steps < training.total_steps:
        run.stop_reason = f"the steps that fit into {limit:g} s are done"
        if progress.step < FEW_STEPS:
            made = f"{progress.step} steps" if progress.step > 1 else "one step"
            run.remark(
                f"only {made} made: a step takes {run.clock.costs['step']:.2g} s here "
                f"and the time limit is {limit:g} s"
            )
        if training.lr_schedule != "constant" and factor > DECAYED:
            run.remark(
                f"the last step was made at {factor:.0%} of the learning rate: "
                "too few steps, or too late a stop, to decay to 0"
            )
    if run.clock.seconds > LATE * limit:
        run.remark(f"took {run.clock.seconds:.0f} s of a time limit of {limit:g} s")


def _guess_costs(run: Run, trials: dict[str, Trial]) -> None:
    parts, costs = run.parts, run.clock.costs
    training = parts.config.training
    taken = trials[run.progress.precision].seconds
    fp32 = trials.get("fp32", Trial(taken)).seconds
    image, image_fp32 = (
        seconds / parts.per_rank for seconds in (taken, fp32 if math.isfinite(fp32) else taken)
    )
    costs["step"] = taken
    costs["validation"] = FORWARD * image * sum(map(len, parts.fixed_batches.values()))
    passes = 2 * training.sample_steps * len(parts.material.prompts)  # guided
    costs["grid"] = FORWARD * image_fp32 * passes
    if parts.early is not None and training.early_check_every_steps:
        costs["early_check"] = parts.early.expected(image)


def _rehearse(run: Run, limit: float) -> None:
    """Measure a grid of few sampler steps and a checkpoint; neither is kept."""
    parts, clock = run.parts, run.clock
    steps = parts.config.training.sample_steps
    tried = min(2, steps)
    if clock.costs["grid"] * (tried + 1) / steps <= REHEARSAL_SHARE * limit:
        for count in (1, tried):  # the first call also sets up
            began = time.monotonic()
            prompts_to_images(
                parts.pipeline,
                parts.material.prompts,
                parts.config.training.seed,
                steps=count,
            )
        clock.costs["grid"] = (time.monotonic() - began) * steps / tried
    parts.checkpoints.mkdir(exist_ok=True)
    prefix, suffix = temporary_name("rehearsal")
    with (
        clock.work("checkpoint"),
        tempfile.TemporaryDirectory(dir=parts.checkpoints, prefix=prefix, suffix=suffix) as folder,
    ):
        run.save_to(Path(folder), replace(run.progress))
