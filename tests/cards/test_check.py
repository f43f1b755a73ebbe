"""A card that is stale or edited is found out; notes are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelops.base.errors import UsageError
from modelops.cards.about import openmoji_about
from modelops.cards.check import check_card, find_cards
from modelops.cards.dataset import write_dataset_card
from modelops.cards.model import write_model_card
from modelops.cards.sources import sources_path
from project_records import evaluation, train_record, write_project

STATISTICS: dict[str, Any] = {
    "samples": 3786, "groups": 1800, "quarantined": {"9": "truncated <b>"}, "bytes": 12_345_678,
    "licenses": {"cc-by-sa-4.0": 3786}, "sources": {"openmoji | <i>": 3786},
    "tags": {f"tag {index}": 100 - index for index in range(30)},
    "nsfw": {"flagged": 0, "samples": 3786}, "dates": {"first": "2026-01-01", "last": None},
    "caption_words": {"min": 1, "median": 3.0, "mean": 3.21, "p95": 6.0, "max": 9},
    "splits": {"train": 3030, "val": 378, "test": 378},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is written once; tests change copies of it."""
    directory = tmp_path_factory.mktemp("project")
    return write_project(directory)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def write_model(root: Path) -> Path:
    return write_model_card(
        root / "cards/model_card.md",
        train=root / "runs/pilot/train.json",
        evaluations={"final": root / "evaluations/final.json"},
        pictures={"Samples": root / "evaluations/final/grid.png"},
        about=openmoji_about(),
    )


def write_dataset(root: Path, statistics: dict[str, Any] = STATISTICS) -> Path:
    manifest = root / "data/manifest.parquet"
    if not manifest.exists():
        manifest.write_bytes(b"rows")
    return write_dataset_card(
        root / "cards/dataset_card.md",
        statistics=statistics,
        manifest=manifest,
        dedup=root / "data/dedup_report.json",
        split=root / "data/split.json",
        smoke=root / "data/smoke.json",
        about=openmoji_about(),
    )


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def test_cards_as_written_hold_and_writing_again_changes_nothing(root: Path) -> None:
    for write in (write_model, write_dataset):
        card = write(root)
        assert check_card(card) == []
        before = card.read_bytes()
        assert write(root).read_bytes() == before


def test_a_number_edited_by_hand_is_found_with_what_the_records_say(root: Path) -> None:
    card = write_model(root)
    edit(card, "**21.6** \\[19.44, 23.76\\] <sub>", "**11.6** \\[9.44, 13.76\\] <sub>")
    findings = check_card(card)
    assert len(findings) == 1
    assert "11.6" in findings[0] and "21.6" in findings[0]
    number = int(findings[0].split(":")[0].removeprefix("line "))
    assert "11.6" in card.read_text("utf-8").splitlines()[number - 1]


@pytest.mark.parametrize("old", ["value: 21.6", "license: cc-by-sa-4.0"])
def test_the_front_matter_counts_as_well(root: Path, old: str) -> None:
    card = write_model(root)
    edit(card, old, old.split(":", maxsplit=1)[0] + ": 1")
    assert check_card(card)


def test_forging_the_digest_of_the_text_does_not_help(root: Path) -> None:
    from modelops.base.files import sha256_bytes
    from modelops.cards.sources import split_notes

    card = write_model(root)
    edit(card, "**21.6**", "**11.6**")
    path = sources_path(card)
    data = json.loads(path.read_text("utf-8"))
    body, _ = split_notes(card.read_text("utf-8"))
    data["body_sha256"] = sha256_bytes(body.encode())
    path.write_text(json.dumps(data), "utf-8")
    assert any("11.6" in finding for finding in check_card(card))


def test_added_and_removed_lines_are_found(root: Path) -> None:
    card = write_model(root)
    edit(card, "## Limitations", "It is perfect.\n\n## Limitations")
    assert any("added: It is perfect." in finding for finding in check_card(card))
    write_model(root)
    edit(card, "- Decisions about people, or images passed off as somebody's drawing.\n", "")
    assert any("removed: - Decisions about people" in finding for finding in check_card(card))


def test_a_record_that_changed_makes_the_card_stale(root: Path) -> None:
    card = write_model(root)
    evaluation("checkpoint", "0" * 64, 11.6).write(root / "evaluations/final.json")
    findings = check_card(card)
    assert findings == ["../evaluations/final.json: changed since the card was written "
                        "(evaluation:final)"]  # fmt: skip
    (root / "runs/pilot/train.json").unlink()
    assert any("train.json: missing" in finding for finding in check_card(card))


