"""Between set-up and the first step: a precision, and a microbatch that fits into memory."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from modelops.base.errors import TrainingError

from .memory import smaller_microbatch
from .precision import StepsOnACopy, Trial, candidates, choose, measure
from .run import Run


def fit(run: Run) -> dict[str, Trial]:
    """Find a precision and a microbatch that fits into memory; return the measurements.

    A run that was resumed keeps its precision. All ranks take the same, by the slowest of them.

    Raises:
        TrainingError: this machine cannot train in the config's precision, or not at all.
    """
    parts, progress = run.parts, run.progress
    training = parts.config.training
    asked = progress.precision or training.precision.replace("no", "fp32")
    names = candidates(asked, parts.device)
    if progress.precision:
        names = [asked]
    batch = parts.part_of_step(0)
    parts.say(f"measuring steps in {' and '.join(names)}")
    while True:
        steps = StepsOnACopy(parts.network, batch, parts.config, parts.device)
        trials = measure(
            steps,
            names,
            asked=asked,
            microbatch=progress.microbatch,
            per_step=parts.per_rank,
            limit=training.time_limit_seconds,
            whole=parts.device.type != "cpu",  # whose first step finds out as well
        )
        everywhere = zip(*parts.gather([trial.seconds for trial in trials.values()]), strict=True)
        for name, seconds in zip(names, everywhere, strict=True):
            trials[name] = replace(trials[name], seconds=max(seconds))
        possible = [name for name in names if math.isfinite(trials[name].seconds)]
        if possible and asked in ("auto", *possible):
            break
        halve_microbatch(run)
    del steps
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()
    if not progress.precision:
        choice = choose(asked, trials)
        progress.precision, progress.precision_reason = choice.precision, choice.reason
        progress.precision_rates = {
            name: round(progress.effective_batch / trials[name].seconds, 2)
            if name in possible
            else None
            for name in names
        }
        parts.say(f"precision {choice.precision}: {choice.reason}")
        if choice.warning:
            run.remark(choice.warning)
    return trials


def halve_microbatch(run: Run) -> None:
    """Take a smaller microbatch after running out of memory; the effective batch stays.

    Raises:
        TrainingError: it is 1 already.
    """
    progress = run.progress
    smaller = smaller_microbatch(progress.microbatch, run.parts.per_rank)
    if smaller is None:
        raise TrainingError(
            "out of memory with a microbatch of 1",
            hint="lower model.resolution or model.channels, or set training.precision: auto",
        )
    line = (
        f"out of memory: microbatch {progress.microbatch} -> {smaller}, "
        f"accumulation {run.parts.per_rank // smaller}; the effective batch stays the same"
    )
    run.remark(f"step {progress.step}: {line}")
    progress.microbatch = smaller
    if run.parts.device.type == "cuda":
        torch.cuda.empty_cache()
