"""`modelops doctor --pipeline`: a pipeline watched at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.cli.main import main
from zoo.all import family


def findings(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> dict[tuple[str, str], tuple[str, str]]:
    family(name).make().save_pretrained(folder / "pipeline")
    capsys.readouterr()
    assert main(["doctor", "--pipeline", str(folder / "pipeline"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    return {(one["area"], one["name"]): (one["state"], one["detail"]) for one in found}


def test_a_pipeline_of_noise_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings("DDIM", tmp_path, capsys)
    assert found["call", "takes"][1].startswith("nothing")
    assert found["call", "guidance"][1] == "has no effect"
    assert found["call", "size"][1] == "32x32 only"
    assert "sample [batch, 3, 32, 32]" in found["network", "unet"][1]
    assert found["can", "export"] == ("ok", "every network has an ONNX form")
    for name in ("sample, eval", "serve"):
        state, detail = found["can", name]
        assert state == "ok"
        assert "by 0 of 255" in detail or "by 1 of 255" in detail


@pytest.mark.slow
def test_one_that_wants_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings("Stable Diffusion 1.5 (inpainting, four channels)", tmp_path, capsys)
    assert found["call", "takes"][1] == "a prompt and an image with a mask"
    assert found["can", "serve"][0] == "missing"


def test_what_is_no_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--pipeline", str(tmp_path)]) == 2
    assert "not a diffusers checkpoint" in capsys.readouterr().err
