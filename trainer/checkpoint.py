"""Checkpoints: a diffusers directory of the averaged weights, and `training_state/` beside it.

    step-N/model_index.json, unet/, scheduler/, text_encoder/, tokenizer/, pipeline.py
    step-N/training_state/state.json               counters, plan, digests of the two files below
    step-N/training_state/weights.safetensors      the live weights
    step-N/training_state/optimizer.safetensors    Adam's moments, by parameter name

A checkpoint is written to a temporary directory and renamed, and an older one is removed only after
that, so a kill at any moment leaves at least one complete checkpoint. No pickle is written or read.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from modelops.base.errors import IntegrityError, TrainingError
from modelops.base.files import (
    atomic_directory,
    read_json,
    remove_leftovers,
    sha256_file,
    sha256_tree,
    write_json,
)
from modelops.models.checkpoints import save_pipeline
from modelops.models.sources import TRAINING_STATE
from modelops.records.train import CheckpointRef

from .plan import Plan

_NAME = re.compile(r"step-(\d+)")


@dataclass(kw_only=True)
class Progress:
    """Progress of a run; saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        images_seen: samples trained on.
        total_steps: steps planned.
        warmup_steps, anchor_step, anchor_phase: of the plan; see `plan.Plan`.
        early_step: the step whose checkpoint is kept for comparison; 0 for none.
        costs: seconds of each kind of work, as last measured.
        precision: fp32, bf16 or fp16: the one that the run began with.
        precision_reason: reason for it.
        precision_rates: images per second of each precision that was measured for the choice.
        effective_batch: samples per step.
        microbatch: samples per forward pass and process, after any out-of-memory remedy.
        training_seconds: from fitting the batch and planning on, over all sessions.
        setup_seconds: before that: reading data, embedding captions, loading networks.
        sessions: number of processes that have worked on the run.
        skipped_steps: steps that fp16's loss scaling left out.
        checkpoints: [step, images_seen, tree digest] of those written so far.
        warnings: warnings for a reader of the record.
    """

    step: int = 0
    images_seen: int = 0
    total_steps: int = 0
    warmup_steps: int | None = None
    anchor_step: int = 0
    anchor_phase: float = 0.0
    early_step: int = 0
    costs: dict[str, float] = field(default_factory=dict)
    precision: str = ""
    precision_reason: str = ""
    precision_rates: dict[str, float | None] = field(default_factory=dict)
    effective_batch: int = 0
    microbatch: int = 0
    training_seconds: float = 0.0
    setup_seconds: float = 0.0
    sessions: int = 1
    skipped_steps: int = 0
    checkpoints: list[tuple[int, int, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """The steps and the shape of the learning rate."""
        return Plan(self.total_steps, self.warmup_steps or 0, self.anchor_step, self.anchor_phase)

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.total_steps, self.warmup_steps = plan.total, plan.warmup
        self.anchor_step, self.anchor_phase = plan.anchor_step, plan.anchor_phase


def save_checkpoint(
    directory: Path,
    progress: Progress,
    *,
    pipeline: Any,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any] | None,
    identity: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write `directory`/step-N and remove older ones beyond `keep`.

    Args:
        directory: runs/NAME/checkpoints.
        progress: its `checkpoints` gets the new one.
        pipeline: holds the averaged network.
        network: the live network.
        optimizer: Adam over `network`.
        scaler: state of fp16's loss scaling, or None.
        identity: values that a resume must agree with (config digest, input digests).
        keep: number of the newest to keep; None keeps all.
    """
    target = directory / f"step-{progress.step}"
    with atomic_directory(target) as temporary:
        save_pipeline(pipeline, temporary)
        digest = sha256_tree(temporary)
        progress.checkpoints = [
            entry for entry in progress.checkpoints if entry[0] != progress.step
        ] + [(progress.step, progress.images_seen, digest)]
        state = temporary / TRAINING_STATE
        state.mkdir()
        save_file(_contiguous(network.state_dict()), state / "weights.safetensors")
        save_file(_contiguous(_moments(network, optimizer)), state / "optimizer.safetensors")
        files = {path.name: sha256_file(path) for path in sorted(state.iterdir())}
        write_json(
            state / "state.json",
            {
                "schema_version": 1,
                "progress": asdict(progress),
                "scaler": scaler,
                "identity": identity,
                "files": files,
                "model_sha256": digest,
            },
        )
    if keep is not None:
        _retain(directory, keep, progress)
    return target


