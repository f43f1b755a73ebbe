"""A node on a processor on which a release's INT8 model is wrong: found out before it serves,
refused in one line, or served from the release's fallback."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save_file

from live_node import served
from modelops.base.errors import IntegrityError, NotReproducedError, ServingError, UsageError
from modelops.base.files import sha256_file, sha256_tree
from modelops.base.processor import this_processor
from modelops.cli.main import main
from modelops.export.runtimes.probe import PROBE
from modelops.records.read import read_record
from modelops.records.release import PreflightRecord, ReleaseRecord
from modelops.releases.build import build_release
from modelops.releases.verify import RECORD_FILE, check_fallback, verify_release
from modelops.serving.deploy.preflight import require_preflight, run_preflight
from modelops.serving.node.batch_invariance import release_proofs
from modelops.serving.node.node import InferenceNode
from modelops.serving.node.replay import open_recipe, recipe_texts, replay_recipe
from modelops.serving.provenance.signing import load_verifying_key
from modelops.serving.settings import NodeSettings
from project_records import verdict_on


@pytest.fixture(scope="module")
def saturating(int8_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 artifact that is three times as far from torch here as where it was gated."""
    artifact = tmp_path_factory.mktemp("saturating") / "int8"
    shutil.copytree(int8_artifact, artifact)
    path = artifact / "unet" / PROBE
    arrays = load_file(path)
    gated = arrays["output"] + (arrays["exact"] - arrays["output"]) / 3
    save_file({**arrays, "exact": gated, "answer": gated}, path)
    record = json.loads((artifact / "artifact.json").read_text())
    record["files"][f"unet/{PROBE}"]["sha256"] = sha256_file(path)
    (artifact / "artifact.json").write_text(json.dumps(record))
    return artifact


def release_of(model: Path, folder: Path, fallback: Path | None = None, **more: Any) -> Path:
    verdict = folder / "verdict.json"
    verdict_on(sha256_tree(model)).write(verdict)
    build_release(
        folder / "release", model_dir=model, verdict=verdict, name="tiny", version="0.1",
        fallback=fallback, **more,
    )  # fmt: skip
    return folder / "release"


@pytest.fixture(scope="module")
def with_fallback(
    saturating: Path, onnx_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("released")
    said, files = release_proofs(onnx_artifact, folder, steps=4, fallback=onnx_artifact)
    return release_of(
        saturating, folder, onnx_artifact,
        defaults={**said, "steps": 4, "guidance": 3.0}, extra_files=files,
    )  # fmt: skip


def test_without_a_fallback_it_is_refused_in_one_line(saturating: Path, tmp_path: Path) -> None:
    release = release_of(saturating, tmp_path)
    with pytest.raises(NotReproducedError, match="does not give the numbers"):
        InferenceNode(release)
    with pytest.raises(ServingError, match="on this processor") as caught:
        require_preflight(release)  # as `bentoml serve` does before a worker starts
    assert "\n" not in caught.value.message
    assert this_processor().kind in caught.value.message


def test_the_fallback_is_served_and_says_so(with_fallback: Path, tmp_path: Path) -> None:
    record = verify_release(with_fallback)
    assert record.fallback_sha256 == sha256_tree(with_fallback / "fallback")
    assert "fallback" in require_preflight(with_fallback)
    settings = NodeSettings(receipts=str(tmp_path / "receipts"))
    with served(with_fallback, settings) as live:
        node = live.node
        assert node.golden is not None
        assert node.golden.equal is not None  # compared with the fallback's own golden image
        about = httpx.get(f"{live.url}/v1/models").json()["data"][0]["x_modelops"]
        assert about["model_sha256"] == record.fallback_sha256 != record.model_sha256
        assert "does not give the numbers" in about["fallback"]
        assert about["precision"] == "float32"
        asked = {"prompt": "red heart", "seed": 3}
        answer = httpx.post(f"{live.url}/v1/images/generations", json=asked, timeout=60)
        receipt = answer.json()["data"][0]["x_modelops"]
        (tmp_path / "key.pem").write_text(about["signing"]["certificates"])
    assert receipt["model_sha256"] == record.fallback_sha256
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    recipe = open_recipe(tmp_path / "receipt.json", load_verifying_key(tmp_path / "key.pem"))
    again = replay_recipe(recipe, with_fallback, recipe_texts(recipe, {}))
    assert again.answer == "equal"


def test_a_changed_fallback_is_found(with_fallback: Path, tmp_path: Path) -> None:
    copy = tmp_path / "release"
    shutil.copytree(with_fallback, copy)
    data = json.loads((copy / RECORD_FILE).read_text())
    data["fallback_sha256"] = "0" * 64
    (copy / RECORD_FILE).write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="not the fallback"):
        verify_release(copy)


def test_what_may_be_a_fallback(
    int8_artifact: Path, onnx_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    check_fallback(onnx_artifact, int8_artifact)
    with pytest.raises(UsageError, match="int8 is no fallback"):
        check_fallback(int8_artifact, onnx_artifact)
    with pytest.raises(UsageError):
        check_fallback(tiny_checkpoint, int8_artifact)
    other = tmp_path / "other"
    shutil.copytree(onnx_artifact, other)
    data = json.loads((other / "artifact.json").read_text())
    data["inputs"]["checkpoint"]["sha256"] = "0" * 64
    (other / "artifact.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="was not made from the checkpoint"):
        check_fallback(other, int8_artifact)
    data["inputs"]["checkpoint"]["sha256"] = json.loads(
        (onnx_artifact / "artifact.json").read_text()
    )["inputs"]["checkpoint"]["sha256"]
    data["parity"][0]["passed"] = False
    (other / "artifact.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="not equal to its checkpoint"):
        check_fallback(other, int8_artifact)


def test_preflights_of_other_machines_go_into_the_release(
    int8_artifact: Path, saturating: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "preflight.json"
    assert main(["serve", "preflight", str(int8_artifact), "--out", str(out)]) == 0
    assert "served here: " in capsys.readouterr().out
    preflight = read_record(out, PreflightRecord)
    assert preflight.processor == this_processor().kind
    assert any(one.passed for one in preflight.reproduced)
    elsewhere = preflight.model_copy(deep=True)
    for one in elsewhere.reproduced:
        one.processor = "aarch64 with NEON"
    elsewhere.write(out)
    released = release_of(int8_artifact, tmp_path, preflights=[out])
    kinds = {one.processor for one in read_record(released / RECORD_FILE, ReleaseRecord).reproduced}
    assert {this_processor().kind, "aarch64 with NEON"} <= kinds
    (tmp_path / "other").mkdir()
    with pytest.raises(IntegrityError, match="preflight"):
        release_of(saturating, tmp_path / "other", preflights=[out])
    assert main(["serve", "preflight", str(saturating), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "refused"
    assert said["runtime"] == ""
    assert [one["passed"] for one in said["reproduced"]].count(True) == 0
    assert main(["serve", "preflight", str(tmp_path)]) == 2


def test_a_checkpoint_has_nothing_to_compare(tiny_checkpoint: Path) -> None:
    record = run_preflight(tiny_checkpoint)
    assert (record.status, record.runtime, record.reproduced) == ("ok", "torch", [])


def test_choosing_in_threads_gives_one_answer(int8_artifact: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(run_preflight(int8_artifact).runtime))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1
