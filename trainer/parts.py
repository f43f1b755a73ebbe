"""The fixed parts of a run: its config, processes, images, networks and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelops.base.errors import TrainingError
from modelops.models.networks import make_pipeline
from modelops.training.config import RunSpec, TrainConfig
from modelops.training.launch import verify_inputs

from .batches import Batch
from .checkpoint import Progress, load_checkpoint_state, newest_checkpoint
from .devices import make_accelerator
from .early import EarlyChecks, make_early_checks
from .ema import Ema
from .optimizers import make_optimizer
from .setup import Material, load_material, make_network
from .stats import StatsWriter, event, warn


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Parts of a run that stay the same objects from the first step to the last.

    Attributes:
        spec: config.json.
        run_dir: the run's folder.
        accelerator: accelerate's view of the processes; the device is its own.
        material: images, captions, prompts.
        network, prepared: the network that is trained, by itself and as accelerate wrapped it.
        ema: the averaged network.
        optimizer: of `network`.
        pipeline: a diffusers pipeline around the averaged network.
        early, stats: samples compared with training images, and stats.jsonl; the main process's.
    """

    spec: RunSpec
    run_dir: Path
    accelerator: Any
    material: Material
    network: torch.nn.Module
    prepared: torch.nn.Module
    ema: Ema
    optimizer: Any
    pipeline: Any
    early: EarlyChecks | None
    stats: StatsWriter | None

    @property
    def config(self) -> TrainConfig:
        return self.spec.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def per_rank(self) -> int:
        """Samples of a step that each process trains on."""
        return self.config.training.microbatch * self.config.training.grad_accum_steps

    @property
    def fixed_batches(self) -> dict[str, Batch]:
        """Batches of the losses that are compared over the run, by name in stats.jsonl."""
        held_out = self.material.held_out
        found = {} if held_out is None else {"validation_loss": held_out}
        return {**found, "train_probe_loss": self.material.probe}

    def part_of_step(self, step: int) -> Batch:
        """Return this process's part of the effective batch of a step."""
        first = self.accelerator.process_index * self.per_rank
        return self.material.batches.step_to_batch(step, first, first + self.per_rank)

    def gather(self, values: list[float]) -> list[list[float]]:
        """Return the numbers of each process, on every process."""
        tensor = torch.tensor([values], dtype=torch.float64, device=self.device)
        return [[float(item) for item in row] for row in self.accelerator.gather(tensor)]

    def from_main(self, value: int) -> int:
        """Return the main process's number, on every process."""
        return int(self.gather([value])[0][0])

    def say(self, text: str) -> None:
        """Tell the launching process."""
        if self.is_main:
            event("note", text=text)


def set_up(
    spec: RunSpec, run_dir: Path, *, resume: bool
) -> tuple[Parts, Progress, dict[str, Any] | None]:
    """Load data, make networks and optimizer and, with `resume`, read the newest checkpoint.

    Returns:
        The parts, the progress, and the state of fp16's loss scaling if there is one.

    Raises:
        UsageError: a file is missing or is not the one that the run was planned with.
        TrainingError: nothing to train on, or another number of processes than config.json says.
    """
    config, training = spec.config, spec.config.training
    root = (run_dir / spec.root).resolve()
    verify_inputs(spec, root)
    accelerator = make_accelerator()
    is_main = accelerator.is_main_process
    if accelerator.num_processes != spec.processes:
        raise TrainingError(
            f"{accelerator.num_processes} processes are running, "
            f"config.json is for {spec.processes}",
            hint=f"modelops train --processes {spec.processes}",
        )

    def say(text: str) -> None:
        if is_main:
            event("note", text=text)

    material = load_material(
        config,
        root,
        run_dir,
        effective_batch=spec.effective_batch,
        main_process_first=accelerator.main_process_first,
        say=say,
        warn=warn if is_main else lambda text: None,
    )
    network = make_network(config, material.text_dim).to(accelerator.device).train()
    ema = Ema(network, config.ema)
    optimizer = make_optimizer(network, training)
    pipeline = make_pipeline(
        ema.network,
        material.tokenizer,
        material.text_encoder,
        patch_size=config.model.patch,
        prediction=config.model.prediction,
        default_steps=training.sample_steps,
        default_guidance=training.sample_guidance,
    ).to(accelerator.device)
    progress, scaler = Progress(effective_batch=spec.effective_batch), None
    if resume:
        path, complaints = newest_checkpoint(run_dir / "checkpoints", identity(spec, material))
        for complaint in complaints:
            warn(f"{complaint}; going back to an older checkpoint")
        if path is None:
            say("no checkpoint yet: starting from the beginning")
        else:
            progress, scaler = load_checkpoint_state(
                path, network=network, average=ema.network, optimizer=optimizer
            )
            progress.sessions += 1
            progress.warnings += complaints
            say(f"going on from step {progress.step}")
    per_rank = training.microbatch * training.grad_accum_steps
    if not progress.microbatch or per_rank % progress.microbatch:
        progress.microbatch = training.microbatch
    early = make_early_checks(material.pictures, config, pipeline, run_dir) if is_main else None
    stats = None
    if is_main:
        stats = StatsWriter(
            run_dir,
            step=progress.step,
            section=config.logging,
            run_name=spec.run_name,
            config=config.model_dump(mode="json"),
        )
    parts = Parts(
        spec=spec,
        run_dir=run_dir,
        accelerator=accelerator,
        material=material,
        network=network,
        prepared=accelerator.prepare(network),
        ema=ema,
        optimizer=optimizer,
        pipeline=pipeline,
        early=early,
        stats=stats,
    )
    return parts, progress, scaler


def identity(spec: RunSpec, material: Material) -> dict[str, Any]:
    """Return the values that a checkpoint and the run that continues from it must share."""
    return {
        "effective_batch": spec.effective_batch,
        "inputs": {name: ref.sha256 for name, ref in sorted(spec.inputs.items())},
        "text_encoder": material.encoder_sha256,
    }
