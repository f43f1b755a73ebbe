"""`modelops export` and `modelops bench` as a person or a script calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelops.cli.main import main


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["export", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.err


def test_export_then_bench(
    tiny_checkpoint: Path, onnx_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same checkpoint gives the same bytes, by the command as by the function."""
    out = tmp_path / "onnx"
    arguments = ["export", str(tiny_checkpoint), "--to", "onnx", "--out", str(out), "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "dry-run"
    assert not out.exists()
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / "artifact.json").read_text())
    for component in record["components"]:
        for path in (out / component["file"]).parent.iterdir():
            assert path.read_bytes() == (onnx_artifact / path.relative_to(out)).read_bytes(), path
    assert main(arguments) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "UsageError"

    line = ["bench", str(tiny_checkpoint), str(out), "--steps", "1", "--no-compile"]
    line += ["--runtime", "onnxruntime", "--batch-sizes"]
    assert main([*line, "1,2", "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["batch_size"] for row in result["rows"]] == [1, 1, 2, 2]
    torch_row, onnx_row = (row["runtime"] for row in result["rows"][:2])
    assert (torch_row, onnx_row) == ("torch-cpu", "onnxruntime-cpu")
    assert result["rows"][1]["speedup"]["value"] > 0
    assert main([*line, "1", "--rounds", "1"]) == 0
    assert onnx_row in capsys.readouterr().out


def test_torchscript_and_what_tensorrt_says_without_a_gpu(
    tiny_checkpoint: Path,
    onnx_artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "torchscript"
    line = ["export", str(tiny_checkpoint), "--to", "torchscript", "--out", str(out), "--json"]
    assert main(line) == 0
    record = json.loads(capsys.readouterr().out)
    assert {item["file"] for item in record["components"]} == {
        "unet/model.pt", "text_encoder/model.pt",
    }  # fmt: skip
    assert "unet/model.pt2" in record["files"]
    assert all(check["passed"] for check in record["parity"])
    made = tmp_path / "made"
    # Opening such a file runs code from it, so that nobody does without being told to.
    monkeypatch.setenv("MODELOPS_TRUST_CODE", "0")
    sample = ["sample", str(out), "--prompt", "red heart", "--steps", "2"]
    for runtime in ("auto", "torchscript", "torch-export"):
        line = [*sample, "--out", str(made / runtime), "--runtime", runtime]
        assert main(line) == 2
        assert "whose code runs when it is opened" in capsys.readouterr().err
        assert not (made / runtime).exists()
    for runtime in ("auto", "torchscript", "torch-export"):
        line = [*sample, "--out", str(made / runtime), "--runtime", runtime, "--trust-code"]
        assert main(line) == 0
        used = json.loads((made / runtime / "samples.json").read_text())["source"]["runtime"]
        assert used == f"{'torchscript' if runtime == 'auto' else runtime}-cpu"
    capsys.readouterr()
    out = tmp_path / "tensorrt"
    line = [str(tiny_checkpoint), "--to", "tensorrt", "--onnx", str(onnx_artifact)]
    code, text = failure([*line, "--out", str(out), "--profile", "batch=4:2:8"], capsys)
    assert (code, "batch" in text) == (2, True)
    code, text = failure([*line, "--out", str(out)], capsys)
    assert code == 1  # neither TensorRT nor a GPU, on the machines that run these tests
    assert "modelops[gpu]" in text or "GPU" in text
    assert not out.exists()


def test_mistakes_are_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    code, text = failure([str(tmp_path / "none"), "--to", "onnx", "--out", out], capsys)
    assert (code, "no such directory" in text) == (2, True)
    code, text = failure([str(tiny_checkpoint), "--to", "int8", "--out", out], capsys)
    assert (code, "no such directory" in text) == (2, True)
    code, text = failure([str(tiny_checkpoint), "--to", "tensorrt", "--out", out], capsys)
    assert (code, "onnx" in text) == (2, True)
    wrong = [str(tiny_checkpoint), "--to", "onnx", "--out", out, "--error-budget", "0.1"]
    code, text = failure(wrong, capsys)
    assert (code, "--error-budget is for --to int8, not onnx" in text) == (2, True)
    code, text = failure(
        [str(tiny_checkpoint), "--to", "onnx", "--out", out, "--size", "wide"], capsys
    )
    assert (code, "HEIGHTxWIDTH" in text) == (2, True)
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    code, text = failure(
        [str(tiny_checkpoint), "--to", "onnx", "--out", out, "--prompts", str(empty)], capsys
    )
    assert (code, "no prompts" in text) == (2, True)
    assert main(["bench", str(tiny_checkpoint), "--batch-sizes", "0"]) == 2
    assert main(["bench", str(tiny_checkpoint), "--batch-sizes", "many"]) == 2
    assert "whole numbers" in capsys.readouterr().err
    assert not Path(out).exists()
