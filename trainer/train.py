"""The training run, from top to bottom.

`train` reads a frozen config.json, sets everything up, runs the loop and writes train.json whatever
happens. Progress is counted in optimizer steps and images; what a step is trained on is a function
of the seed and the step (see batches.py), so a run that was killed goes on as if it had not been.
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

from modelops.base.errors import ModelopsError, TrainingError
from modelops.models.networks import make_pipeline
from modelops.records.train import read_stats
from modelops.training.config import RunSpec, TrainConfig
from modelops.training.launch import read_run_spec, verify_inputs

from .batches import Batch
from .checkpoint import Progress, load_checkpoint_state, newest_checkpoint, save_checkpoint
from .clock import Clock
from .devices import device_name, make_accelerator
from .early import EarlyChecks, make_early_checks, new_overfitting, say_copies, say_overfitting
from .ema import Ema
from .fit import fit, halve_microbatch
from .grids import prompts_to_grid, save_png, validation_loss
from .memory import is_out_of_memory
from .optimizers import make_optimizer
from .plan import early_step, lr_factor, new_plan, replanned
from .planning import correct_plan, first_plan, judge_time
from .process import Interrupted, LockedError, Signals, run_lock
from .record import write_record
from .setup import load_material, make_network
from .stats import StatsWriter, event, memory_gb, warn
from .stepper import Stepper

SKIPPED_IN_A_ROW = 20  # fp16 steps that loss scaling may leave out before the run is given up


def train(config_path: Path, *, resume: bool) -> int:
    """Run or go on with the run whose config.json this is; returns the exit code.

    Raises:
        ModelopsError: the run cannot start or go on; train.json says `failed` and why.
    """
    spec = read_run_spec(config_path)
    run = Run(spec, config_path.parent)
    try:
        with run.signals.caught(run.say), contextlib.ExitStack() as stack:
            if run.is_main:
                stack.enter_context(run_lock(run.run_dir))
            run.set_up(resume=resume)
            run.fit_and_plan()
            run.loop()
        run.finish(status="ok")
    except Interrupted as stop:
        run.finish(status="failed", error=f"interrupted by {stop} at step {run.progress.step}")
        return 128 + stop.signum
    except LockedError:
        raise
    except BaseException as error:
        message = error.message if isinstance(error, ModelopsError) else repr(error)
        with contextlib.suppress(ModelopsError):  # the first error is the one to report
            run.finish(status="failed", error=message)
        raise
    finally:
        run.close()
    return 0


class Run:
    """The state of one run. Methods are in the order in which they are called."""

    def __init__(self, spec: RunSpec, run_dir: Path) -> None:
        self.spec = spec
        self.config: TrainConfig = spec.config
        self.run_dir = run_dir
        self.checkpoints = run_dir / "checkpoints"
        self.started_at = datetime.now(UTC)
        self.started = time.monotonic()
        self.progress = Progress(effective_batch=spec.effective_batch)
        self.signals = Signals()
        self.stop_reason = ""
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.parameters = 0
        self.n_train = self.n_validation = 0
        self.quarantined: dict[str, str] = {}
        self.device_name = ""
        self.rate: float | None = None  # images per second, over the steps since the last row
        self.stats: StatsWriter | None = None
        self.early: EarlyChecks | None = None
        self.copies_said = False
        self.accelerator: Any = None

    def set_up(self, *, resume: bool) -> None:
        """Data, networks, optimizer; then, with `resume`, the state of the newest checkpoint."""
        config, training = self.config, self.config.training
        root = (self.run_dir / self.spec.root).resolve()
        verify_inputs(self.spec, root)
        self.accelerator = make_accelerator()
        accelerator = self.accelerator
        self.device = accelerator.device
        self.device_name = device_name(self.device)
        self.is_main = accelerator.is_main_process
        if accelerator.num_processes != self.spec.processes:
            raise TrainingError(
                f"{accelerator.num_processes} processes are running, "
                f"config.json is for {self.spec.processes}",
                hint=f"modelops train --processes {self.spec.processes}",
            )

        self.material = material = load_material(
            config,
            root,
            self.run_dir,
            effective_batch=self.spec.effective_batch,
            main_process_first=accelerator.main_process_first,
            say=self.say,
        )
        self.quarantined = material.pictures.quarantined
        self.n_train = len(material.pictures.train)
        self.fixed_batches = {"train_probe_loss": material.probe}
        if material.held_out is not None:
            self.fixed_batches = {"validation_loss": material.held_out, **self.fixed_batches}
            self.n_validation = len(material.held_out)
        self.network = make_network(config, material.text_dim).to(self.device).train()
        self.parameters = sum(weight.numel() for weight in self.network.parameters())
        self.ema = Ema(self.network, config.ema)
        self.optimizer = make_optimizer(self.network, training)
        self.pipeline = make_pipeline(
            self.ema.network,
            material.tokenizer,
            material.text_encoder,
            patch_size=config.model.patch,
            prediction=config.model.prediction,
            default_steps=training.sample_steps,
            default_guidance=training.sample_guidance,
        ).to(self.device)
        self.scaler_state = self._resume() if resume else None
        self.prepared = accelerator.prepare(self.network)
        self.per_rank = training.microbatch * training.grad_accum_steps
        self.first_place = accelerator.process_index * self.per_rank
        if not self.progress.microbatch or self.per_rank % self.progress.microbatch:
            self.progress.microbatch = training.microbatch
        if self.is_main:
            self.early = make_early_checks(material.pictures, config, self.pipeline, self.run_dir)
            self.stats = StatsWriter(
                self.run_dir,
                step=self.progress.step,
                section=config.logging,
                run_name=self.spec.run_name,
                config=config.model_dump(mode="json"),
            )

    def fit_and_plan(self) -> None:
        """Find the microbatch, the precision and, for a new run, how many steps there are."""
        config, progress = self.config, self.progress
        progress.setup_seconds += time.monotonic() - self.started
        self.clock = Clock(config, before=progress.training_seconds, costs=progress.costs)
        trials = fit(self)
        compiles = config.training.compile
        self.stepper = Stepper(
            self.network,
            torch.compile(self.prepared) if compiles else self.prepared,
            self.optimizer,
            config,
            device=self.device,
            precision=progress.precision,
        )
        if self.scaler_state and self.stepper.scaler is not None:
            self.stepper.scaler.load_state_dict(self.scaler_state)
        if compiles:  # now: it may take minutes, which the plan must leave out
            with self.accelerator.no_sync(self.prepared):
                self.stepper.backward(self.part_of_step(0), 0, progress.microbatch, of=1)
            self.optimizer.zero_grad()
        if not progress.total_steps:
            first_plan(self, trials)
        elif progress.warmup_steps is None:  # in a checkpoint of an earlier version
            progress.plan = new_plan(progress.total_steps, config)
        self.rhythm = self.clock.rhythm(progress.total_steps, progress.early_step)

    def take_plan(self, total: int) -> None:
        """Go for so many steps in all."""
        progress = self.progress
        progress.plan = replanned(progress.plan, progress.step, total, self.config)
        progress.early_step = early_step(
            self.config, total, step=progress.step, before=progress.early_step
        )
        self.rhythm = self.clock.rhythm(total, progress.early_step)

    def loop(self) -> None:
        """Steps until the plan is done, the time is over, or a signal comes."""
        training, progress, clock = self.config.training, self.progress, self.clock
        step_seconds, steps_timed = 0.0, 0
        loss_sum = torch.zeros((), dtype=torch.float64)
        skipped_in_a_row = 0
        last_event, factor = 0.0, 0.0
        self.signals.wait = True
        clock.start_steps()
        for batch in self._batches():
            factor = lr_factor(progress.step, progress.plan, training)
            for group in self.optimizer.param_groups:
                group["lr"] = training.lr * factor
            loss, grad_norm, stop = self._gradient(batch)
            if not math.isfinite(loss):
                raise self._not_finite(f"loss is {loss}")
            scaled = self.stepper.scaler is not None  # fp16 skips such a step by itself
            if not math.isfinite(grad_norm) and not scaled:
                raise self._not_finite(f"gradient norm is {grad_norm}")
            moved = self.stepper.update(grad_norm)
            progress.step += 1
            progress.images_seen += progress.effective_batch
            ema_decay = None
            if moved:
                skipped_in_a_row = 0
                ema_decay = self.ema.update(self.network, progress.step - progress.skipped_steps)
            else:
                progress.skipped_steps += 1
                skipped_in_a_row += 1
                if skipped_in_a_row >= SKIPPED_IN_A_ROW:
                    raise self._not_finite(f"{skipped_in_a_row} steps in a row overflowed in fp16")

            loss_sum += loss
            steps_timed += 1
            step_seconds += clock.end_step()
            progress.training_seconds = clock.seconds
            correct_plan(self)
            last = progress.step >= progress.total_steps or bool(stop)
            if self.is_main and time.monotonic() - last_event > 1:
                last_event = time.monotonic()
                event("step", step=progress.step, total=progress.total_steps, loss=round(loss, 5))
            if self.rhythm.writes(progress.step) or last:
                self.rate = progress.effective_batch * steps_timed / step_seconds
                self._write_row(
                    loss=float(loss_sum) / steps_timed,
                    lr=training.lr * factor,
                    grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                    ema_decay=ema_decay,
                )
                loss_sum.zero_()
                steps_timed, step_seconds = 0, 0.0
            validated = self.rhythm.validates(progress.step) or last
            if validated:
                self.validate()
            self._check_early(validated=validated)
            if self.rhythm.draws(progress.step) or (stop and self.rhythm.grids is not None):
                self._sample()
            progress.training_seconds = clock.seconds
            progress.costs = dict(clock.costs)
            if self.rhythm.saves(progress.step) or stop:
                self._save()
            if stop:
                progress.training_seconds = clock.seconds
                raise Interrupted(stop)
        progress.training_seconds = clock.seconds
        judge_time(self, factor)

    def finish(self, *, status: Any, error: str | None = None) -> None:
        """Write train.json, report.md and loss.png."""
        if self.is_main:
            write_record(self, status=status, error=error)

    def close(self) -> None:
        """Close trackers and the process group."""
        if self.stats is not None:
            self.stats.close()
        if self.accelerator is not None:
            self.accelerator.end_training()

    def part_of_step(self, step: int) -> Batch:
        """This rank's part of the effective batch of a step."""
        return self.material.batches.step_to_batch(
            step, self.first_place, self.first_place + self.per_rank
        )

    def validate(self) -> None:
        """Losses of the averaged weights on the fixed batches, as a row of stats.jsonl."""
        if not self.is_main:
            return
        row: dict[str, Any] = {"step": self.progress.step}
        with self.clock.work("validation"), self.stepper.autocast():
            for name, batch in self.fixed_batches.items():
                value = validation_loss(self.ema.network, batch, self.config, self.device)
                if math.isfinite(value):
                    row[name] = value
        if self.stats is not None:
            self.stats.write(row)
            if found := new_overfitting(read_stats(self.stats.path)):
                say_overfitting(self.progress.step, found)

    def remark(self, line: str) -> None:
        """Warn a person, now and in the record."""
        self.progress.warnings.append(line)
        if self.is_main:
            warn(line)

    def say(self, text: str) -> None:
        """Tell the launching process."""
        if self.is_main:
            event("note", text=text)

    def gather(self, values: list[float]) -> list[list[float]]:
        """Numbers of each rank, on every rank."""
        tensor = torch.tensor([values], dtype=torch.float64, device=self.device)
        return [[float(item) for item in row] for row in self.accelerator.gather(tensor)]

    def from_main(self, value: int) -> int:
        """The main rank's number, on every rank."""
        return int(self.gather([value])[0][0])

    def _resume(self) -> dict[str, Any] | None:
        path, complaints = newest_checkpoint(self.checkpoints, self._identity())
        for complaint in complaints:
            warn(f"{complaint}; going back to an older checkpoint")
        if path is None:
            self.say("no checkpoint yet: starting from the beginning")
            return None
        self.progress, scaler = load_checkpoint_state(
            path, network=self.network, average=self.ema.network, optimizer=self.optimizer
        )
        self.progress.sessions += 1
        self.progress.warnings += complaints
        self.say(f"going on from step {self.progress.step}")
        return scaler

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches from the current step on; a GPU has the next one made meanwhile.

        Not on a CPU: a second thread that uses torch gets OpenMP workers of its own, which spin on
        the cores that the step needs (measured: the optimizer took 0.21 s instead of 0.07 s).
        """
        with ThreadPoolExecutor(1) as pool:
            coming: Future[Batch] | None = None
            while self.progress.step < self.progress.total_steps:
                batch = coming.result() if coming else self.part_of_step(self.progress.step)
                if self.device.type != "cpu":
                    coming = pool.submit(self.part_of_step, self.progress.step + 1)
                yield batch

    def _gradient(self, batch: Batch) -> tuple[float, float, int]:
        """(mean loss, gradient norm before clipping, signal number or 0), equal on all ranks."""
        while True:
            size = self.progress.microbatch
            local = torch.zeros((), dtype=torch.float32, device=self.device)
            try:
                for start in range(0, self.per_rank, size):
                    is_last = start + size >= self.per_rank
                    sync = (
                        contextlib.nullcontext()
                        if is_last
                        else self.accelerator.no_sync(self.prepared)
                    )
                    with sync:
                        local += self.stepper.backward(batch, start, start + size, of=self.per_rank)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.accelerator.num_processes > 1:  # the others wait in a collective
                    raise TrainingError(
                        f"out of memory at step {self.progress.step}",
                        hint=f"--resume --set training.microbatch={max(1, size // 2)} "
                        f"--set training.grad_accum_steps={self.per_rank // max(1, size // 2)}",
                    ) from error
            self.optimizer.zero_grad()
            halve_microbatch(self)
        norm = self.stepper.clip()
        gathered = self.gather([float(local), float(self.signals.number)])
        losses, signals = zip(*gathered, strict=True)
        return sum(losses) / len(losses), norm, int(max(signals))

    def _check_early(self, *, validated: bool) -> None:
        """A few samples against their nearest training images; no step depends on it."""
        progress = self.progress
        if self.early is None or self.stats is None:
            return
        seconds, images = progress.training_seconds, progress.images_seen
        if self.early.due(
            progress.step, validated=validated, training_seconds=seconds, images=images
        ):
            with self.clock.work("early_check"):
                row, verdict = self.early.measure()
            if row:
                self.stats.write({"step": progress.step, **row})
            if verdict and verdict.answer == "copies" and not self.copies_said:
                self.copies_said = True
                say_copies(progress.step, verdict)

    def _sample(self) -> None:
        if self.is_main and self.stats is not None:
            prompts = self.material.prompts
            with self.clock.work("grid"):
                grid = prompts_to_grid(self.pipeline, prompts, self.config.training.seed)
                save_png(grid, self.run_dir / "grids" / f"step-{self.progress.step}.png")
                self.stats.picture("samples", grid, self.progress.step)

    def _save(self) -> None:
        if self.is_main:
            with self.clock.work("checkpoint"):
                path = self.save_to(self.checkpoints, self.progress)
            event("checkpoint", step=self.progress.step, path=f"checkpoints/{path.name}")

    def save_to(self, directory: Path, progress: Progress) -> Path:
        """Write a checkpoint below a directory; returns its path."""
        scaler = self.stepper.scaler
        return save_checkpoint(
            directory,
            progress,
            pipeline=self.pipeline,
            network=self.network,
            optimizer=self.optimizer,
            scaler=None if scaler is None else scaler.state_dict(),
            identity=self._identity(),
            keep=self.config.training.keep_checkpoints,
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must share."""
        return {
            "effective_batch": self.spec.effective_batch,
            "inputs": {name: ref.sha256 for name, ref in sorted(self.spec.inputs.items())},
        }

    def _write_row(self, **numbers: float | None) -> None:
        if self.stats is not None and self.is_main:
            row = {
                "step": self.progress.step,
                "images_seen": self.progress.images_seen,
                **{name: value for name, value in numbers.items() if value is not None},
                "images_per_second": round(self.rate or 0.0, 2),
                "memory_gb": round(memory_gb(self.device), 3),
                "elapsed_s": round(self.progress.training_seconds, 2),
            }
            self.stats.write(row)

    def _not_finite(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.progress.step}; the weights of the step before are untouched",
            hint="lower training.lr, or start again from the last checkpoint with precision bf16",
        )
