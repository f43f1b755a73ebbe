"""`modelops release` and `modelops serve` up to the point where a server would start."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from modelops.base.files import sha256_tree
from modelops.cli.main import main
from modelops.records.release import ReleaseDefaults
from project_records import verdict_on


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    verdict_on(sha256_tree(model)).write(tmp_path / "verdict.json")
    return ["--model", str(model), "--verdict", str(tmp_path / "verdict.json"),
            "--name", "tiny", "--version", "1.0", "--no-golden"]  # fmt: skip


def test_build_then_verify(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    release = str(tmp_path / "release")
    assert main(["release", "build", release, *inputs, "--steps", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["defaults"] == {"steps": 8}
    assert main(["release", "verify", release]) == 0
    assert "unchanged" in capsys.readouterr().out
    (tmp_path / "release/model/model_index.json").write_text("[]")
    assert main(["release", "verify", release, "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"] == "IntegrityError"
    assert "model_index.json: changed" in captured.err


@pytest.mark.parametrize("command", [["release", "build", "r"], ["sample", "m"], ["eval", "m"]])
def test_guidance_between_off_and_on_is_refused_before_anything_is_opened(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    own = inputs if command[0] == "release" else ["--out", str(tmp_path / "out")]
    assert main([*command, *own, "--guidance", "0.5"]) == 2
    assert "0.5: must be 0 or 1 (off), or more than 1" in capsys.readouterr().err


def test_guidance_0_is_released_as_off(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    release = str(tmp_path / "release")
    assert main(["release", "build", release, *inputs, "--guidance", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["defaults"] == {"guidance": 1.0}
    with pytest.raises(ValidationError, match="must be 0 or 1"):
        TypeAdapter(ReleaseDefaults).validate_python({"guidance": 0.5})


def test_a_model_that_runs_is_released_with_its_golden_picture(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict_on(sha256_tree(tiny_checkpoint)).write(tmp_path / "verdict.json")
    release = tmp_path / "release"
    command = ["release", "build", str(release), "--model", str(tiny_checkpoint), "--verdict",
               str(tmp_path / "verdict.json"), "--name", "tiny", "--version", "1.0"]  # fmt: skip
    assert main([*command, "--steps", "2", "--guidance", "2", "--json"]) == 0
    defaults = json.loads(capsys.readouterr().out)["defaults"]
    assert (defaults["golden"]["steps"], defaults["golden"]["guidance"]) == (2, 2.0)
    assert defaults["company"]["pictures"] == 16
    assert (release / "golden.png").is_file()


def test_a_model_that_does_not_run_is_said_before_anything_is_written(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["release", "build", str(tmp_path / "release"), *inputs[:-1]]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "release").exists()


def test_dry_run_builds_nothing(tmp_path: Path, inputs: list[str]) -> None:
    assert main(["release", "build", str(tmp_path / "release"), *inputs, "--dry-run"]) == 0
    assert not (tmp_path / "release").exists()


def test_gate_that_said_no_has_its_exit_code(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    verdict_on(sha256_tree(tmp_path / "model"), "fail").write(tmp_path / "verdict.json")
    assert main(["release", "build", str(tmp_path / "release"), *inputs]) == 3
    assert "the gate answered fail" in capsys.readouterr().err


def test_serve_refuses_before_it_starts_anything(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    release = tmp_path / "release"
    assert main(["serve", str(release)]) == 2
    assert "not a release" in capsys.readouterr().err
    assert main(["release", "build", str(release), *inputs]) == 0
    assert main(["serve", str(release), "--dry-run", "--port", "3999"]) == 0
    assert "modelops.service:ImageGenerator" in capsys.readouterr().out
    assert main(["serve", str(release), "--host", "nowhere"]) == 2
    assert main(["serve", str(release), "--port", "70000"]) == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        capsys.readouterr()
        assert main(["serve", str(release), "--port", str(taken.getsockname()[1])]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and "address already in use" in lines[0] and "--port" in lines[1]
    (release / "model/model_index.json").write_text("[]")
    assert main(["serve", str(release), "--port", "3999"]) == 1
    assert "changed" in capsys.readouterr().err
