"""The training run, from top to bottom.

`train` reads a frozen config.json, sets everything up, runs the loop and writes train.json whatever
happens. Progress is counted in optimizer steps and images; what a step is trained on is a function
of the seed and the step (see batches.py), so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from modelops.config import RunSpec, TrainConfig
from modelops.environment import current_environment
from modelops.errors import ModelopsError, TrainingError
from modelops.launch import read_run_spec, verify_inputs
from modelops.metrics.overfitting import find_overfitting, rows_to_losses
from modelops.models.encoders import load_text_encoder
from modelops.models.networks import make_pipeline, make_unet
from modelops.records import TrainRecord, read_stats
from modelops.seeding import derive_seed

from .batches import Batch, TrainingBatches, fixed_batch
from .checkpoint import (
    Progress,
    checkpoint_refs,
    load_checkpoint_state,
    newest_checkpoint,
    save_checkpoint,
)
from .devices import device_name, make_accelerator
from .early import (
    EarlyChecks,
    make_early_checks,
    new_overfitting,
    say_copies,
    say_overfitting,
    spread,
)
from .ema import Ema
from .grids import grid_prompts, prompts_to_grid, save_png, validation_loss
from .memory import is_out_of_memory, smaller_microbatch
from .objective import flow_losses
from .optimizers import make_optimizer
from .pictures import load_pictures
from .plan import OVERRUN, corrected_total, is_due, lr_factor, steps_in_time
from .process import Interrupted, LockedError, run_lock
from .report import loss_trend, write_report
from .stats import StatsWriter, event, memory_gb, warn
from .texts import TextTable

SKIPPED_IN_A_ROW = 20  # fp16 steps that loss scaling may leave out before the run is given up


def train(config_path: Path, *, resume: bool) -> int:
    """Run or go on with the run whose config.json this is; returns the exit code.

    Raises:
        ModelopsError: the run cannot start or go on; train.json says `failed` and why.
    """
    spec = read_run_spec(config_path)
    run = Run(spec, config_path.parent)
    try:
        with run.signals(), contextlib.ExitStack() as stack:
            if run.is_main:
                stack.enter_context(run_lock(run.run_dir))
            run.set_up(resume=resume)
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
        self.signum = 0  # of a signal that came while a step was running
        self.in_loop = False
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
        self.accelerator = make_accelerator(config)
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

        self._say("reading pictures")
        pictures = load_pictures(config, root)
        self.quarantined = pictures.quarantined
        self.n_train = len(pictures.train)
        tokenizer, text_encoder = load_text_encoder(config.model.text_encoder)
        self.prompts = grid_prompts(config, pictures)
        self._say(f"{self.n_train} pictures to train on; embedding captions")
        validation = pictures.validation
        with accelerator.main_process_first():
            texts = TextTable(
                [*pictures.train.captions, *(validation.captions if validation else [])],
                tokenizer,
                text_encoder,
                keep_tokens=config.model.cross_attention,
                cache=self.run_dir / "text_embeddings.safetensors",
            )
        self.batches = TrainingBatches(pictures.train, texts, config, self.spec.effective_batch)
        limit = training.validation_samples
        self.probe = fixed_batch(
            pictures.train.subset(spread(self.n_train, limit)), texts, config, "probe"
        )
        self.held_out = None
        if validation is not None:
            chosen = validation.subset(spread(len(validation), limit))
            self.held_out = fixed_batch(chosen, texts, config, "validation")
            self.n_validation = len(chosen)

        torch.manual_seed(derive_seed(training.seed, "initial_weights"))
        network = make_unet(
            resolution=config.model.resolution,
            patch_size=config.model.patch,
            channels=config.model.channels,
            multipliers=config.model.multipliers,
            layers_per_block=config.model.layers_per_block,
            attention_levels=config.model.attention_levels or (),
            cross_attention=config.model.cross_attention,
            text_dim=texts.dim,
        )
        torch.nn.init.zeros_(network.conv_out.weight)  # the first prediction is 0 everywhere
        torch.nn.init.zeros_(network.conv_out.bias)
        if training.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(self.device).train()
        self.parameters = sum(weight.numel() for weight in network.parameters())
        self.ema = Ema(network, config.ema)
        self.raw_optimizer = make_optimizer(network, training)
        self.pipeline = make_pipeline(
            self.ema.network,
            tokenizer,
            text_encoder,
            patch_size=config.model.patch,
            prediction=config.model.prediction,
            default_steps=training.sample_steps,
            default_guidance=training.sample_guidance,
        ).to(self.device)
        scaler_state = self._resume() if resume else None
        prepared, self.optimizer = accelerator.prepare(self.network, self.raw_optimizer)
        self.prepared = prepared
        self.forward = torch.compile(prepared) if training.compile else prepared
        if scaler_state and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(scaler_state)

        per_rank = training.microbatch * training.grad_accum_steps
        self.first_place = accelerator.process_index * per_rank
        self.per_rank = per_rank
        if not self.progress.microbatch or per_rank % self.progress.microbatch:
            self.progress.microbatch = training.microbatch
        self._fit_and_plan()
        if self.is_main:
            self.early = make_early_checks(pictures, config, self.pipeline, self.run_dir)
            self.stats = StatsWriter(
                self.run_dir,
                step=self.progress.step,
                section=config.logging,
                run_name=self.spec.run_name,
                config=config.model_dump(mode="json"),
            )

    def loop(self) -> None:
        """Steps until the plan is done, the time is over, or a signal comes."""
        config, training, progress = self.config, self.config.training, self.progress
        warmup = config.warmup(progress.total_steps)
        validate_every = training.validate_every_steps or max(1, progress.total_steps // 20)
        before = progress.training_seconds
        clock = time.monotonic()
        first_step, step_seconds, steps_timed = progress.step, 0.0, 0
        loss_sum = torch.zeros((), dtype=torch.float64)
        skipped_in_a_row = 0
        last_event = 0.0
        self.in_loop = True
        if progress.step == 0 and self.is_main:
            self._validate()

        for batch in self._batches():
            step_clock = time.monotonic()
            lr = training.lr * lr_factor(progress.step, progress.total_steps, warmup, training)
            for group in self.raw_optimizer.param_groups:
                group["lr"] = lr
            loss, grad_norm, stop = self._gradient(batch)
            if not math.isfinite(loss):
                raise self._not_finite(f"loss is {loss}")
            scaled = self.accelerator.scaler is not None  # fp16 skips such a step by itself
            if not math.isfinite(grad_norm) and not scaled:
                raise self._not_finite(f"gradient norm is {grad_norm}")
            self.optimizer.step()
            self.optimizer.zero_grad()
            progress.step += 1
            progress.images_seen += progress.effective_batch
            ema_decay = None
            if scaled and self.optimizer.step_was_skipped:
                progress.skipped_steps += 1
                skipped_in_a_row += 1
                if skipped_in_a_row >= SKIPPED_IN_A_ROW:
                    raise self._not_finite(f"{skipped_in_a_row} steps in a row overflowed in fp16")
            else:
                skipped_in_a_row = 0
                ema_decay = self.ema.update(self.network, progress.step - progress.skipped_steps)

            loss_sum += loss
            steps_timed += 1
            step_seconds += time.monotonic() - step_clock
            progress.training_seconds = before + time.monotonic() - clock
            last = progress.step >= progress.total_steps or bool(stop)
            if self.is_main and time.monotonic() - last_event > 1:
                last_event = time.monotonic()
                event("step", step=progress.step, total=progress.total_steps, loss=round(loss, 5))
            if is_due(progress.step, config.logging.log_every_steps) or last:
                self.rate = progress.effective_batch * steps_timed / step_seconds
                self._write_row(
                    loss=float(loss_sum) / steps_timed,
                    lr=lr,
                    grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                    ema_decay=ema_decay,
                )
                loss_sum.zero_()
                steps_timed, step_seconds = 0, 0.0
            validated = is_due(progress.step, validate_every) or last
            if validated:
                self._validate()
            self._check_early(validated)
            save = is_due(progress.step, training.save_every_steps) or last
            save = save or progress.step == progress.early_step
            sample_every = training.sample_every_steps
            if (is_due(progress.step, sample_every) if sample_every else save) or last:
                self._sample()
            progress.training_seconds = before + time.monotonic() - clock
            if save:
                self._save()
            if stop:
                raise Interrupted(stop)
            seconds = time.monotonic() - clock
            self._mind_the_clock(warmup, (progress.step - first_step) / seconds)
        self.stop_reason = self.stop_reason or "all planned steps are done"

    def finish(self, *, status: Any, error: str | None = None) -> None:
        """Write train.json, report.md and loss.png."""
        if not self.is_main:
            return
        progress = self.progress
        rows = read_stats(self.run_dir / "stats.jsonl")
        losses = [row["loss"] for row in rows if "loss" in row]
        held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
        probe = [row["train_probe_loss"] for row in rows if "train_probe_loss" in row]
        overfitting = find_overfitting(rows_to_losses(rows))
        record = TrainRecord(
            status=status,
            error=error,
            inputs=dict(self.spec.inputs),
            seeds={"training": self.config.training.seed},
            environment=current_environment(),
            started_at=self.started_at,
            duration_s=round(time.monotonic() - self.started, 3),
            run_name=self.spec.run_name,
            parameters=self.parameters,
            effective_batch=progress.effective_batch,
            steps=progress.step,
            images_seen=progress.images_seen,
            final_train_loss=losses[-1] if losses else None,
            final_validation_loss=held_out[-1] if held_out else None,
            final_train_probe_loss=probe[-1] if probe else None,
            overfitting_since_step=overfitting.since.step if overfitting else None,
            loss_trend=loss_trend(losses),
            training_seconds=round(progress.training_seconds, 3),
            checkpoints=checkpoint_refs(self.checkpoints, progress),
            config_sha256=self.spec.config_sha256,
            planned_steps=progress.total_steps or None,
            stop_reason=self.stop_reason,
            sessions=progress.sessions,
            processes=self.spec.processes,
            device=self.device_name,
            precision=self.config.training.precision,
            images_per_second=None if self.rate is None else round(self.rate, 2),
            peak_memory_gb=round(memory_gb(self.device), 3) if self.accelerator else None,
            n_train_images=self.n_train,
            n_validation_images=self.n_validation,
            quarantined=self.quarantined,
            warnings=[*progress.warnings, *([str(overfitting)] if overfitting else [])],
        )
        record.write(self.run_dir / "train.json")
        write_report(self.run_dir, record, self.config)
        event("end", status=status, step=progress.step, total=progress.total_steps)

    def close(self) -> None:
        """Close trackers and the process group."""
        if self.stats is not None:
            self.stats.close()
        if self.accelerator is not None:
            self.accelerator.end_training()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step that is running; a second one at once."""

        def on_signal(signum: int, _frame: Any) -> None:
            if not self.in_loop or self.signum == signum == signal.SIGINT:
                raise Interrupted(signum)
            self.signum = signum
            self._say(f"{signal.Signals(signum).name}: saving a checkpoint after this step")

        old = {name: signal.signal(name, on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in old.items():
                signal.signal(name, handler)

    def _resume(self) -> dict[str, Any] | None:
        path, complaints = newest_checkpoint(self.checkpoints, self._identity())
        for complaint in complaints:
            warn(f"{complaint}; going back to an older checkpoint")
        if path is None:
            self._say("no checkpoint yet: starting from the beginning")
            return None
        self.progress, scaler = load_checkpoint_state(
            path, network=self.network, average=self.ema.network, optimizer=self.raw_optimizer
        )
        self.progress.sessions += 1
        self.progress.warnings += complaints
        self._say(f"going on from step {self.progress.step}")
        return scaler

    def _fit_and_plan(self) -> None:
        """Find a microbatch that fits into memory and, for a new run, how many steps there are."""
        training, progress = self.config.training, self.progress
        batch = self._part_of_step(0)
        timed = training.time_limit_seconds is not None and not progress.total_steps
        while True:
            fits, seconds = 1, 0.0
            try:
                with self.accelerator.no_sync(self.prepared):
                    for repeat in range(3 if timed else 1):
                        clock = time.monotonic()
                        self._losses(batch, 0, progress.microbatch).mean().backward()
                        seconds = time.monotonic() - clock if repeat else 0.0
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fits = 0
            self.optimizer.zero_grad()
            if all(self._gather(fits)):
                break
            self._halve_microbatch()
        if progress.total_steps:
            return
        progress.total_steps = training.total_steps
        if training.time_limit_seconds is not None:
            # A step also has an optimizer update, validation and checkpoints: correct as we go.
            per_step = max(self._gather(seconds)) * self.per_rank / progress.microbatch * 1.1
            progress.total_steps = steps_in_time(
                training, 0, training.time_limit_seconds, 1 / per_step
            )
            self._say(f"{progress.total_steps} steps fit into {training.time_limit_seconds:.0f} s")
        if training.early_checkpoint:
            progress.early_step = max(1, round(progress.total_steps * training.early_checkpoint))

    def _halve_microbatch(self) -> None:
        progress = self.progress
        smaller = smaller_microbatch(progress.microbatch, self.per_rank)
        if smaller is None:
            raise TrainingError(
                "out of memory with a microbatch of 1",
                hint="lower model.resolution or model.channels, or set training.precision: bf16",
            )
        line = (
            f"out of memory: microbatch {progress.microbatch} -> {smaller}, "
            f"accumulation {self.per_rank // smaller}; the effective batch stays the same"
        )
        progress.warnings.append(f"step {progress.step}: {line}")
        progress.microbatch = smaller
        if self.is_main:
            warn(line)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _part_of_step(self, step: int) -> Batch:
        """This rank's part of the effective batch of a step."""
        return self.batches.step_to_batch(step, self.first_place, self.first_place + self.per_rank)

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches from the current step on; a GPU has the next one made meanwhile.

        Not on a CPU: a second thread that uses torch gets OpenMP workers of its own, which spin on
        the cores that the step needs (measured: the optimizer took 0.21 s instead of 0.07 s).
        """
        with ThreadPoolExecutor(1) as pool:
            coming: Future[Batch] | None = None
            while self.progress.step < self.progress.total_steps and not self.stop_reason:
                batch = coming.result() if coming else self._part_of_step(self.progress.step)
                if self.device.type != "cpu":
                    coming = pool.submit(self._part_of_step, self.progress.step + 1)
                yield batch

    def _losses(self, batch: Batch, start: int, stop: int) -> torch.Tensor:
        return flow_losses(
            self.forward,
            **batch.tensors(start, stop, self.device),
            patch_size=self.config.model.patch,
            prediction=self.config.model.prediction,
            channels_last=self.config.training.channels_last,
        )

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
                        share = self._losses(batch, start, start + size).sum() / self.per_rank
                        self.accelerator.backward(share)
                    local += share.detach()
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
            self._halve_microbatch()
        norm = self.accelerator.clip_grad_norm_(
            self.network.parameters(), self.config.training.grad_clip
        )
        numbers = torch.stack([local, torch.tensor(float(self.signum), device=self.device)])
        gathered = self.accelerator.gather(numbers[None])
        return float(gathered[:, 0].mean()), float(norm), int(gathered[:, 1].max())

    def _validate(self) -> None:
        if self.is_main:
            row: dict[str, Any] = {"step": self.progress.step}
            with self.accelerator.autocast():
                for name, batch in (
                    ("validation_loss", self.held_out),
                    ("train_probe_loss", self.probe),
                ):
                    if batch is not None:
                        value = validation_loss(self.ema.network, batch, self.config, self.device)
                        if math.isfinite(value):
                            row[name] = value
            if self.stats is not None:
                self.stats.write(row)
                if found := new_overfitting(read_stats(self.stats.path)):
                    say_overfitting(self.progress.step, found)

    def _check_early(self, validated: bool) -> None:
        """A few samples against their nearest training pictures; no step depends on it."""
        progress = self.progress
        if self.early is None or self.stats is None:
            return
        seconds, images = progress.training_seconds, progress.images_seen
        if self.early.due(
            progress.step, validated=validated, training_seconds=seconds, images=images
        ):
            row, verdict = self.early.measure()
            if row:
                self.stats.write({"step": progress.step, **row})
            if verdict and verdict.answer == "copies" and not self.copies_said:
                self.copies_said = True
                say_copies(progress.step, verdict)

    def _sample(self) -> None:
        if self.is_main and self.stats is not None:
            grid = prompts_to_grid(self.pipeline, self.prompts, self.config.training.seed)
            save_png(grid, self.run_dir / "grids" / f"step-{self.progress.step}.png")
            self.stats.picture("samples", grid, self.progress.step)

    def _save(self) -> None:
        if not self.is_main:
            return
        scaler = self.accelerator.scaler
        path = save_checkpoint(
            self.checkpoints,
            self.progress,
            pipeline=self.pipeline,
            network=self.network,
            optimizer=self.raw_optimizer,
            scaler=None if scaler is None else scaler.state_dict(),
            identity=self._identity(),
            keep=self.config.training.keep_checkpoints,
        )
        event("checkpoint", step=self.progress.step, path=f"checkpoints/{path.name}")

    def _mind_the_clock(self, warmup: int, rate: float) -> None:
        """Correct the plan of a run with a time limit; stop one that is far beyond it."""
        training, progress = self.config.training, self.progress
        limit = training.time_limit_seconds
        if limit is None or not is_due(progress.step, max(1, progress.total_steps // 50)):
            return
        left, rate = self._from_main([limit - progress.training_seconds, rate])
        total = corrected_total(training, progress.step, progress.total_steps, warmup, left, rate)
        if total != progress.total_steps:
            self._say(f"plan: {progress.total_steps} -> {total} steps")
            progress.total_steps = total
        elif left < limit * (1 - OVERRUN) and progress.step < progress.total_steps:
            self.stop_reason = f"time limit of {limit:.0f} s"
            progress.warnings.append(
                f"stopped by the time limit at step {progress.step} of {progress.total_steps}, "
                "before the learning rate had decayed"
            )
            self._validate()
            self._sample()
            self._save()

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

    def _gather(self, value: float) -> list[float]:
        """One number of each rank, on every rank."""
        tensor = torch.tensor([float(value)], device=self.device)
        return [float(item) for item in self.accelerator.gather(tensor)]

    def _from_main(self, values: list[float]) -> list[float]:
        from accelerate.utils import broadcast

        tensor = torch.tensor(values, dtype=torch.float32, device=self.device)
        return [float(item) for item in broadcast(tensor)]

    def _say(self, text: str) -> None:
        if self.is_main:
            event("note", text=text)
