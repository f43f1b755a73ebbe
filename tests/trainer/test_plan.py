"""The plan of a run and its clock, on machines that a test makes up: no second really passes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pytest

from modelops.trainer.checkpoint import Progress
from modelops.trainer.clock import Clock
from modelops.trainer.plan import (
    Plan,
    Rhythm,
    early_step,
    lr_factor,
    make_rhythm,
    new_plan,
    replanned,
    seconds_left,
    steps_in_time,
)
from modelops.training.config import TrainConfig


def _config(log_every: int = 50, **training: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"resolution": 16, "patch_size": 2, "channels": 32, "multipliers": [1]},
            "data": {"manifest": "unused"},
            "training": training,
            "logging": {"log_every_steps": log_every},
        }
    )


def test_learning_rate_warms_up_stays_and_decays() -> None:
    config = _config(lr_schedule="linear_decay", lr_decay_fraction=0.3)
    plan = new_plan(1000, config)
    factors = [lr_factor(step, plan, config.training) for step in range(1000)]
    assert plan.warmup == 50
    assert factors[0] == pytest.approx(1 / 51)
    assert factors[50] == factors[699] == 1.0
    assert factors[850] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(1 / 300)
    assert all(factor > 0 for factor in factors)
    config = _config(lr_schedule="cosine")
    factors = [lr_factor(step, new_plan(1000, config), config.training) for step in range(1000)]
    assert factors[50] == 1.0
    assert factors[525] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-5


@pytest.mark.parametrize("schedule", ["linear_decay", "cosine"])
@pytest.mark.parametrize("step", [100, 600, 750, 900])
@pytest.mark.parametrize("total", [905, 950, 1000, 1300])
def test_a_corrected_learning_rate_does_not_jump_and_ends_at_zero(
    schedule: str, step: int, total: int
) -> None:
    config = _config(lr_schedule=schedule, lr_decay_fraction=0.3)
    old = new_plan(1000, config)
    new = replanned(old, step, total, config)
    before, after = (lr_factor(step, plan, config.training) for plan in (old, new))
    assert after == pytest.approx(before, abs=1e-12)
    factors = [lr_factor(at, new, config.training) for at in range(step, total)]
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] <= 1 / min(total - step, 0.3 * total) + 1e-9
    # What a checkpoint keeps is the whole plan, to the last bit.
    progress = Progress(step=step)
    progress.plan = new
    again = Progress(**json.loads(json.dumps(asdict(progress)))).plan
    assert again == new


def test_the_decay_keeps_its_share_while_it_has_not_begun() -> None:
    config = _config(lr_decay_fraction=0.3, warmup_steps=0)
    plan = replanned(new_plan(1000, config), 300, 600, config)
    assert lr_factor(419, plan, config.training) == 1.0
    assert lr_factor(510, plan, config.training) == pytest.approx(0.5)
    late = replanned(new_plan(1000, config), 500, 600, config)  # would have begun: begins now
    assert lr_factor(500, late, config.training) == pytest.approx(1.0)
    assert lr_factor(550, late, config.training) == pytest.approx(0.5)
    assert replanned(plan, 0, 50, config) == Plan(50, 0)


def test_counts_are_what_a_loop_over_the_steps_meets() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        numbers = [int(number) for number in random.integers(1, 30, 6)]
        rhythm = Rhythm(
            total=numbers[0] * 2, rows=1, validations=numbers[1], checkpoints=numbers[2],
            grids=[None, 0, numbers[3]][numbers[3] % 3], early_step=numbers[4] % 5 * 3,
            early_checks=numbers[5] % 3 * 4,
        )  # fmt: skip
        at = int(random.integers(0, rhythm.total))
        rest = range(at + 1, rhythm.total + 1)
        assert rhythm.counts(at) == {
            "step": len(rest),
            "validation": sum(map(rhythm.validates, rest)),
            "checkpoint": sum(map(rhythm.saves, rest)),
            "grid": sum(map(rhythm.draws, rest)),
            "early_check": sum(
                bool(rhythm.early_checks) and step % rhythm.early_checks == 0 for step in rest
            ),
        }
    assert set(rhythm.counts(rhythm.total).values()) == {0}


@pytest.mark.parametrize(
    ("total", "asked", "rows"),
    [(12, 20, 12), (20, 100, 20), (60, 100, 60), (400, 100, 40), (2000, 20, 100), (9000, 100, 90)],
)  # fmt: skip
def test_short_runs_write_rows_often_enough(total: int, asked: int, rows: int) -> None:
    rhythm = make_rhythm(_config(asked), total, early_step=0, costs={}, limit=None)
    assert sum(map(rhythm.writes, range(1, total + 1))) == rows


def test_a_plan_leaves_room_for_all_that_is_not_a_step() -> None:
    config = _config(
        total_steps=10_000, validate_every_steps=10, save_every_steps=50, early_checkpoint=None
    )
    costs = {"step": 1.0, "validation": 2.0, "checkpoint": 3.0, "grid": 1.0}
    total = steps_in_time(config, 0, seconds=540, costs=costs, limit=540)
    rhythm = make_rhythm(config, total, early_step=0, costs=costs, limit=540)
    assert 0.96 * 540 < seconds_left(rhythm, 0, costs) < 540
    assert total == rhythm.counts(0)["step"] < 540 * 0.98 / 1.2
    assert steps_in_time(config, 0, seconds=1e9, costs=costs, limit=1e9) == 10_000
    assert steps_in_time(config, 7, seconds=0, costs=costs, limit=540) == 7
    assert steps_in_time(config, 0, seconds=540, costs={"step": 1e4}, limit=540) == 1


def test_what_nobody_asked_for_gives_way_first() -> None:
    costs = {"step": 4.0, "validation": 8.0, "checkpoint": 1.0, "grid": 20.0}

    def rhythm(limit: float | None, **training: Any) -> Rhythm:
        config = _config(save_every_steps=50, **training)
        return make_rhythm(config, 120, early_step=6, costs=costs, limit=limit)

    assert (rhythm(None).grids, rhythm(None).validations) == (0, 6)
    assert (rhythm(1000).grids, rhythm(1000).validations) == (0, 20)
    assert rhythm(500).grids == 120  # the last one only
    assert rhythm(150).grids is None
    asked = rhythm(150, sample_every_steps=10, validate_every_steps=5)
    assert (asked.grids, asked.validations) == (10, 5)


def test_the_early_checkpoint_moves_with_the_plan_until_it_is_made() -> None:
    config = _config(early_checkpoint=0.05)
    assert early_step(config, 1000) == 50
    assert early_step(config, 15) == 1
    assert early_step(config, 40, step=10, before=50) == 11
    assert early_step(config, 10, step=10, before=50) == 10
    assert early_step(config, 400, step=60, before=50) == 50
    assert early_step(_config(early_checkpoint=None), 1000, step=3) == 0


Speed = Callable[[float], float]


@dataclass
class Machine:
    """A run with a time limit on a machine whose clock is a number.

    Attributes:
        step: second of the run -> seconds of the next step.
        guess: seconds of a step as measured before the first, relative to the truth.
        others: seconds of a validation, a grid, a checkpoint, in first steps.
        noise: relative standard deviation of everything.
    """

    config: TrainConfig
    step: Speed
    guess: float = 1.0
    others: tuple[float, float, float] = (1.3, 4.0, 0.5)
    noise: float = 0.0
    now: float = 0.0
    rows: int = 0
    validations: int = 0
    plans: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    _random: Any = field(default_factory=lambda: np.random.default_rng(0))

    def _spend(self, seconds: float) -> None:
        self.now += seconds * max(0.2, 1 + self.noise * float(self._random.normal()))

    def train(self) -> float:
        """Run to the end; returns the seconds it took."""
        config, first = self.config, self.step(0.0)
        clock = Clock(config, now=lambda: self.now)
        seconds = dict(zip(("validation", "grid", "checkpoint"), self.others, strict=True))
        clock.costs |= {kind: times * first * self.guess for kind, times in seconds.items()}
        clock.costs["step"] = first * self.guess
        self._spend(2 * first)  # measuring the precision
        assert clock.limit is not None
        if clock.costs["validation"] <= 0.1 * clock.limit:
            with clock.work("validation"):
                self._spend(seconds["validation"] * first)
        progress = Progress()
        rhythm: Rhythm | None = None

        def take(total: int) -> Rhythm:
            self.plans.append(total)
            progress.plan = replanned(progress.plan, progress.step, total, config)
            progress.early_step = early_step(
                config, total, step=progress.step, before=progress.early_step
            )
            return clock.rhythm(total, progress.early_step)

        rhythm = take(clock.total_steps(0, None))
        clock.start_steps()
        while progress.step < progress.total_steps:
            self.factors.append(lr_factor(progress.step, progress.plan, config.training))
            self._spend(self.step(self.now))
            progress.step += 1
            clock.end_step()
            total = clock.total_steps(progress.step, rhythm)
            if total != progress.total_steps:
                rhythm = take(total)
            self.rows += rhythm.writes(progress.step)
            for kind, due in (
                ("validation", rhythm.validates), ("grid", rhythm.draws),
                ("checkpoint", rhythm.saves),
            ):  # fmt: skip
                if due(progress.step):
                    self.validations += kind == "validation"
                    with clock.work(kind):
                        self._spend(seconds[kind] * self.step(self.now))
        return clock.seconds


def _constant(seconds: float) -> Speed:
    return lambda now: seconds


SPEEDS: dict[str, Speed] = {
    "steady": _constant(0.5),
    "slow": _constant(4.0),
    "two minutes slower at half time": lambda now: 1.5 if 270 < now < 390 else 0.5,
    "slower for good at half time": lambda now: 1.5 if now > 270 else 0.5,
    "slower for good while the rate decays": lambda now: 1.5 if now > 450 else 0.5,
    "faster for good while the rate decays": lambda now: 0.25 if now > 450 else 0.5,
    "four times faster soon": lambda now: 0.5 if now > 30 else 2.0,
    "worse and worse": lambda now: 0.3 + now / 540,
    "better and better": lambda now: 1.5 - now / 540,
    "in waves": lambda now: 0.6 + 0.3 * math.sin(now / 20),
    "a stall of half a minute in the end": lambda now: 27.0 if 480 < now < 482 else 0.5,
}


@pytest.mark.parametrize("schedule", ["linear_decay", "cosine"])
@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS.keys())
@pytest.mark.parametrize(("guess", "noise"), [(1.0, 0.0), (0.5, 0.2), (2.0, 0.2)])
def test_a_limit_holds_within_a_tenth_and_the_rate_still_ends_near_zero(
    schedule: str, speed: Speed, guess: float, noise: float
) -> None:
    config = _config(
        total_steps=100_000, time_limit_seconds=540, save_every_steps=1000, lr_schedule=schedule
    )
    machine = Machine(config, speed, guess=guess, noise=noise)
    assert 0.9 * 540 <= machine.train() <= 1.1 * 540
    assert machine.factors[-1] < 0.05
    jumps = np.abs(np.diff(machine.factors))
    assert jumps[len(jumps) // 5 :].max() < 0.3
    assert machine.rows >= min(20, len(machine.factors))
    assert machine.validations >= 2


@pytest.mark.parametrize("seconds", [1.0, 3.0, 7.0, 11.0, 20.0])
def test_a_limit_of_few_steps_holds_too(seconds: float) -> None:
    config = _config(total_steps=2000, time_limit_seconds=90, log_every=20)
    machine = Machine(config, _constant(seconds), others=(1.0, 4.0, 0.3))
    used = machine.train()
    assert used <= 1.1 * 90
    assert used >= 0.9 * 90 - seconds / 2  # no better than half a step
    assert machine.rows >= min(20, len(machine.factors))


def test_a_step_longer_than_the_limit_is_made_once() -> None:
    machine = Machine(_config(total_steps=2000, time_limit_seconds=90), _constant(200.0))
    machine.train()
    assert (machine.plans, len(machine.factors)) == ([1], 1)
    assert machine.validations == 1  # the last; not also one before the step


def test_steps_that_fit_are_all_made() -> None:
    machine = Machine(_config(total_steps=100, time_limit_seconds=540), _constant(0.5))
    assert machine.train() < 100
    assert machine.plans == [100]


def test_a_clock_goes_on_where_an_earlier_session_ended() -> None:
    time = [1000.0]
    config = _config(total_steps=2000, time_limit_seconds=100)
    clock = Clock(config, before=60.0, costs={"step": 1.0, "grid": 2.0}, now=lambda: time[0])
    assert clock.seconds == 60.0
    rhythm = clock.rhythm(90, 0)
    assert clock.total_steps(52, rhythm) == 90  # what is left fits
    time[0] += 20
    assert clock.seconds == 80.0
    assert clock.total_steps(52, rhythm) < 75
