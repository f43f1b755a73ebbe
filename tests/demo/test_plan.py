from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.base.errors import UsageError
from modelops.demo.budgets import budget_named, policy_file, trainer_config
from modelops.demo.chain import demo_chain
from modelops.demo.machine import NetworkRates, Rates
from modelops.demo.plan import CONFIGS, RECIPES, Plan, make_plan
from modelops.demo.project import CONFIG, SETTINGS, config_text, is_made, kept_plan, prepare
from modelops.gates.policy import load_policy
from modelops.training.config import load_config

FULL, SMALL = CONFIGS


def rates(fp32: float, bf16: float, forward: float, features: float, texts: float) -> Rates:
    """Rates where the small network is 2.6 times as fast as the full one, as measured."""
    networks = {
        FULL: NetworkRates(fp32=fp32, bf16=bf16, forward=forward),
        SMALL: NetworkRates(fp32=2.6 * fp32, bf16=2.6 * bf16, forward=2.6 * forward),
    }
    return Rates(networks=networks, features=features, texts=texts, cores=2, capability="AVX2")


NATIVE = rates(110, 220, 300, 75, 450)  # AVX-512 with bf16 instructions
AVX2 = rates(38, 0, 107, 28, 260)
SLOWER = rates(9.5, 0, 27, 7, 65)


def test_a_machine_with_bf16_gets_the_full_recipe_and_ends_within_20_minutes() -> None:
    plan = make_plan(NATIVE)
    assert (plan.config, plan.policy, plan.precision) == (FULL, "default.yaml", "bf16")
    assert plan.images >= RECIPES[0].wanted
    assert plan.seconds < 20 * 60


def test_a_machine_with_avx2_gets_the_small_recipe_and_ends_within_45_minutes() -> None:
    plan = make_plan(AVX2)
    assert (plan.config, plan.precision) == (SMALL, "fp32")
    assert plan.images >= RECIPES[-1].needed * 0.99
    assert plan.seconds < 45 * 60


def test_a_machine_four_times_slower_trains_as_long_as_the_recipe_needs_and_says_so() -> None:
    plan = make_plan(SLOWER)
    assert plan.config == SMALL
    assert plan.images >= RECIPES[-1].needed * 0.99
    assert plan.seconds > 60 * 60
    assert f"{plan.training_seconds / 60:.0f} minutes" in plan.reason


def test_a_machine_with_bf16_in_a_slow_hour_gets_the_small_recipe_and_keeps_to_20_minutes() -> None:
    plan = make_plan(rates(85, 100, 238, 35, 450))
    assert (plan.config, plan.precision) == (SMALL, "bf16")
    assert plan.images >= RECIPES[-1].needed
    assert plan.seconds < 20 * 60


def test_a_machine_without_bf16_that_is_fast_trains_the_full_network_for_longer() -> None:
    plan = make_plan(rates(110, 0, 300, 75, 450))
    assert (plan.config, plan.precision) == (FULL, "fp32")
    assert plan.training_seconds > make_plan(NATIVE).training_seconds
    assert plan.seconds < 45 * 60


def test_faster_machines_never_take_longer() -> None:
    seconds = [
        make_plan(rates(8 * k, 0, 22 * k, 6 * k, 55 * k)).seconds for k in (1, 2, 4, 8, 16, 32)
    ]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("found", [NATIVE, AVX2, SLOWER])
def test_a_plan_names_every_step_of_the_chain_and_what_its_config_says(
    found: Rates, tmp_path: Path
) -> None:
    plan = make_plan(found)
    budget = plan.apply(budget_named("default"))
    chain = demo_chain(tmp_path, budget)
    assert [name for name, _ in plan.stages] == [step.name for step in chain.steps]
    assert all(seconds > 0 for _, seconds in plan.stages)
    assert load_config(trainer_config(plan.config)).training.sample_steps == plan.steps
    assert load_policy(policy_file(plan.policy)).subject == "artifact"
    (tmp_path / "config.yaml").write_text(config_text(budget))
    training = load_config(tmp_path / "config.yaml").training
    assert training.time_limit_seconds == plan.training_seconds
    assert training.total_steps * training.microbatch >= plan.images


def test_a_plan_is_written_down_and_kept(tmp_path: Path) -> None:
    plan = make_plan(AVX2)
    root = tmp_path / "demo"
    assert kept_plan(root, "default") is None
    prepare(root, "default", plan.apply(budget_named("default")), plan)
    assert is_made(root, "default")
    kept = kept_plan(root, "default")
    assert kept is not None
    assert kept.as_dict() == plan.as_dict()
    assert load_config(root / CONFIG).training.time_limit_seconds == plan.training_seconds
    assert json.loads((root / SETTINGS).read_text())["plan"]["rates"]["features"] == 28
    with pytest.raises(UsageError, match="made with --budget default, not smoke"):
        kept_plan(root, "smoke")


def test_a_demo_from_before_there_were_plans_goes_on_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    prepare(root, "default", budget_named("default"))
    assert is_made(root, "default")
    assert kept_plan(root, "default") is None


def test_a_damaged_plan_is_one_line() -> None:
    values = make_plan(AVX2).as_dict()
    with pytest.raises(UsageError, match="not a plan of the demo"):
        Plan.from_dict({name: values[name] for name in values if name != "policy"})
    with pytest.raises(UsageError, match="not the rates of a machine"):
        Plan.from_dict({**values, "rates": {"networks": {}}})
