"""Budgets of the demo: how much work it does."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelops.base.errors import ModelopsError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One size of the demo.

    Attributes:
        config: training config among the trainer's own; its resolution is the corpus's.
        pictures: number of emoji (whole groups of variants); None takes all.
        prompts: held-out captions that are evaluated; None takes all of the test split.
        steps: sampling steps for evaluations; None takes the checkpoint's own default.
        training_seconds: the trainer's time limit; None takes the config's own.
        resamples: bootstrap resamples behind each interval.
        policy: the gate's policy among `policies/`.
        calibration_prompts: training captions whose trajectories calibrate the INT8 export.
        search_seconds: for finding the set of INT8 layers.
        allow_slow_int8: keep INT8 that is not faster than fp32 and record the waiver; a network of
            the smoke test is too small to gain for sure.
        planned: measure the machine first and let a plan name the config, the policy, the sampling
            steps and the training seconds.
    """

    config: str
    pictures: int | None
    prompts: int | None
    steps: int | None
    resamples: int
    policy: str
    calibration_prompts: int
    search_seconds: float
    allow_slow_int8: bool
    planned: bool = False
    training_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


BUDGETS = {
    "smoke": Budget(
        config="openmoji_smoke.yaml", pictures=300, prompts=24, steps=6, resamples=100,
        policy="smoke.yaml", calibration_prompts=8, search_seconds=8.0, allow_slow_int8=True,
    ),
    "default": Budget(
        config="openmoji_pilot.yaml", pictures=None, prompts=None, steps=None, resamples=300,
        policy="default.yaml", calibration_prompts=32, search_seconds=30.0, allow_slow_int8=False,
        planned=True,
    ),
}  # fmt: skip


def budget_named(name: str) -> Budget:
    """Return the budget of that name.

    Raises:
        UsageError: there is no such budget.
    """
    if name not in BUDGETS:
        raise UsageError(f"no budget {name!r}", hint=f"one of: {', '.join(BUDGETS)}")
    return BUDGETS[name]


def trainer_config(name: str) -> Path:
    """A config that the trainer carries, found without importing the trainer.

    Raises:
        ModelopsError: the installation lacks it.
    """
    spec = importlib.util.find_spec("modelops.trainer")
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / "configs" / name
        if path.is_file():
            return path
    raise ModelopsError(f"{name}: not among the trainer's configs", hint="reinstall modelops")


def policy_file(name: str) -> Path:
    """A policy that the demo carries."""
    return Path(__file__).parent / "policies" / name
