"""A card that somebody edited is found, whatever else was edited to hide it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from modelops.base.files import sha256_bytes, sha256_file, sha256_tree
from modelops.cards.about import openmoji_about
from modelops.cards.check import check_card, find_cards
from modelops.cards.model import render_model_card, write_model_card
from modelops.cards.sources import read_sources, sources_path, split_notes, write_sources
from modelops.cli.main import main
from modelops.records.read import read_record
from modelops.records.release import Criterion, ReleaseRecord, Verdict
from mutations import some_mutations
from project_records import write_project


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a card, its about file and a release of both."""
    root = write_project(tmp_path_factory.mktemp("project"))
    about = root / "about.yaml"
    about.write_text(yaml.safe_dump(openmoji_about().model_dump()), "utf-8")
    write_model_card(
        root / "cards/model_card.md", train=root / "runs/pilot/train.json",
        evaluations={"final": root / "evaluations/final.json"}, about=about,
        pictures={"Samples": root / "evaluations/final/grid.png"},
    )  # fmt: skip
    model = root / "artifacts/pilot/int8"
    Verdict(
        answer="pass", policy_sha256="0" * 64, subject_sha256=sha256_tree(model),
        criteria=[Criterion(name="c", evidence="e", metric="m", bound="= b", value="b",
                            answer="pass", reason="r")],
    ).write(root / "verdict.json")  # fmt: skip
    assert main(build(root)) == 0
    return root


def build(root: Path) -> list[str]:
    return [
        "release", "build", str(root / "release"), "--model", str(root / "artifacts/pilot/int8"),
        "--verdict", str(root / "verdict.json"), "--name", "pilot", "--version", "1",
        "--card", str(root / "cards/model_card.md"), "--no-golden",
        "--record", str(root / "runs/pilot/train.json"),
        "--record", str(root / "evaluations/final.json"),
    ]  # fmt: skip


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def another_number(card: Path) -> None:
    edit(card, "**21.6**", "**1.6**")


def without_marks(card: Path) -> None:
    another_number(card)
    sources_path(card).unlink()
    text = card.read_text("utf-8")
    card.write_text(re.sub(r"<!--.*?-->\n?", "", text, flags=re.S), "utf-8")


def another_name(card: Path) -> None:
    without_marks(card)
    card.rename(card.with_name("README.md"))


def only_the_name(card: Path) -> None:
    without_marks(card)
    card.write_text(card.read_text("utf-8").split("---\n", 2)[2], "utf-8")


def matching_digest(card: Path) -> None:
    data = json.loads(sources_path(card).read_text("utf-8"))
    data["body_sha256"] = sha256_bytes(split_notes(card.read_text("utf-8"))[0].encode())
    sources_path(card).write_text(json.dumps(data), "utf-8")


def another_licence(card: Path) -> None:
    edit(card, "cc-by-sa-4.0", "mit")
    edit(sources_path(card), "cc-by-sa-4.0", "mit")
    matching_digest(card)


def no_limitation(card: Path) -> None:
    limit = openmoji_about().limitations[0]
    edit(card, f"- {limit}\n", "")
    data = json.loads(sources_path(card).read_text("utf-8"))
    data["about"]["limitations"].remove(limit)
    sources_path(card).write_text(json.dumps(data), "utf-8")
    matching_digest(card)


def another_digest(card: Path) -> None:
    text = card.read_text("utf-8")
    card.write_text(re.sub(r"sha256 [0-9a-f]{64} -->", f"sha256 {'0' * 64} -->", text), "utf-8")
    matching_digest(card)


def rendered_anew(card: Path) -> None:
    """By somebody who knows how: the about file still says otherwise."""
    sources = read_sources(card)
    sources.about["license"] = "mit"
    body = render_model_card(sources, card.parent)
    sources.body_sha256 = sha256_bytes(body.encode())
    card.write_text(body, "utf-8")
    write_sources(card, sources)


def second_notes(card: Path) -> None:
    edit(card, "## Notes", "<!-- notes:begin -->\nFID 0.1\n<!-- notes:end -->\n\n## Notes")


FORGERIES = [
    another_number, without_marks, another_name, only_the_name, another_licence, no_limitation,
    another_digest, rendered_anew, second_notes,
]  # fmt: skip