def _retain(directory: Path, keep: int, progress: Progress) -> None:
    for step, path in list_checkpoints(directory)[:-keep]:
        if step != progress.early_step:
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every complete checkpoint, oldest first."""
    found = []
    if directory.is_dir():
        for path in directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and (path / TRAINING_STATE / "state.json").is_file():
                found.append((int(match[1]), path))
    return sorted(found)


def newest_checkpoint(directory: Path, identity: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint whose bytes are whole, and a line for each one skipped.

    Half-written files of a killed process are removed first.

    Raises:
        TrainingError: the checkpoint belongs to another config or other data.
        IntegrityError: there are checkpoints, and all are damaged.
    """
    remove_leftovers(directory)
    complaints: list[str] = []
    found = list_checkpoints(directory)
    for _, path in reversed(found):
        try:
            state = verify_checkpoint(path)
        except IntegrityError as error:
            complaints.append(error.message)
            continue
        for key, value in identity.items():
            if state["identity"].get(key, value) != value:  # older versions wrote fewer keys
                raise TrainingError(
                    f"{path}: its {key.replace('_', ' ')} is not that of this run now",
                    hint="put it back, or start a new run with another --run-name",
                )
        return path, complaints
    if found:
        raise IntegrityError(
            complaints[0], hint="all checkpoints are damaged; start a new run with --run-name"
        )
    return None, complaints


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Read state.json and compare every file with its digest.

    Raises:
        IntegrityError: bytes are missing or different.
    """
    state = read_json(path / TRAINING_STATE / "state.json")
    for name, digest in state["files"].items():
        file = path / TRAINING_STATE / name
        if not file.is_file() or sha256_file(file) != digest:
            raise IntegrityError(f"{file}: missing or damaged")
    if sha256_tree(path, exclude=[TRAINING_STATE]) != state["model_sha256"]:
        raise IntegrityError(f"{path}: its model files differ from the digest in state.json")
    return dict(state)


def load_checkpoint_state(
    path: Path,
    *,
    network: torch.nn.Module,
    average: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[Progress, dict[str, Any] | None]:
    """Put weights, averages and moments back in place; returns counters and the scaler's state."""
    state = read_json(path / TRAINING_STATE / "state.json")
    network.load_state_dict(load_file(path / TRAINING_STATE / "weights.safetensors"))
    average.load_state_dict(load_file(path / "unet" / "diffusion_pytorch_model.safetensors"))
    _restore_moments(network, optimizer, load_file(path / TRAINING_STATE / "optimizer.safetensors"))
    progress = Progress(**state["progress"])
    progress.checkpoints = [(int(a), int(b), str(c)) for a, b, c in progress.checkpoints]
    return progress, state["scaler"]


def checkpoint_refs(directory: Path, progress: Progress) -> list[CheckpointRef]:
    """The checkpoints that are still there, for the record."""
    return [
        CheckpointRef(step=step, images_seen=seen, path=f"checkpoints/step-{step}", sha256=digest)
        for step, seen, digest in progress.checkpoints
        if (directory / f"step-{step}").is_dir()
    ]


def _moments(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    return tensors


def _restore_moments(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    parameters = dict(network.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameters[name]
        place = value.to(parameter.device)  # a fused Adam counts steps on the device too
        if value.shape == parameter.shape:  # keep the parameter's memory format
            place = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][key] = place


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
