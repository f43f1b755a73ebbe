from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.base.errors import UsageError
from modelops.cli.main import main
from modelops.demo.budgets import BUDGETS, budget_named, policy_file, trainer_config
from modelops.demo.chain import demo_chain
from modelops.demo.project import (
    CONFIG,
    INT8_REFUSED,
    POLICY,
    SETTINGS,
    cited,
    grid_prompts,
    int8_record,
    prepare,
)
from modelops.gates.policy import load_policy


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_names_a_config_and_a_policy_that_load(name: str, tmp_path: Path) -> None:
    budget = budget_named(name)
    assert load_policy(policy_file(budget.policy)).subject == "artifact"
    assert trainer_config(budget.config).is_file()
    chain = demo_chain(tmp_path, budget)
    made: set[str] = {CONFIG, POLICY}
    for step in chain.steps:
        inputs = step.inputs() if callable(step.inputs) else step.inputs
        for path in inputs:  # made by an earlier step, or below or beside what one made
            assert path in made or path in cited(tmp_path), f"{step.name}: {path}"
        made |= set(step.outputs)


def test_a_refused_int8_export_is_cited_in_place_of_the_artifact(tmp_path: Path) -> None:
    assert int8_record(tmp_path) in cited(tmp_path)
    assert int8_record(tmp_path) == "artifacts/pilot/int8/artifact.json"
    (tmp_path / INT8_REFUSED).parent.mkdir(parents=True)
    (tmp_path / INT8_REFUSED).write_text("{}")
    assert int8_record(tmp_path) == INT8_REFUSED
    assert INT8_REFUSED in cited(tmp_path)


def test_the_grid_is_64_different_emoji_names() -> None:
    emoji = pytest.importorskip("emoji")
    prompts = grid_prompts()
    assert len(prompts) == len(set(prompts)) == 64
    names = {
        data["en"].strip(":").replace("_", " ").replace("’", "'").lower()
        for data in emoji.EMOJI_DATA.values()
    }
    assert [p for p in prompts if p.lower().replace("flag: ", "") not in names] == []


def test_a_directory_is_made_once_and_kept(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    prepare(root, "smoke", budget_named("smoke"))
    (root / CONFIG).write_text((root / CONFIG).read_text() + "# mine\n")
    prepare(root, "smoke", budget_named("smoke"))
    assert (root / CONFIG).read_text().endswith("# mine\n")
    with pytest.raises(UsageError, match="made with --budget smoke, not default"):
        prepare(root, "default", budget_named("default"))


def test_a_demo_killed_while_it_was_being_made_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    prepare(root, "smoke", budget_named("smoke"))
    state = json.loads((root / SETTINGS).read_text())
    (root / SETTINGS).write_text(json.dumps({**state, "ready": False}))
    (root / POLICY).unlink()
    prepare(root, "smoke", budget_named("smoke"))
    assert (root / POLICY).is_file()


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_full_directory_an_unknown_budget_and_step_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.doc").write_text("years of work")
    code, _, err = run(["demo", str(tmp_path)], capsys)
    assert code == 2
    assert "not empty and not a demo" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]
    code, _, err = run(["demo", str(tmp_path / "d"), "--budget", "huge"], capsys)
    assert code == 2
    assert "one of: smoke, default" in err
    assert not (tmp_path / "d").exists()
    code, _, err = run(
        ["demo", str(tmp_path / "d"), "--budget", "smoke", "--force", "trian"], capsys
    )
    assert code == 2
    assert "no step named trian" in err


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = run(["demo", str(tmp_path / "file" / "demo"), "--json"], capsys)
    assert code == 1
    assert json.loads(out)["status"] == "failed"
    assert err.startswith("error: ")
    assert "cannot write" in err


def test_dry_run_lists_the_steps_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        ["demo", str(tmp_path / "d"), "--budget", "smoke", "--dry-run", "--json"], capsys
    )
    assert code == 0
    steps = json.loads(out)["steps"]
    assert steps[0] == "corpus"
    assert steps[-1] == "serve"
    assert not (tmp_path / "d").exists()
