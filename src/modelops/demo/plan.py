"""Plan of the demo from the speed of a machine: its steps, and how long each stage should take.

It is a pure function of the rates. The whole has a time; training takes what the other steps leave
of it. Their costs were measured on two quiet cores with AVX-512 and bf16, and are scaled by how
much slower this machine extracts features. bench/README.md describes how the recipes were found.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from modelops.base.errors import UsageError
from modelops.demo.budgets import Budget
from modelops.demo.machine import BUSY, Rates

PICTURES, PROMPTS, GRID = 3953, 395, 64  # of the corpus, of its test split, of the fixed grid
CALIBRATION = 256  # altered images with which deduplication judges its threshold
# Training is not forward and backward alone: optimizer, averaging, validation, samples.
TRAINING_SHARE = 0.75
# Seconds that the demo may take: twenty minutes with bf16 instructions, else forty-five. A plan
# leaves a twentieth of them for what it does not foresee.
NATIVE_S, OTHERWISE_S, FORESEEN = 1200.0, 2700.0, 0.95
SETUP_S = 25.0  # of a training process, before its time limit begins
REFERENCE_FEATURES = 75.0  # images per second through Lite0 of the machine the costs are from

# Seconds there of what grows with neither images nor steps.
FIXED_S = {
    "corpus": 5, "dedup": 4, "split": 2, "shards": 3, "loader": 1, "lit": 16,
    "evaluation": 25, "grid": 3, "onnx": 18, "int8": 55, "cards": 2, "gate": 1,
    "release": 17, "serve": 36,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to train and evaluate the pilot.

    Attributes:
        config: among the trainer's own.
        policy: among the demo's own.
        wanted: images seen after which more training gains little.
        needed: images seen below which its policy should not be expected to pass.
        steps: sampler steps, the same as the config's.
    """

    config: str
    policy: str
    wanted: int
    needed: int
    steps: int


FULL = Recipe(
    config="openmoji_pilot.yaml", policy="default.yaml", wanted=80_000, needed=55_000, steps=12
)
SMALL = Recipe(
    config="openmoji_small.yaml", policy="default.yaml", wanted=100_000, needed=60_000, steps=12
)
RECIPES = (FULL, SMALL)  # the first that a machine can do in its time is taken, or else the last
CONFIGS = tuple(recipe.config for recipe in RECIPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Plan of the demo for one machine.

    Attributes:
        config, policy: of the recipe.
        training_seconds: the trainer's time limit.
        images: number that it should have seen by then.
        precision: the one expected to be the fastest; the trainer measures again.
        steps: sampler steps of evaluations and of the checkpoint's own default.
        stages: (name of the chain's step, seconds) in order.
        rates: of the machine, as measured.
        reason: one sentence for a person.
    """

    config: str
    policy: str
    training_seconds: float
    images: int
    precision: str
    steps: int
    stages: tuple[tuple[str, float], ...]
    rates: Rates
    reason: str

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(seconds for _, seconds in self.stages)

    def apply(self, budget: Budget) -> Budget:
        """The budget with what this plan says in its place."""
        return replace(
            budget, config=self.config, policy=self.policy, steps=self.steps,
            training_seconds=self.training_seconds,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `.modelops/demo.json`."""
        return {
            **asdict(self), "rates": self.rates.as_dict(), "stages": dict(self.stages),
            "seconds": round(self.seconds),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan that `as_dict` gave.

        Raises:
            UsageError: it is not whole.
        """
        try:
            known = {name: values[name] for name in cls.__dataclass_fields__}
            known["stages"] = tuple(values["stages"].items())
            known["rates"] = Rates.from_dict(values["rates"])
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"not a plan of the demo: {error}") from error


def make_plan(rates: Rates) -> Plan:
    """The plan for a machine: the full recipe where enough images are seen in the demo's time, else
    the small one, for as long as that needs."""
    recipe = next((each for each in RECIPES if _left(each, rates) >= each.needed), RECIPES[-1])
    per_second = _per_second(recipe, rates)
    images = max(recipe.needed, min(recipe.wanted, _left(recipe, rates)))
    seconds = float(math.ceil(images / per_second / 10) * 10)
    network = rates.networks[recipe.config]
    precision = "bf16" if network.bf16 > network.fp32 else "fp32"
    images = int(per_second * seconds)
    size = "full" if recipe is FULL else "small"
    reason = (
        f"{rates.cores} cores ({rates.capability}) train the {size} network at about "
        f"{per_second:.0f} images/s in {precision}: {images:,} images in "
        f"{seconds / 60:.0f} minutes"
    )
    if rates.others > BUSY:
        reason += (
            f"; other processes use {rates.others:.0%} of the cores, and when they have ended, "
            "a demo in a new directory is planned anew and takes less"
        )
    return Plan(
        config=recipe.config, policy=recipe.policy, training_seconds=seconds, images=images,
        precision=precision, steps=recipe.steps, rates=rates, reason=reason,
        stages=tuple(_stages(recipe, rates, seconds).items()),
    )  # fmt: skip


def _per_second(recipe: Recipe, rates: Rates) -> float:
    """Images per second of training, all told."""
    return rates.networks[recipe.config].training * TRAINING_SHARE


def _left(recipe: Recipe, rates: Rates) -> float:
    """Images that training can see in the time that the other steps leave; negative if none."""
    network = rates.networks[recipe.config]
    whole = NATIVE_S if network.bf16 > network.fp32 else OTHERWISE_S
    others = sum(_stages(recipe, rates, training_seconds=0).values())
    return (FORESEEN * whole - others) * _per_second(recipe, rates)


def _stages(recipe: Recipe, rates: Rates, training_seconds: float) -> dict[str, float]:
    """Seconds of each step of the chain."""
    slower = REFERENCE_FEATURES / rates.features
    fixed = {name: seconds * slower for name, seconds in FIXED_S.items()}
    a_row = 1 / rates.networks[recipe.config].forward
    evaluation = (
        PROMPTS * recipe.steps * 2 * a_row + PROMPTS / rates.features + fixed.pop("evaluation")
    )
    more = {
        "dedup": (PICTURES + CALIBRATION) / rates.features,
        "train": training_seconds + SETUP_S * slower + PICTURES / rates.texts,
        "lit": PICTURES / rates.texts,
        "early": evaluation,
        "final": evaluation,
        "grid": GRID * recipe.steps * 2 * a_row,
        "evaluate-released": evaluation,
    }
    order = (
        "corpus", "dedup", "split", "shards", "loader", "train", "lit", "early", "final", "grid",
        "onnx", "int8", "evaluate-released", "cards", "gate", "release", "serve",
    )  # fmt: skip
    return {name: round(fixed.get(name, 0.0) + more.get(name, 0.0), 1) for name in order}