@pytest.mark.parametrize("forge", FORGERIES)
def test_an_edited_card_is_found(
    root: Path, forge: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cards = root / "cards"
    assert [check_card(card) for card in find_cards(cards)] == [[]]
    forge(cards / "model_card.md")
    assert all(check_card(card) for card in find_cards(cards))
    assert main(["card", "check", str(cards)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_every_changed_number_and_source_is_found(root: Path) -> None:
    card = root / "cards/model_card.md"
    text, sources = card.read_text("utf-8"), json.loads(sources_path(card).read_text("utf-8"))
    numbers = list(re.finditer(r"\d+", text))
    drawn = np.random.default_rng(0).choice(len(numbers), 12, replace=False)
    for found in [numbers[0], numbers[-1], *(numbers[place] for place in drawn)]:
        other = f"{9 - int(found[0][0])}{found[0][1:]}"
        card.write_text(f"{text[: found.start()]}{other}{text[found.end() :]}", "utf-8")
        assert check_card(card), f"{text[found.start() - 60 : found.end()]} -> {other}"
    card.write_text(text, "utf-8")
    assert check_card(card) == []
    before = read_sources(card)
    for mutation in some_mutations(sources, 40):
        mutation.write(sources_path(card), sources)
        # A field that is left out means its default, and may have been just that.
        assert check_card(card) or read_sources(card) == before, mutation


def test_a_card_of_an_older_modelops_is_one_finding(root: Path) -> None:
    card = root / "cards/model_card.md"
    text = card.read_text("utf-8")
    card.write_text(re.sub(r" Sources: sha256 [0-9a-f]{64} -->", " -->", text), "utf-8")
    matching_digest(card)
    (finding,) = check_card(card)
    assert "carries no digest of its sources" in finding and "write it again" in finding


def test_what_was_edited_is_named(root: Path) -> None:
    card = root / "cards/model_card.md"
    another_licence(card)
    findings = check_card(card)
    assert "../about.yaml says otherwise about dataset_license, license" in findings
    assert "model_card.sources.json is not the one that the card was written with" in findings


@pytest.mark.parametrize("forge", [another_number, without_marks, only_the_name, another_licence])
def test_no_release_is_built_of_it(
    root: Path, forge: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    forge(root / "cards/model_card.md")
    before = sha256_file(root / "release/release.json")
    assert main(build(root)) == 1
    assert "write it with `modelops card`" in capsys.readouterr().err
    assert sha256_file(root / "release/release.json") == before


def sealed_again(release: Path) -> None:
    """Write release.json for the files that are there now."""
    record = read_record(release / "release.json", ReleaseRecord)
    names = [path for path in release.rglob("*") if path.is_file()]
    files = {
        path.relative_to(release).as_posix(): {
            "sha256": sha256_file(path), "bytes": path.stat().st_size
        }
        for path in names if path.name != "release.json"
    }  # fmt: skip
    data = {**record.model_dump(mode="json"), "files": files}
    ReleaseRecord.model_validate(data).sealed().write(release / "release.json")


@pytest.mark.parametrize("forge", [f for f in FORGERIES if f is not rendered_anew])
def test_release_verify_finds_it(
    root: Path, forge: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    release = root / "release"
    assert main(["release", "verify", str(release)]) == 0
    forge(release / "cards/model_card.md")
    assert main(["release", "verify", str(release)]) == 1
    sealed_again(release)
    capsys.readouterr()
    assert main(["release", "verify", str(release)]) == 1
    assert "build the release again" in capsys.readouterr().err


def test_a_card_whose_records_stayed_behind_is_compared_by_its_digests(root: Path) -> None:
    release = root / "release"
    shutil.rmtree(release / "records")
    sealed_again(release)
    assert main(["release", "verify", str(release)]) == 0
    another_licence(release / "cards/model_card.md")
    sealed_again(release)
    assert main(["release", "verify", str(release)]) == 1


def test_the_models_own_readme_is_no_card_of_the_release(root: Path) -> None:
    release = root / "release"
    (release / "notes.md").write_text("# Notes on the release\n")
    sealed_again(release)
    assert main(["release", "verify", str(release)]) == 0
    (release / "notes.md").write_text("---\nlicense: mit\n---\n# FID 0.1\n")
    sealed_again(release)
    assert main(["release", "verify", str(release)]) == 1
