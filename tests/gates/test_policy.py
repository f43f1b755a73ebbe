"""policy.yaml: what is refused, and how the error leads out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from modelops.base.errors import ConfigError, UsageError
from modelops.gates.policy import RelativeBound, load_policy
from modelops.training.new_project import template

GOOD = {
    "version": 1,
    "subject": "final",
    "evidence": {"final": "evaluations/final.json", "early": "evaluations/early.json"},
    "baselines": {"early": "run"},
    "criteria": [
        {"name": "learned", "evidence": "final", "metric": "fd",
         "at_most": {"ratio": 0.5, "of": "early"}}
    ],
}  # fmt: skip


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**GOOD, **changes}), "utf-8")
    return path


def criterion(**changes: object) -> dict[str, object]:
    base = {"name": "c", "evidence": "final", "metric": "fd", "at_most": 1}
    return {k: v for k, v in {**base, **changes}.items() if v is not None}


def test_the_packaged_policy_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(template("policy.yaml"), "utf-8")
    policy = load_policy(path)
    bound = next(c.bound for c in policy.criteria if c.name == "learned")
    assert bound == RelativeBound(of="early", ratio=0.5)


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    text = yaml.safe_dump({**GOOD, "criteria": [criterion()]}).replace(
        "at_most: 1", "at_most: 1e-4"
    )
    path.write_text(text, "utf-8")
    assert load_policy(path).criteria[0].bound == 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critera": []}, "did you mean 'criteria'"),
        ({"criteria": [criterion(at_mots=1)]}, "did you mean 'at_most'"),
        ({"criteria": [criterion(at_most={"ratoi": 0.5, "of": "early"})]}, "did you mean 'ratio'"),
        ({"criteria": [criterion(evidence="finale")]}, "did you mean 'final'"),
        ({"criteria": [criterion(at_most={"ratio": 0.5, "of": "erly"})]}, "did you mean 'early'"),
        ({"criteria": []}, "criteria"),
        ({"criteria": [criterion(), criterion()]}, "two criteria are named 'c'"),
        ({"criteria": [criterion(at_most=True)]}, "not true or false"),
        ({"criteria": [criterion(at_most=float("nan"))]}, "finite"),
        ({"criteria": [criterion(at_most="many")]}, "should be a number, not 'many'"),
        ({"criteria": [criterion(at_least=1)]}, "exactly one of at_most"),
        ({"criteria": [criterion(metric="slices.worst.fd")]}, "slices.COLUMN.VALUE.METRIC"),
        ({"criteria": [criterion(at_most=None)]}, "exactly one of at_most"),
        ({"criteria": [criterion(field="x")]}, "exactly one of metric, field and parity"),
        ({"criteria": [criterion(at_most={"ratio": 1, "plus": 1, "of": "early"})]}, "either ratio"),
        ({"criteria": [criterion(at_most={"ratio": -1, "of": "early"})]}, "greater than 0"),
        ({"criteria": [criterion(evidence="early")]}, "which is not what is released"),
        ({"criteria": [criterion(metric=None, parity=[], at_most=None)]}, "at least one parity"),
        ({"subject": "nothing"}, "subject: no evidence named 'nothing'"),
        ({"evidence": {"final": "../final.json"}}, "below the project's root"),
        ({"evidence": {"final": "/etc/passwd"}}, "below the project's root"),
        ({"version": 2}, "version"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_policy(write(tmp_path / "policy.yaml", **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "policy.yaml" in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "criteria: []\n", "utf-8")
    with pytest.raises(ConfigError, match=r"line 1[0-9]: key 'criteria' is there twice"):
        load_policy(path)


@pytest.mark.parametrize("text", ["", "- a list", "{", "a: !!python/object/apply:os.system [id]"])
def test_what_is_no_policy_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"policy\.yaml"):
        load_policy(path)


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        load_policy(tmp_path / "nowhere.yaml")
