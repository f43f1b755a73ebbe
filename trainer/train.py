"""Training run, from top to bottom.

`train` reads a frozen config.json, sets everything up, runs the loop and writes train.json in any
case. Progress is counted in optimizer steps and images. The data of a step is a function of the
seed and the step (see batches.py), so a killed run continues as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from modelops.base.errors import InUseError, ModelopsError, TrainingError
from modelops.base.files import remove_leftovers
from modelops.training.launch import read_run_spec

from .batches import Batch
from .fit import fit, halve_microbatch
from .memory import is_out_of_memory
from .parts import set_up
from .plan import lr_factor, new_plan
from .planning import correct_plan, first_plan, judge_time
from .process import Interrupted, Signals, run_lock
from .record import write_record
from .run import Run
from .stats import event
from .stepper import Stepper

SKIPPED_IN_A_ROW = 20  # fp16 steps that loss scaling may leave out before the run is given up


def train(config_path: Path, *, resume: bool) -> int:
    """Run or go on with the run whose config.json this is; returns the exit code.

    Raises:
        ModelopsError: the run cannot start or go on; train.json says `failed` and why.
    """
    spec, run_dir = read_run_spec(config_path), config_path.parent
    started_at, started = datetime.now(UTC), time.monotonic()
    is_main = int(os.environ.get("RANK", "0")) == 0
    signals, run = Signals(), None

    def finish(status: Any, error: str | None = None) -> None:
        if is_main:
            seconds = time.monotonic() - started
            write_record(spec, run_dir, run, status, error, started_at=started_at, seconds=seconds)

    def say(text: str) -> None:
        if is_main:
            event("note", text=text)

    try:
        with signals.caught(say), contextlib.ExitStack() as stack:
            if is_main:
                stack.enter_context(run_lock(run_dir))
                remove_leftovers(run_dir)
            parts, progress, scaler = set_up(spec, run_dir, resume=resume)
            run = Run(parts, progress, started=started)
            fit_and_plan(run, scaler)
            loop(run, signals)
        finish("ok")
    except Interrupted as stop:
        step = run.progress.step if run else 0
        finish("failed", f"interrupted by {stop} at step {step}")
        return 128 + stop.signum
    except InUseError:
        raise
    except BaseException as error:
        message = error.message if isinstance(error, ModelopsError) else repr(error)
        with contextlib.suppress(ModelopsError):  # the first error is the one to report
            finish("failed", message)
        raise
    finally:
        if run is not None:
            if run.parts.stats is not None:
                run.parts.stats.close()
            run.parts.accelerator.end_training()
    return 0


def fit_and_plan(run: Run, scaler: dict[str, Any] | None) -> None:
    """Find the microbatch, the precision and, for a new run, the number of steps."""
    parts, progress, config = run.parts, run.progress, run.parts.config
    trials = fit(run)
    compiles = config.training.compile
    run.stepper = Stepper(
        parts.network,
        torch.compile(parts.prepared) if compiles else parts.prepared,
        parts.optimizer,
        config,
        device=parts.device,
        precision=progress.precision,
    )
    if scaler and run.stepper.scaler is not None:
        run.stepper.scaler.load_state_dict(scaler)
    if compiles:  # now: it may take minutes, which the plan must leave out
        with parts.accelerator.no_sync(parts.prepared):
            run.stepper.backward(parts.part_of_step(0), 0, progress.microbatch, of=1)
        parts.optimizer.zero_grad()
    if not progress.total_steps:
        first_plan(run, trials)
    elif progress.warmup_steps is None:  # in a checkpoint of an earlier version
        progress.plan = new_plan(progress.total_steps, config)
    run.rhythm = run.clock.rhythm(progress.total_steps, progress.early_step)


def loop(run: Run, signals: Signals) -> None:
    """Make steps until the plan is done, the time is over, or a signal comes.

    Raises:
        Interrupted: after a signal, with a checkpoint of the step that it came in.
        TrainingError: loss or gradients are not finite, or memory is too short.
    """
    parts, progress, clock = run.parts, run.progress, run.clock
    training = parts.config.training
    step_seconds, steps_timed = 0.0, 0
    loss_sum = torch.zeros((), dtype=torch.float64)
    skipped_in_a_row = 0
    last_event, factor = 0.0, 0.0
    signals.wait = True
    clock.start_steps()
    for batch in _saved_before_an_error(run, _batches(run)):
        factor = lr_factor(progress.step, progress.plan, training)
        for group in parts.optimizer.param_groups:
            group["lr"] = training.lr * factor
        loss, grad_norm, stop = _gradient(run, batch, signals)
        if not math.isfinite(loss):
            raise _not_finite(run, f"loss is {loss}")
        scaled = run.stepper.scaler is not None  # fp16 skips such a step by itself
        if not math.isfinite(grad_norm) and not scaled:
            raise _not_finite(run, f"gradient norm is {grad_norm}")
        moved = run.stepper.update(grad_norm)
        progress.step += 1
        progress.images_seen += progress.effective_batch
        ema_decay = None
        if moved:
            skipped_in_a_row = 0
            ema_decay = parts.ema.update(parts.network, progress.step - progress.skipped_steps)
        else:
            progress.skipped_steps += 1
            skipped_in_a_row += 1
            if skipped_in_a_row >= SKIPPED_IN_A_ROW:
                raise _not_finite(run, f"{skipped_in_a_row} steps in a row overflowed in fp16")

        loss_sum += loss
        steps_timed += 1
        step_seconds += clock.end_step()
        progress.training_seconds = clock.seconds
        correct_plan(run)
        last = progress.step >= progress.total_steps or bool(stop)
        if parts.is_main and time.monotonic() - last_event > 1:
            last_event = time.monotonic()
            event("step", step=progress.step, total=progress.total_steps, loss=round(loss, 5))
        if run.rhythm.writes(progress.step) or last:
            run.rate = progress.effective_batch * steps_timed / step_seconds
            run.write_row(
                loss=float(loss_sum) / steps_timed,
                lr=training.lr * factor,
                grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                ema_decay=ema_decay,
            )
            loss_sum.zero_()
            steps_timed, step_seconds = 0, 0.0
        validated = run.rhythm.validates(progress.step) or last
        if validated:
            run.validate()
        run.check_early(validated=validated)
        if run.rhythm.draws(progress.step) or (stop and run.rhythm.grids is not None):
            run.sample()
        progress.training_seconds = clock.seconds
        progress.costs = dict(clock.costs)
        if run.rhythm.saves(progress.step) or stop:
            run.save()
        if stop:
            progress.training_seconds = clock.seconds
            raise Interrupted(stop)
    progress.training_seconds = clock.seconds
    judge_time(run, factor)


def _batches(run: Run) -> Iterator[Batch]:
    """Yield this process's batches from the current step on; a GPU has the next one made meanwhile.

    Not on a CPU: a second thread that uses torch gets OpenMP workers of its own, which spin on
    the cores that the step needs (measured: the optimizer took 0.21 s instead of 0.07 s).
    """
    parts, progress = run.parts, run.progress
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Batch] | None = None
        while progress.step < progress.total_steps:
            batch = coming.result() if coming else parts.part_of_step(progress.step)
            if parts.device.type != "cpu":
                coming = pool.submit(parts.part_of_step, progress.step + 1)
            yield batch


def _saved_before_an_error(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches; if one cannot be made, the steps so far are saved before the run ends."""
    try:
        yield from batches
    except TrainingError:
        if run.progress.step:
            run.save()
        raise


