"""`modelops init`, `gate`, `sign-off` and `card`: what they print and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.cli.main import main
from modelops.records.read import read_record
from modelops.records.train import TrainRecord
from modelops.training.new_project import FILES, template
from project_records import write_project


@pytest.fixture
def root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["init", str(tmp_path)]) == 0
    capsys.readouterr()
    return write_project(tmp_path)


def test_init_writes_once_and_overwrites_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "new"
    assert main(["init", str(project), "--dry-run"]) == 0
    assert not project.exists()
    assert main(["init", str(project), "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert len(json.loads(shown)["written"]) == len(FILES)
    assert main(["init", str(project)]) == 0, "the same files again are no conflict"
    (project / "charter.md").write_text("mine", "utf-8")
    (project / "policy.yaml").unlink()
    assert main(["init", str(project)]) == 2
    assert "charter.md would be overwritten" in capsys.readouterr().err
    assert not (project / "policy.yaml").exists(), "nothing is written when one file is refused"
    assert main(["init", str(project), "--force"]) == 0
    assert (project / "charter.md").read_text("utf-8") == template("charter.md")


def test_init_into_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x", "utf-8")
    assert main(["init", str(tmp_path / "file")]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_the_packaged_config_is_a_config(root: Path) -> None:
    config = pytest.importorskip("modelops.training.config").load_config(root / "pilot_config.yaml")
    assert config.training.lr == 1e-4
    assert config.ema.decay == 0.9999


def test_gate_exit_codes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = str(root / "policy.yaml")
    assert main(["gate", policy]) == 0
    shown = capsys.readouterr().out
    assert "learned" in shown and "21.6 [19.44, 23.76]" in shown
    (root / "data/smoke.json").unlink()
    assert main(["gate", policy]) == 4
    assert "cannot decide: data loads" in capsys.readouterr().err
    train = root / "runs/pilot/train.json"
    read_record(train, TrainRecord).model_copy(update={"loss_trend": "up"}).write(train)
    assert main(["gate", policy]) == 3
    assert "says no: loss falls" in capsys.readouterr().err
    assert json.loads((root / "gate/verdict.json").read_text("utf-8"))["answer"] == "fail"
    assert main(["gate", str(root / "none.yaml")]) == 2


def test_gate_json_is_one_object_also_when_it_says_no(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "data/smoke.json").unlink()
    out = root / "elsewhere/verdict.json"
    assert main(["gate", str(root / "policy.yaml"), "--out", str(out), "--json"]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert answer["answer"] == "undecided"
    assert out.is_file()
    assert {"name", "bound", "value", "answer", "reason"} <= set(answer["criteria"][0])


def test_sign_off_and_its_lapse(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    charter = str(root / "charter.md")
    assert main(["sign-off", charter, "--check"]) == 1
    assert main(["sign-off", charter]) == 2
    assert main(["sign-off", charter, "--name", "Ada", "--role", "product owner"]) == 0
    assert main(["sign-off", charter, "--check"]) == 0
    (root / "charter.md").write_text("other", "utf-8")
    capsys.readouterr()
    assert main(["sign-off", charter, "--check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["sign_offs"][0]["state"] == "lapsed"


def test_card_model_and_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = root / "cards/model_card.md"
    arguments = [
        "card", "model", "--train", str(root / "runs/pilot/train.json"),
        "--evaluation", f"final={root / 'evaluations/final.json'}",
        "--picture", f"Loss curve={root / 'runs/pilot/loss.png'}", "--out", str(card),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert main(["card", "check", str(root / "cards")]) == 0
    card.write_text(card.read_text("utf-8").replace("**21.6**", "**1.6**"), "utf-8")
    capsys.readouterr()
    assert main(["card", "check", str(card)]) == 1
    assert "1.6" in capsys.readouterr().out
    assert main(["card", "check", str(card), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "failed"


@pytest.mark.parametrize("pair", ["final", "=x.json", "final="])
def test_a_pair_that_is_none_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], pair: str
) -> None:
    train = str(root / "runs/pilot/train.json")
    assert main(["card", "model", "--train", train, "--evaluation", pair]) == 2
    assert "should be NAME=FILE" in capsys.readouterr().err
