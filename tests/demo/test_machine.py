from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelops.cli.main import main
from modelops.demo import machine
from modelops.demo.machine import Rates, seconds_of
from modelops.demo.plan import CONFIGS


def test_this_machine_is_measured_and_the_plan_shown_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "TRIES", 1)  # other tests use the cores
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


def test_work_of_other_processes_is_seen_and_the_least_disturbed_measurement_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = [0.8, 0.3, 0.5]

    def measure(configs: tuple[str, ...], on_progress: object) -> Rates:
        return Rates(
            networks={}, features=1, texts=1, cores=2, capability="AVX2", others=shares.pop(0)
        )

    monkeypatch.setattr(machine, "_measured_once", measure)
    monkeypatch.setattr(machine, "PAUSE_S", 0.0)
    assert machine.measure_rates(()).others == 0.3
    assert shares == []
    shares = [0.05, 0.0]
    assert machine.measure_rates(()).others == 0.05
    assert shares == [0.0]  # quiet enough: not measured again


def test_a_busy_neighbour_is_counted() -> None:
    if machine._busy_seconds() is None:
        pytest.skip("this system does not say")
    code = "import time; end = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", code])
    try:
        began = time.monotonic(), machine._busy_seconds(), time.process_time()
        time.sleep(3)
        assert machine._share_of_others(*began) > 0.5 / machine.usable_cores()
    finally:
        neighbour.kill()
        neighbour.wait()