def _gradient(run: Run, batch: Batch, signals: Signals) -> tuple[float, float, int]:
    """Return (mean loss, gradient norm before clipping, signal number or 0), equal on all ranks."""
    parts = run.parts
    per_rank, accelerator = parts.per_rank, parts.accelerator
    while True:
        size = run.progress.microbatch
        local = torch.zeros((), dtype=torch.float32, device=parts.device)
        try:
            for start in range(0, per_rank, size):
                is_last = start + size >= per_rank
                sync = contextlib.nullcontext() if is_last else accelerator.no_sync(parts.prepared)
                with sync:
                    local += run.stepper.backward(batch, start, start + size, of=per_rank)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if accelerator.num_processes > 1:  # the others wait in a collective
                raise TrainingError(
                    f"out of memory at step {run.progress.step}",
                    hint=f"--resume --set training.microbatch={max(1, size // 2)} "
                    f"--set training.grad_accum_steps={per_rank // max(1, size // 2)}",
                ) from error
        parts.optimizer.zero_grad()
        halve_microbatch(run)
    norm = run.stepper.clip()
    gathered = parts.gather([float(local), float(signals.number)])
    losses, numbers = zip(*gathered, strict=True)
    return sum(losses) / len(losses), norm, int(max(numbers))


def _not_finite(run: Run, what: str) -> TrainingError:
    return TrainingError(
        f"{what} at step {run.progress.step}; the weights of the step before are untouched",
        hint="lower training.lr, or start again from the last checkpoint with precision bf16",
    )
