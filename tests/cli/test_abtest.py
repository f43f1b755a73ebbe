"""`modelops abtest` as a user types it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from abtest_studies import BLUE, PROMPTS, RED, make_study, write_samples
from modelops.abtest.server import Session
from modelops.abtest.study import read_key, read_study
from modelops.base.images import read_image
from modelops.cli.main import main


@pytest.mark.parametrize("command", ["build", "serve", "score"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["abtest", command, "--help"]) == 0
    assert f"modelops abtest {command} " in capsys.readouterr().out


def test_two_evaluations_to_a_study(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\nsun\nface\nflag\n")
    for steps in ("1", "2"):
        chosen = ["--prompts", str(prompts), "--steps", steps, "--safety", "none"]
        out = ["--resamples", "20", "--out", str(tmp_path / f"{steps}.json")]
        assert main(["eval", str(tiny_checkpoint), *chosen, *out]) == 0
    study = tmp_path / "study"
    arguments = ["abtest", "build", str(tmp_path / "1.json"), str(tmp_path / "2.json"),
                 "--out", str(study), "--repeat", "0.5", "--json"]  # fmt: skip
    capsys.readouterr()
    assert main(arguments) == 1
    refused = json.loads(capsys.readouterr().out)
    assert "steps: 1 against 2" in refused["message"] and refused["hint"] == "--allow steps"
    assert main([*arguments, "--allow", "steps", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 6 and not study.exists()
    assert main([*arguments, "--allow", "steps"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 4
    assert main([*arguments, "--allow", "steps"]) == 2
    assert "not empty" in capsys.readouterr().err

    session = Session(study)
    key = read_key(study / "key.json", session.study)
    assert {pair.prompt for pair in key.pairs} == {"red heart", "sun", "face", "flag"}
    assert not any(pair.identical for pair in key.pairs)
    session.close()

    (study / "votes.jsonl").unlink()
    assert main(["abtest", "score", str(study), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["status"], shown["n_votes"]) == ("failed", 0)
    assert main(["abtest", "score", str(study), "--require", "better"]) == 4


def test_serve_vote_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, n=None, repeat=0)
    folder = tmp_path / "study"
    key = read_key(folder / "key.json", study)
    command = [sys.executable, "-m", "modelops.cli.main", "abtest", "serve", str(folder),
               "--port", "0", "--json"]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert server.stderr is not None
    found = re.match(r"http://\S+/", server.stderr.readline())
    assert found
    for _ in study.trials:
        with urllib.request.urlopen(f"{found[0]}api/state?rater=Ann", timeout=20) as answer:
            now = json.load(answer)["current"]
        left_is_b = any(pair.b == now["left"][7:-4] for pair in key.pairs)
        vote = {"rater": "Ann", "trial": now["trial"], "choice": "left" if left_is_b else "right"}
        request = urllib.request.Request(
            f"{found[0]}api/vote", json.dumps(vote).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=20).close()
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "already being served" in second.stderr
    server.send_signal(signal.SIGINT)
    out, _ = server.communicate(timeout=30)
    assert server.returncode == 0
    assert json.loads(out)["votes"] == {"Ann": 12}

    key_elsewhere = tmp_path / "secret.json"
    (folder / "key.json").rename(key_elsewhere)
    assert main(["abtest", "score", str(folder)]) == 2
    assert "--key FILE" in capsys.readouterr().err
    score = ["abtest", "score", str(folder), "--key", str(key_elsewhere)]
    assert main([*score, "--require", "better"]) == 0
    shown = capsys.readouterr().out
    assert "win_rate" in shown and "p = 0.000488" in shown and "Ann" in shown
    assert json.loads((folder / "abtest.json").read_text())["metrics"]["win_rate"]["value"] == 1.0
    assert main([*score, "--require", "not-worse", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "pass"


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(tmp_path, n=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["abtest", "serve", str(tmp_path / "study"), "--port", port]) == 1
    error = capsys.readouterr().err
    assert f"error: 127.0.0.1:{port}: address already in use" in error and "--port" in error
    assert main(["abtest", "serve", str(tmp_path)]) == 2
    assert "modelops abtest build" in capsys.readouterr().err


def test_evaluations_of_folders_find_their_own_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:3]) + "\n")
    for name, colour in (("blue", BLUE), ("red", RED)):
        folder = write_samples(tmp_path / name, colour, prompts=PROMPTS[:3])
        (folder / "samples.json").unlink()
        arguments = ["--prompts", str(prompts), "--safety", "none", "--resamples", "20"]
        out = str(tmp_path / f"{name}.json")
        assert main(["eval", str(folder), *arguments, "--out", out]) == 0
    study = tmp_path / "study"
    records = [str(tmp_path / "blue.json"), str(tmp_path / "red.json")]
    assert main(["abtest", "build", *records, "--out", str(study)]) == 0
    key = read_key(study / "key.json", read_study(study)[0])
    for pair in key.pairs:
        assert read_image(study / "images" / f"{pair.a}.png")[..., 2].mean() > 150
        assert read_image(study / "images" / f"{pair.b}.png")[..., 0].mean() > 150
    capsys.readouterr()
