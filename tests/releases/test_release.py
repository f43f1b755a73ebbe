"""A release is what was gated, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modelops.base.errors import (
    GateFailedError,
    GateUndecidedError,
    IntegrityError,
    ModelopsError,
    UsageError,
)
from modelops.base.files import sha256_file, sha256_tree
from modelops.records.base import Answer
from modelops.releases.build import build_release
from modelops.releases.verify import verify_release
from project_records import verdict_on


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet/weights.bin").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def build(tmp_path: Path, model: Path) -> Callable[..., Path]:
    def build(answer: Answer = "pass", subject: str | None = None, **options: object) -> Path:
        verdict = tmp_path / "verdict.json"
        verdict_on(subject or sha256_tree(model), answer).write(verdict)
        options = {"name": "tiny", "version": "1.0", "model_dir": model} | options
        build_release(tmp_path / "release", verdict=verdict, **options)  # type: ignore[arg-type]
        return tmp_path / "release"

    return build


def test_release_holds_the_model_and_verifies(build: Callable[..., Path], model: Path) -> None:
    release = build(defaults={"steps": 4}, notice="CC BY-SA 4.0")
    record = verify_release(release)
    assert record.model_sha256 == sha256_tree(release / "model") == sha256_tree(model)
    assert record.defaults == {"steps": 4}
    assert record.verdict_answer == "pass" and not record.allowed_without_pass
    on_disk = {p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file()}
    assert on_disk == {*record.files, "release.json"}
    assert "NOTICE" in record.files


def test_training_state_stays_behind(tmp_path: Path, model: Path) -> None:
    digest = sha256_tree(model)
    (model / "training_state").mkdir()
    (model / "training_state/optimizer.safetensors").write_bytes(b"x" * 10)
    verdict = tmp_path / "v.json"
    verdict_on(digest).write(verdict)
    build_release(tmp_path / "r", model_dir=model, verdict=verdict, name="a", version="1")
    assert not (tmp_path / "r/model/training_state").exists()
    assert verify_release(tmp_path / "r").model_sha256 == digest


def test_cards_bring_their_pictures(tmp_path: Path, build: Callable[..., Path]) -> None:
    cards = tmp_path / "cards"
    (cards / "img").mkdir(parents=True)
    (cards / "loss.png").write_bytes(b"loss")
    (cards / "img/grid.png").write_bytes(b"grid")
    card = cards / "model_card.md"
    card.write_text(
        '![loss](loss.png) <img width="3" src="img/grid.png"> ![far](https://example.org/x.png)'
    )
    release = build(cards=[card])
    assert (release / "cards/img/grid.png").read_bytes() == b"grid"
    assert (release / "cards/loss.png").is_file()
    (cards / "loss.png").unlink()
    with pytest.raises(UsageError, match=r"loss\.png"):
        build(cards=[card])
    card.write_text("![secret](../model/model_index.json)")
    with pytest.raises(UsageError, match="outside"):
        build(cards=[card])


@pytest.mark.parametrize(("answer", "error"), [("fail", GateFailedError),
                                               ("undecided", GateUndecidedError)])  # fmt: skip
def test_without_a_pass_nothing_is_built_unless_allowed(
    tmp_path: Path, build: Callable[..., Path], answer: Answer, error: type[ModelopsError]
) -> None:
    with pytest.raises(error):
        build(answer=answer)
    assert not (tmp_path / "release").exists()
    record = verify_release(build(answer=answer, allow=True))
    assert record.allowed_without_pass and record.verdict_answer == answer


def test_verdict_about_another_model_is_refused(build: Callable[..., Path]) -> None:
    with pytest.raises(IntegrityError, match="is about"):
        build(subject="f" * 64)
    with pytest.raises(IntegrityError, match="is about"):
        build(subject="f" * 64, allow=True)


def test_policy_must_be_the_verdicts(tmp_path: Path, build: Callable[..., Path]) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("a: 1")
    with pytest.raises(IntegrityError, match="policy"):
        build(policy=policy)


def test_a_folder_that_is_no_release_is_not_replaced(
    tmp_path: Path, build: Callable[..., Path]
) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a release"):
        build()
    assert (tmp_path / "release/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["../up", "a b", "", "x" * 65, "a\n"])
def test_odd_names_are_refused(build: Callable[..., Path], name: str) -> None:
    with pytest.raises(UsageError):
        build(name=name)


def flip_a_byte(release: Path) -> None:
    path = release / "model/unet/weights.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def forge_the_verdict(release: Path) -> None:
    record = json.loads((release / "release.json").read_text())
    verdict = json.loads((release / "verdict.json").read_text())
    verdict["answer"] = "fail"
    (release / "verdict.json").write_text(json.dumps(verdict))
    digest = sha256_file(release / "verdict.json")
    record["verdict_sha256"] = digest
    record["files"]["verdict.json"] = {
        "sha256": digest, "bytes": (release / "verdict.json").stat().st_size
    }  # fmt: skip
    (release / "release.json").write_text(json.dumps(record))


def swap_the_model(release: Path) -> None:
    record = json.loads((release / "release.json").read_text())
    flip_a_byte(release)
    name = "model/unet/weights.bin"
    record["files"][name]["sha256"] = sha256_file(release / name)
    (release / "release.json").write_text(json.dumps(record))


def climb_out(release: Path) -> None:
    record = json.loads((release / "release.json").read_text())
    record["files"]["../verdict.json"] = record["files"]["verdict.json"]
    (release / "release.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (flip_a_byte, "weights.bin: changed"),
        (lambda r: (r / "model/unet/weights.bin").write_bytes(b"short"), "weights.bin: changed"),
        (lambda r: (r / "model/model_index.json").unlink(), "model_index.json: missing"),
        (lambda r: (r / "model/extra.py").write_text("import os"), "extra.py: is not part"),
        (lambda r: (r / "link").symlink_to("/etc/passwd"), "symbolic"),
        (forge_the_verdict, "answers fail"),
        (swap_the_model, "not the model"),
        (climb_out, "verdict.json"),
        (lambda r: (r / "release.json").unlink(), "not a release"),
        (lambda r: (r / "release.json").write_text('{"kind": "rel'), "not JSON"),
    ],
)
def test_tampering_is_named(
    build: Callable[..., Path], tamper: Callable[[Path], object], says: str
) -> None:
    release = build()
    tamper(release)
    with pytest.raises(ModelopsError, match=says):
        verify_release(release)


def test_a_file_called_release_json_makes_no_release(
    tmp_path: Path, build: Callable[..., Path]
) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release/release.json").write_text("{}")
    (tmp_path / "release/thesis.tex").write_text("five years")
    with pytest.raises(UsageError, match="is not a release, or holds other files"):
        build()
    assert (tmp_path / "release/thesis.tex").read_text() == "five years"


def test_a_release_with_files_of_others_is_not_replaced(build: Callable[..., Path]) -> None:
    release = build()
    build()  # a release and nothing else is
    (release / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        build()
    assert (release / "notes.txt").read_text() == "mine"
