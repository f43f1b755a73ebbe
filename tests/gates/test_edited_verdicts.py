"""Verdicts that were edited after the gate wrote them: neither built on nor verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import sha256_file
from modelops.cli.main import main
from modelops.gates.decide import decide
from modelops.records.export import ParityCheck, ReproductionCheck
from modelops.records.release import Criterion, ReleaseRecord
from modelops.releases.build import build_release
from modelops.releases.verify import check_fallback, verify_release
from modelops.training.new_project import init_project
from project_records import write_artifact, write_project


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose packaged policy passes, and its release."""
    root = tmp_path_factory.mktemp("project")
    init_project(root)
    write_project(root)
    decide(root / "policy.yaml", root=root, out_path=root / "verdict.json")
    build(root)
    return root


def build(root: Path) -> ReleaseRecord:
    return build_release(
        root / "release", model_dir=root / "artifacts/pilot/int8", verdict=root / "verdict.json",
        policy=root / "policy.yaml", name="a", version="1",
        records=[root / f"evaluations/{name}.json" for name in ("early", "final")],
    )  # fmt: skip


PARITY, RELATIVE, ABOVE, SAFE, FIELD = (
    "equal to its source", "learned", "follows prompts", "safe", "loss falls",
)  # fmt: skip
WIDE: dict[str, Any] = {"low": 0.0, "high": 900.0}


@pytest.mark.parametrize(("name", "edit"), [
    (PARITY, {"value": "0 of 1"}), (PARITY, {"value": "4 of 9"}), (PARITY, {"value": "0 of 0"}),
    (PARITY, {"value": "all"}), (PARITY, {"value": None}), (PARITY, {"value": 1.0}),
    (PARITY, {"bound": "psnr passed"}), (PARITY, {"metric": "speed"}),
    (RELATIVE, {"value": 300.0, **WIDE}), (RELATIVE, {"value": None}), (RELATIVE, {"value": "20"}),
    (RELATIVE, {"value": 30.0}), (RELATIVE, {"value": 10.0}),  # outside 19.4 to 23.8
    (RELATIVE, {"bound": "≤ 0.5 × early"}), (RELATIVE, {"bound": "≤ 9 × early = 810"}),
    (RELATIVE, {"bound": "≤ 0.5 × early = nan"}), (RELATIVE, {"bound": "≤ 0.5 × late = 45"}),
    (RELATIVE, {"bound": "≤ 1000"}), (RELATIVE, {"bound": "> 0"}), (RELATIVE, {"bound": "good"}),
    (RELATIVE, {"metric": "lit_alignment_gain"}), (RELATIVE, {"evidence": "evaluations/int8.json"}),
    (ABOVE, {"bound": "> 0"}), (ABOVE, {"bound": "> -1 (low end)"}), (ABOVE, {"low": None}),
    (ABOVE, {"low": 0.0}), (ABOVE, {"high": 0.19}), (ABOVE, {"value": "0.2"}),
    (SAFE, {"bound": "≤ 0.5 (high end)"}), (SAFE, {"high": 0.06}), (SAFE, {"value": None}),
    (FIELD, {"value": "up"}), (FIELD, {"value": None}), (FIELD, {"bound": "= up", "value": "up"}),
    (FIELD, {"metric": "status"}),
    (RELATIVE, {"bound": "≤ 0.5 × early = 44"}), (RELATIVE, {"bound": "≤ 0.5 × early = 450"}),
    (RELATIVE, {"value": 20.0}), (RELATIVE, {"low": 1.0}), (ABOVE, {"high": 0.9}),
    (PARITY, {"value": "9 of 9"}), ("int8 is faster", {"value": 2.3}),
])  # fmt: skip
def test_an_edited_criterion_is_found(
    made: Path, tmp_path: Path, name: str, edit: dict[str, Any]
) -> None:
    root = Path(shutil.copytree(made, tmp_path / "p"))
    assert verify_release(root / "release").verdict_answer == "pass"
    data = json.loads((root / "verdict.json").read_text("utf-8"))
    next(line for line in data["criteria"] if line["name"] == name).update(edit)
    (root / "verdict.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(
        ModelopsError, match=r"said to pass|has (another (bound|metric|evidence)|other n)"
    ):
        build(root)
    release, digest = root / "release", sha256_file(root / "verdict.json")
    shutil.copy(root / "verdict.json", release / "verdict.json")
    record = json.loads((release / "release.json").read_text("utf-8"))
    record["verdict_sha256"] = record["inputs"]["verdict"]["sha256"] = digest
    size = (release / "verdict.json").stat().st_size
    record["files"]["verdict.json"] = {"sha256": digest, "bytes": size}
    ReleaseRecord.model_validate(record).sealed().write(release / "release.json")
    with pytest.raises((IntegrityError, UsageError), match=name):
        verify_release(release)
    assert main(["release", "verify", str(release)]) in (1, 2)


