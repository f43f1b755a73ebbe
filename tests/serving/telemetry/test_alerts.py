"""The alert rules, tested by promtool: each fires on its fault, and no other with it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelops.serving.deploy.scaffold import ScaffoldOptions, render, write_scaffold

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool here (Debian: prometheus)"
)


def promtool(*arguments: str) -> tuple[int, str]:
    assert PROMTOOL
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def alerts(rules: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in rules["groups"] for rule in group["rules"]]


def cases(tests: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, alerts that must fire) of each case of the rule tests."""
    found = []
    for test in tests["tests"]:
        for check in test.get("promql_expr_test", []):
            fires = [re.findall(r'"(\w+)"', sample["labels"])[0] for sample in check["exp_samples"]]
            found.append((test["name"], fires))
    return found


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    rules = alerts(yaml.safe_load(render()["prometheus/modelops.rules.yaml"]))
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) >= 14
    for rule in rules:
        assert re.fullmatch(r"Modelops([A-Z][a-z]+)+", rule["alert"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "runbook"}
        for text in rule["annotations"].values():
            assert "\n" not in text and len(text) > 20 and text.endswith(".")


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    files = render()
    names = [
        rule["alert"] for rule in alerts(yaml.safe_load(files["prometheus/modelops.rules.yaml"]))
    ]
    table = cases(yaml.safe_load(files["prometheus/modelops.rules.test.yaml"]))
    fired = [alert for _, fires in table for alert in fires]
    assert set(fired) == set(names)
    assert all(len(fires) <= 1 for _, fires in table)
    assert sum(not fires for _, fires in table) >= len(names)


@needs_promtool
@pytest.mark.parametrize("options", [ScaffoldOptions(), ScaffoldOptions(time_scale=1 / 60)])
def test_rules_are_valid(tmp_path: Path, options: ScaffoldOptions) -> None:
    write_scaffold(tmp_path, options)
    code, output = promtool("check", "rules", str(tmp_path / "prometheus" / "modelops.rules.yaml"))
    assert code == 0 and "rules found" in output, output


@needs_promtool
@pytest.mark.parametrize("gpus", [0, 2])
def test_rules_pass_their_tests(tmp_path: Path, gpus: int) -> None:
    """With two GPUs there are two workers, whose series have a label of their own."""
    write_scaffold(tmp_path, ScaffoldOptions(latency_budget_s=7, gpus=gpus))
    tests = (tmp_path / "prometheus" / "modelops.rules.test.yaml").read_text()
    assert ('worker="2"' in tests) == (gpus == 2)
    code, output = promtool(
        "test", "rules", str(tmp_path / "prometheus" / "modelops.rules.test.yaml")
    )
    assert code == 0, output


@needs_promtool
@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_the_rule_tests_notice_rules_that_do_nothing_or_everything(
    tmp_path: Path, always: bool
) -> None:
    """Every case that fires fails with dead rules, and every case fails with rules always on."""
    files = render()
    rules = yaml.safe_load(files["prometheus/modelops.rules.yaml"])
    for rule in alerts(rules):
        rule["expr"] = "vector(1)" if always else "vector(1) > 2"
        rule.pop("for", None)
    tests = files["prometheus/modelops.rules.test.yaml"]
    (tmp_path / "modelops.rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "modelops.rules.test.yaml").write_text(tests)
    code, output = promtool("test", "rules", str(tmp_path / "modelops.rules.test.yaml"))
    table = cases(yaml.safe_load(tests))
    expected = len(table) if always else sum(bool(fires) for _, fires in table)
    assert code == 1 and output.count("expr: ") == expected
