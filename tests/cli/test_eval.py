"""`modelops eval`, `sample` and `compare` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.base.files import sha256_file
from modelops.cli.main import main


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("red heart\nsun\nface\nflag\n")
    return path


@pytest.mark.parametrize("command", ["eval", "sample", "compare"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"modelops {command} " in capsys.readouterr().out


def test_eval_then_compare(
    tiny_checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in ("1", "2"):
        out = tmp_path / f"{steps}.json"
        arguments = ["--prompts", str(prompts), "--steps", steps, "--resamples", "20"]
        assert main(["eval", str(tiny_checkpoint), *arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "unsafe_rate" in shown and "not measured" in shown

    same, other = str(tmp_path / "1.json"), str(tmp_path / "2.json")
    assert main(["compare", same, same, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"]
    assert {c["verdict"] for c in found if c["metric"] == "unsafe_rate"} == {"within noise"}
    assert main(["compare", same, other, "--json"]) == 4
    found = json.loads(capsys.readouterr().out)["comparisons"]
    assert {c["verdict"] for c in found} == {"not comparable"}
    assert any("sampling.steps: 1 against 2" in c["reason"] for c in found)


def test_eval_prints_one_json_object(
    tiny_checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(tiny_checkpoint), "--prompts", str(prompts), "--json"]
    out = tmp_path / "a.json"
    assert main([*arguments, "--steps", "1", "--dry-run", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True
    assert not out.exists()
    assert main([*arguments, "--lit", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "MissingWeightsError"
    assert json.loads(out.read_text())["status"] == "failed"


def test_eval_without_prompts_says_what_to_give(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_checkpoint), "--out", str(tmp_path / "a.json")]) == 2
    assert "--manifest" in capsys.readouterr().err


def test_samples_are_those_of_their_seed(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--prompt", "red heart", "--prompt", "sun", "--steps", "1"]
    many = ["sample", str(tiny_checkpoint), *both, "-n", "2", "--out", str(tmp_path / "many")]
    assert main(many) == 0
    one = ["--prompt", "sun", "--steps", "1", "--batch-size", "3", "--out", str(tmp_path / "one")]
    assert main(["sample", str(tiny_checkpoint), *one]) == 0
    many_files = json.loads((tmp_path / "many" / "samples.json").read_text())["images"]
    assert [image["prompt"] for image in many_files] == ["red heart"] * 2 + ["sun"] * 2
    assert (tmp_path / "many" / "grid.png").is_file()
    first = tmp_path / "many" / many_files[2]["file"]
    assert sha256_file(first) == sha256_file(tmp_path / "one" / "0000-0.png")
    assert sha256_file(first) != sha256_file(tmp_path / "many" / many_files[3]["file"])
    capsys.readouterr()


def test_sample_without_a_prompt_is_a_usage_error(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tiny_checkpoint), "--out", str(tmp_path)]) == 2
    assert "--prompt" in capsys.readouterr().err