def test_pictures_are_part_of_the_card(root: Path) -> None:
    card = write_model(root)
    (root / "cards/grid.png").write_bytes(b"another")
    assert check_card(card) == ["grid.png: the image was changed"]
    (root / "cards/grid.png").unlink()
    assert check_card(card) == ["grid.png: the image is missing"]
    write_model(root)
    original = root / "evaluations/final/grid.png"
    original.write_bytes(original.read_bytes() + b"new")
    assert "changed since grid.png was copied" in check_card(card)[0]
    original.unlink()
    assert check_card(card) == [], "the copy beside the card is what counts"


def test_a_manifest_that_changed_makes_the_dataset_card_stale(root: Path) -> None:
    card = write_dataset(root)
    (root / "data/manifest.parquet").write_bytes(b"other rows")
    assert check_card(card) == ["../data/manifest.parquet: changed since it was counted (manifest)"]
    (root / "data/manifest.parquet").unlink()
    assert check_card(card) == []


def test_notes_survive_and_are_not_findings(root: Path) -> None:
    card = write_model(root)
    text = card.read_text("utf-8")
    begin, end = text.index("<!-- notes:begin -->"), text.index("<!-- notes:end -->")
    notes = "<!-- notes:begin -->\nLooked at by Ada.\n\n| a | b |\n"
    card.write_text(text[:begin] + notes + text[end:], "utf-8")
    assert check_card(card) == []
    train_record(steps=3).write(root / "runs/pilot/train.json")
    write_model(root)
    again = card.read_text("utf-8")
    assert "Looked at by Ada.\n\n| a | b |\n<!-- notes:end -->" in again
    assert "3 steps" in again
    assert check_card(card) == []


def test_damaged_notes_are_not_thrown_away(root: Path) -> None:
    card = write_model(root)
    edit(card, "<!-- notes:end -->", "")
    assert any("the notes should lie between" in finding for finding in check_card(card))
    before = card.read_text("utf-8")
    with pytest.raises(UsageError, match="notes"):
        write_model(root)
    assert card.read_text("utf-8") == before


def test_a_file_that_is_not_such_a_card_is_not_overwritten(root: Path) -> None:
    (root / "cards").mkdir()
    (root / "cards/model_card.md").write_text("# my own", "utf-8")
    with pytest.raises(UsageError, match="--force"):
        write_model(root)
    assert (root / "cards/model_card.md").read_text("utf-8") == "# my own"


def test_a_card_without_sources_cannot_be_checked(root: Path) -> None:
    card = write_model(root)
    sources_path(card).unlink()
    assert find_cards(root / "cards") == [card], "and is not passed over either"
    assert "nothing says what it was made from" in check_card(card)[0]
    card.unlink()
    with pytest.raises(UsageError, match="no card here"):
        find_cards(root / "cards")


def test_sources_without_their_card_are_found(root: Path) -> None:
    card = write_model(root)
    card.unlink()
    assert find_cards(root / "cards") == [card]
    assert "No such file" in check_card(card)[0]


def test_the_sources_name_no_machine_path_and_may_not(root: Path) -> None:
    card = write_model(root)
    path = sources_path(card)
    assert str(root) not in path.read_text("utf-8") + card.read_text("utf-8")
    data = json.loads(path.read_text("utf-8"))
    data["inputs"]["train"]["path"] = "/etc/passwd"
    path.write_text(json.dumps(data), "utf-8")
    assert "absolute path" in check_card(card)[0]


def test_the_dataset_card_counts_and_escapes(root: Path) -> None:
    text = write_dataset(root).read_text("utf-8")
    assert "| Images | 3,786 |" in text
    assert "| train | 3,030 | 80.0 % |" in text
    assert "*and 15 more*" in text
    assert "openmoji \\| &lt;i&gt;" in text
    assert "2026-01-01 to *not recorded*" in text
    assert "**0** \\[0, 0.0097\\] <sub>n 378</sub>" in text
    assert "License: CC BY-SA 4.0" in text
    assert "license: cc-by-sa-4.0" in text
    assert "1K<n<10K" in text


def test_statistics_that_are_none_are_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="not the statistics of a manifest"):
        write_dataset(root, {"licenses": {}})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_dataset(root, {**STATISTICS, "caption_words": {"mean": float("nan")}})
