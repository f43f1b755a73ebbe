from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.cli.main import main
from modelops.demo.machine import Rates, seconds_of
from modelops.demo.plan import CONFIGS


def test_this_machine_is_measured_and_the_plan_shown_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", str(tmp_path / "d"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plan"]
    assert list(plan["stages"]) == found["steps"]
    assert plan["config"] in CONFIGS
    rates = Rates.from_dict(plan["rates"])
    assert rates.cores >= 1
    assert min(rates.features, rates.texts) > 0
    for network in rates.networks.values():
        assert min(network.forward, network.fp32) > 0
        assert network.training >= network.fp32
    assert not (tmp_path / "d").exists()


def test_a_call_is_timed_after_one_that_is_not_counted() -> None:
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(0), rounds=3) >= 0
    assert len(calls) == 4