@pytest.mark.parametrize(("bound", "value", "passes"), [
    ("≤ 0.5 × early = 154.1", 154.0, True), ("≤ 0.5 × early = 154.1", 154.5, False),
    ("≥ early -0.01 (worst end) = 0.3", 0.4, True), ("≥ early -0.01 (worst end) = 0.3", 0.2, False),
    ("< 1", 1.0, False), ("≤ 1", 1.0, True), ("> 0.333333", 0.3333335, True),
    ("a, b passed", "2 of 2", True), ("a, b passed", "1 of 2", False), ("= True", "True", True),
    ("= 3", "3", True), ("= 3", 3.0, True), ("", 1.0, False), ("≤", 1.0, False),
])  # fmt: skip
def test_a_pass_follows_from_value_and_bound(bound: str, value: float | str, passes: bool) -> None:
    parts = {"name": "x", "evidence": "e", "metric": "m", "reason": "so", "answer": "pass"}
    ends = {"low": value, "high": value} if isinstance(value, float) else {}
    try:
        Criterion.model_validate({**parts, **ends, "bound": bound, "value": value})
    except ValueError:
        assert not passes
    else:
        assert passes


@pytest.mark.parametrize(("measure", "value", "bound", "more"), [
    ("psnr_db", 3.0, 28.0, {}), ("max_scaled_error", 0.5, 0.1, {}), ("ssim", 0.99, 0.9, {"n": 0}),
    ("ssim", 0.99, 0.9, {"passed": False}),
])  # fmt: skip
def test_a_fallback_is_equal_by_its_values(
    tmp_path: Path, measure: Any, value: float, bound: float, more: dict[str, Any]
) -> None:
    write_artifact(tmp_path / "model")
    good = ParityCheck(name="pipeline", measure="ssim", value=0.99, bound=0.9, passed=True, n=4)
    write_artifact(tmp_path / "fb", format="onnx", parity=[good])
    check_fallback(tmp_path / "fb", tmp_path / "model")
    bad = {"name": "images", "passed": True, "n": 4, **more}
    bad = ParityCheck(measure=measure, value=value, bound=bound, **bad)
    write_artifact(tmp_path / "fb", format="onnx", parity=[good, bad])
    with pytest.raises(IntegrityError, match=f"images: {measure} "):
        check_fallback(tmp_path / "fb", tmp_path / "model")


@pytest.mark.parametrize(("edit", "answer"), [
    ({}, "the same numbers"), ({"error": 0.3}, "OTHER NUMBERS"), ({"n": 0}, "OTHER NUMBERS"),
    ({"passed": False}, "OTHER NUMBERS"), ({"fault": "it crashed"}, "it crashed"),
])  # fmt: skip
def test_a_reproduction_is_one_by_its_values(edit: dict[str, Any], answer: str) -> None:
    good = {"processor": "p", "runtime": "r", "precision": "float32", "error": 0.1, "bound": 0.2,
            "passed": True, "n": 4}  # fmt: skip
    check = ReproductionCheck.model_validate({**good, **edit})
    assert (check.answer, check.holds) == (answer, not edit)
