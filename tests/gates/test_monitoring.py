"""The monitoring section of a policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelops.base.errors import ConfigError
from modelops.gates.policy import load_policy
from modelops.monitoring.policy import MonitoringPolicy, read_monitoring
from modelops.training.new_project import template

POLICY = """
version: 1
subject: a
evidence: {a: a.json}
criteria: [{name: x, evidence: a, field: verdict, equals: pass}]
"""


def policy(tmp_path: Path, section: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY + section)
    return path


def test_gate_and_monitor_read_the_same_section(tmp_path: Path) -> None:
    path = policy(tmp_path, "monitoring: {evaluate_every_days: 14, windows: 2, alpha: 1e-2}\n")
    read = load_policy(path).monitoring
    assert read is not None and read == read_monitoring(path)
    assert read.window_alpha == 0.005 and read.window_days == 7


def test_without_a_section_there_is_none(tmp_path: Path) -> None:
    path = policy(tmp_path, "")
    assert load_policy(path).monitoring is None and read_monitoring(path) is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("monitoring: {alpa: 0.1}", "did you mean 'alpha'"),
        ("monitoring: {margins: {feature_means: 1}}", "did you mean 'feature_mean'"),
        ("monitoring: {alpha: 0}", "monitoring.alpha"),
        ("monitoring: {windows: 0}", "monitoring.windows"),
        ("monitoring: {min_n: 5}", "monitoring.min_n"),
        ("monitoring: {evaluate_every_days: .nan}", "monitoring.evaluate_every_days"),
        ("monitoring: {margins: {script_mix: -1}}", "monitoring.margins.script_mix"),
        ("monitoring: 3", "monitoring"),
    ],
)
def test_a_wrong_section_is_one_line(tmp_path: Path, section: str, words: str) -> None:
    path = policy(tmp_path, section)
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    assert words in str(caught.value)
    with pytest.raises(ConfigError):
        read_monitoring(path)


def test_the_policy_of_a_new_project_has_one(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(template("policy.yaml"))
    read = load_policy(path).monitoring
    assert read is not None and read == MonitoringPolicy(evaluate_every_days=28)
