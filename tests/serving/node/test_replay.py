"""Served through OpenAI's client, made again from the receipt: the same pixels, or how far off."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import live_node
from modelops.base.errors import IntegrityError
from modelops.cli.main import main
from modelops.models.request import ImageRequest
from modelops.models.sources import load_checkpoint
from modelops.serving.deploy.launch import start_server
from modelops.serving.engine.engine import StepEngine
from modelops.serving.node.replay import (
    _make,
    picture_distance,
    stated_difference,
)
from modelops.serving.provenance.receipts import read_receipt, sign_receipt
from modelops.serving.provenance.signing import development_key, find_verifying_key
from modelops.serving.settings import NodeSettings

PROMPT = "a red heart for Zoë"


@dataclass(frozen=True)
class Served:
    """Three answers of a node that keeps receipts without prompts."""

    release: Path
    folder: Path
    receipts: Path
    answers: dict[str, list[dict[str, Any]]]

    def file(self, name: str, index: int = 0) -> Path:
        return self.folder / f"{name}-{index}"


@pytest.fixture(scope="module")
def made(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELOPS_CACHE", str(folder / "cache"))
        patch.delenv("MODELOPS_SIGNING_CHAIN", raising=False)
        settings = NodeSettings(max_rows=8, profile_s=0, receipts=str(folder / "receipts"))
        answers: dict[str, list[dict[str, Any]]] = {}
        with live_node.served(tiny_release, settings) as live, live.client() as client:
            for name in ("png", "jpeg", "webp"):
                answer = client.images.generate(
                    prompt=PROMPT, n=2, output_format=name,  # type: ignore[call-overload]
                    extra_body={"seed": 2**53 - 1, "steps": 3, "guidance": 2.5},
                )  # fmt: skip
                answers[name] = []
                for index, item in enumerate(answer.data):
                    (folder / f"{name}-{index}").write_bytes(base64.b64decode(item.b64_json))
                    receipt = item.model_extra["x_modelops"]
                    (folder / f"{name}-{index}.json").write_text(json.dumps(receipt))
                    answers[name].append(receipt)
        yield Served(tiny_release, folder, folder / "receipts", answers)


def replay(made: Served, *arguments: str | Path) -> int:
    return main(["replay", *map(str, arguments), "--release", str(made.release)])


def replay_json(
    made: Served, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, dict[str, Any]]:
    code = replay(made, *arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_a_served_image_is_made_again_bit_for_bit(
    made: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, index in (("png", 0), ("jpeg", 1)):
        receipt = made.answers[name][index]
        assert receipt["batch_rows"] == [4, 4, 4]  # others were in its batch then, none now
        code, result = replay_json(made, capsys, f"{made.file(name, index)}.json")
        assert (code, result["answer"]) == (0, "equal")
        assert result["pixels_sha256"] == receipt["pixels_sha256"]
        assert result["recipe"]["receipt_id"] == receipt["id"]
    assert made.answers["png"][1]["request"]["seed"] == 0  # 2**53 - 1 and one more


def test_a_kept_receipt_needs_the_prompt(made: Served, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = made.answers["png"][0]["id"]
    kept = read_receipt(made.receipts, receipt_id=wanted)
    assert "prompt" not in kept["request"] and PROMPT not in json.dumps(kept)
    assert replay(made, made.receipts, "--id", wanted) == 2
    assert "give it with --prompt" in capsys.readouterr().err
    assert replay(made, made.receipts, "--id", wanted, "--prompt", "a red heart for Zoe") == 1
    assert "not the text that was used" in capsys.readouterr().err
    assert replay(made, made.receipts, "--id", wanted, "--prompt", PROMPT) == 0
    assert capsys.readouterr().out == "equal: the same pixels\n"
    assert replay(made, made.receipts, "--prompt", PROMPT) == 2  # which of the six?


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_the_picture_alone_is_enough_for_who_knows_the_prompt(made: Served, name: str) -> None:
    picture = made.file(name)
    assert replay(made, picture, "--prompt", PROMPT) == 0
    assert replay(made, picture, "--prompt", PROMPT, "--receipts", made.receipts) == 0
    assert replay(made, picture) == 2


def test_what_was_changed_is_refused(
    made: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = json.loads((made.folder / "png-0.json").read_text())
    receipt["request"]["seed"] = 5
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    assert replay(made, tmp_path / "receipt.json") == 1
    assert "its signature does not match" in capsys.readouterr().err
    data = bytearray(made.file("webp").read_bytes())
    data[-20] ^= 255
    (tmp_path / "picture").write_bytes(data)
    assert replay(made, tmp_path / "picture", "--prompt", PROMPT) == 1
    assert "manifest is Invalid" in capsys.readouterr().err
    stranger = tmp_path / "stranger"
    development_key(stranger)
    key = stranger / "development.pem"
    assert replay(made, made.folder / "png-0.json", "--key", key) == 1
    assert "not by the trusted key" in capsys.readouterr().err
    assert replay(made, made.file("png"), "--prompt", PROMPT, "--key", key) == 1
    assert "untrusted" in capsys.readouterr().err
    (tmp_path / "empty.json").write_text("")
    assert replay(made, tmp_path / "empty.json") == 2
    (tmp_path / "other.json").write_text('{"kind": "verdict"}')
    assert replay(made, tmp_path / "other.json") == 1


def test_a_picture_is_not_compared_with_another(
    made: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a JPEG, whose pixels are not the model's."""
    for name in ("png", "jpeg", "webp"):
        of_it = (made.file(name), "--prompt", PROMPT, "--image")
        assert replay(made, *of_it, made.file(name)) == 0
        assert replay(made, *of_it, made.file(name, 1)) == 1
        assert "not the image that was sent" in capsys.readouterr().err


def test_another_release_is_not_asked(
    made: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelops.releases.build import build_release
    from modelops.releases.verify import verify_release

    record = verify_release(made.release)
    build_release(
        tmp_path / "release", model_dir=made.release / "model",
        verdict=made.release / "verdict.json", name="tiny", version="0.2",
        defaults=record.defaults, extra_files={"golden.png": made.release / "golden.png"},
    )  # fmt: skip
    arguments = ["replay", str(made.folder / "png-0.json"), "--release"]
    assert main([*arguments, str(tmp_path / "release")]) == 1
    assert "the image was made by" in capsys.readouterr().err
    changed = shutil.copytree(made.release, tmp_path / "changed")
    (changed / "NOTICE").write_text("another")
    assert main([*arguments, str(changed)]) == 1
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("name", ["png", "jpeg"])
def test_it_says_how_far(
    made: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A receipt that a right key signed about other pixels: those of the next seed."""
    receipt = json.loads((made.folder / f"{name}-0.json").read_text())
    receipt.pop("signature")
    receipt["request"]["seed"] = 0
    wrong = sign_receipt(receipt, development_key())
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    code, result = replay_json(made, capsys, tmp_path / "wrong.json")
    assert (code, result["answer"], result["max_difference"]) == (1, "differs", None)
    image = made.file(name)
    code, result = replay_json(made, capsys, tmp_path / "wrong.json", "--image", image)
    # Image 1 of the same request was made from that seed.
    one, other = (
        np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
        for path in (image, made.file(name, 1))
    )
    assert code == 1
    assert result["max_difference"] == np.abs(one.astype(int) - other).max() > 20
    assert result["psnr_db"] == pytest.approx(
        peak_signal_noise_ratio(one, other, data_range=255), abs=1e-6
    )
    within = ("--image", image, "--tolerance", "255")
    assert replay_json(made, capsys, tmp_path / "wrong.json", *within)[0] == 0
    assert replay(made, tmp_path / "wrong.json", "--tolerance", "1") == 2
    assert replay(made, tmp_path / "wrong.json", "--image", made.file("webp", 1)) == 1
    assert "not the image that was sent" in capsys.readouterr().err


def test_the_release_states_how_far_batches_may_change_a_picture() -> None:
    assert stated_difference({}) == 0
    company = {"company": {"max_difference": 1}, "offline": {"max_difference": 3}}
    assert stated_difference({"company": company}) == 3


def test_dry_run_checks_and_makes_nothing(made: Served, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = replay_json(made, capsys, made.folder / "png-0.json", "--dry-run")
    assert code == 0 and result["status"] == "dry-run"
    assert result["recipe"]["key_id"] == find_verifying_key().key_id


def test_without_a_key_to_trust_nothing_is_believed(
    made: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path))
    assert replay(made, made.folder / "png-0.json") == 2
    assert not list(tmp_path.iterdir())  # and none is made up


def test_distance_of_unequal_sizes_and_of_nothing() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    assert picture_distance(black, black) == (0, None)
    assert picture_distance(black, black + 255) == (255, 0.0)
    with pytest.raises(IntegrityError, match="sizes"):
        picture_distance(black, np.zeros((2, 3, 3), np.uint8))


def test_a_runtime_that_rounds_by_width_is_replayed_as_wide(tiny_checkpoint: Path) -> None:
    """INT8 in onnxruntime is one (7 of 40 pilot images differ alone, none as wide)."""
    pipeline = load_checkpoint(tiny_checkpoint)
    exact = pipeline.predict_velocity

    def by_width(latents: Any, *rest: Any) -> Any:
        return exact(latents, *rest) + 0.01 * len(latents)

    pipeline.predict_velocity = by_width
    engine = StepEngine(pipeline, max_rows=8)
    requests = [
        ImageRequest(prompt=f"star {k}", seed=k, steps=2 + k, guidance=[1.0, 3.0][k % 2],
                     height=32, width=32)
        for k in range(4)
    ]  # fmt: skip
    served = [job.future.result(60) for job in engine.submit(requests)]
    engine.close()
    for request, image in zip(requests, served, strict=True):
        assert max(image.batch_rows) > 2
        assert not np.array_equal(_make(pipeline, request), image.pixels)
        assert np.array_equal(_make(pipeline, request, image.batch_rows), image.pixels)
        assert pipeline.predict_velocity is by_width


@pytest.mark.slow
def test_bentoml_with_keys_and_receipts_end_to_end(tiny_release: Path, tmp_path: Path) -> None:
    """Make a key, serve, ask, revoke; a stranger replays with the certificate of /v1/models."""
    modelops = [sys.executable, "-m", "modelops.cli.main"]
    keys = tmp_path / "keys.json"
    made = subprocess.run(
        [*modelops, "serve", "key", "create", "alice", "--file", str(keys)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    key = made.stdout.strip()
    environment = {
        "OMP_NUM_THREADS": "1",
        "MODELOPS_CACHE": str(tmp_path / "cache"),
        "MODELOPS_API_KEYS_FILE": str(keys),
        "MODELOPS_RECEIPTS": str(tmp_path / "receipts"),
    }
    with start_server(
        tiny_release, log_path=tmp_path / "server.log", environment=environment
    ) as server:
        base = f"{server.url}/v1"
        with openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as error:
                stranger.images.generate(prompt=PROMPT)
            assert error.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
            answer = client.images.generate(prompt=PROMPT, extra_body={"seed": 4})
            about = client.models.list().data[0].model_extra["x_modelops"]["signing"]  # type: ignore[index]
            (tmp_path / "signer.pem").write_text(about["certificates"])
            (tmp_path / "answer.json").write_text(answer.model_dump_json())
            revoke = [*modelops, "serve", "key", "revoke", "alice", "--file", str(keys)]
            subprocess.run(revoke, check=True, capture_output=True)
            with pytest.raises(openai.AuthenticationError):
                client.images.generate(prompt=PROMPT)
    log = (tmp_path / "server.log").read_text()
    assert "DEVELOPMENT signing key" in log
    assert key not in log and "wrong" not in log and PROMPT not in log
    replayed = subprocess.run(
        [*modelops, "replay", str(tmp_path / "answer.json"), "--release", str(tiny_release),
         "--key", str(tmp_path / "signer.pem")],
        capture_output=True, text=True, check=False, env=None,
    )  # fmt: skip
    assert (replayed.returncode, replayed.stdout) == (0, "equal: the same pixels\n")
