"""Cards of models and data of others: nothing is guessed, and nothing is contradicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelops.base.errors import ConfigError, UsageError
from modelops.cards.about import openmoji_about, parse_about
from modelops.cards.check import check_card
from modelops.cards.dataset import write_dataset_card
from modelops.cards.licences import HUB_LICENCES, front_matter_id
from modelops.cards.model import write_model_card
from modelops.cli.main import main
from modelops.records.base import InputRef
from modelops.records.evaluation import SourceInfo
from project_records import (
    EARLY,
    FINAL,
    evaluation,
    train_record,
    write_artifact,
    write_project,
)


def front_matter(card: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.read_text("utf-8").split("---\n")[1])
    return found


@pytest.mark.parametrize(
    ("source", "snippet"),
    [
        (SourceInfo(kind="checkpoint", uri="stable-diffusion", sha256=EARLY), True),
        (SourceInfo(kind="endpoint", uri="https://example.org/v1", sha256=None), False),
        (SourceInfo(kind="folder", uri="images", sha256=FINAL), False),
    ],
)
def test_a_card_without_a_training_run(
    tmp_path: Path, source: SourceInfo, snippet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "e.json"
    evaluation("checkpoint", EARLY, 21.6, source=source).write(record)
    card = tmp_path / "model_card.md"
    assert main(["card", "model", "--evaluation", f"final={record}", "--out", str(card)]) == 0
    assert check_card(card) == []
    text = card.read_text("utf-8")
    assert "not trained here; who made the weights, and from what, is not stated" in text
    assert f"| final | {source.kind} `" in text and "**21.6**" in text
    assert ("from_pretrained" in text) == snippet == ("library_name" in front_matter(card))
    assert "trust_remote_code" not in text
    assert "datasets" not in front_matter(card), "nobody has named one"
    assert "OpenMoji" not in text and front_matter(card)["license"] == "unknown"


def test_a_card_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "model", "--out", str(tmp_path / "c.md")]) == 2
    assert "give --train, --evaluation NAME=FILE or --artifact" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


MANIFEST = InputRef(path="data/manifest.csv", sha256="c" * 64)


@pytest.mark.parametrize(
    ("reference", "manifest", "expected"),
    [
        ("data/manifest.csv#val", "c" * 64, ("openmoji", "OpenMoji", "val")),
        ("data/manifest.csv#test", "c" * 64, ("openmoji", "OpenMoji", "test")),
        ("coco/m.parquet#test", "d" * 64, ("manifest", "manifest m.parquet", "test")),
        ("coco/m.parquet#test", None, ("manifest", "manifest m.parquet", "test")),
        ("photos", None, ("folder", "folder photos", None)),
        ("inception.npz", None, ("file", "file inception.npz", None)),
        (None, None, ("none", "no data set, 256 prompts", None)),
    ],
)
def test_the_hub_hears_what_was_really_measured(
    tmp_path: Path, reference: str | None, manifest: str | None, expected: tuple[str, str, str]
) -> None:
    """Case G2: `split: test` stood there whatever was measured."""
    evaluation(
        "checkpoint", FINAL, 21.6,
        reference=InputRef(path=reference, sha256="e" * 64) if reference else None,
        inputs={"manifest": InputRef(path="m", sha256=manifest)} if manifest else {},
    ).write(tmp_path / "e.json")  # fmt: skip
    train_record(inputs={"manifest": MANIFEST}).write(tmp_path / "train.json")
    card = write_model_card(
        tmp_path / "card.md", train=tmp_path / "train.json",
        evaluations={"final": tmp_path / "e.json"}, about=openmoji_about(),
    )  # fmt: skip
    (result,) = front_matter(card)["model-index"][0]["results"]
    data = result["dataset"]
    assert (data["type"], data["name"], data.get("split")) == expected
    assert expected[1] in card.read_text("utf-8").split("## Evaluation")[1]


def test_evaluations_of_different_splits_stay_apart(tmp_path: Path) -> None:
    for name, split in (("v", "val"), ("t", "test")):
        evaluation(
            "checkpoint", FINAL, 21.6, inputs={"manifest": MANIFEST},
            reference=InputRef(path=f"{MANIFEST.path}#{split}", sha256="e" * 64),
        ).write(tmp_path / f"{name}.json")  # fmt: skip
    card = write_model_card(
        tmp_path / "card.md",
        evaluations={name: tmp_path / f"{name}.json" for name in ("v", "t")},
    )
    results = front_matter(card)["model-index"][0]["results"]
    found = {
        (result["dataset"]["split"], metric["args"]["evaluation"])
        for result in results
        for metric in result["metrics"]
    }
    assert found == {("val", "v"), ("test", "t")}


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_waiver_stands_beside_the_numbers(tmp_path: Path, precision: str) -> None:
    waiver = "x 0.59 of onnxruntime, kept by --allow"
    write_artifact(tmp_path / "a", error=waiver, precision=precision)
    write_artifact(tmp_path / "b", precision=precision)
    card = write_model_card(
        tmp_path / "card.md",
        evaluations={},
        artifacts={"slow": tmp_path / "a/artifact.json", "fast": tmp_path / "b/artifact.json"},
    )
    slow, fast = card.read_text("utf-8").split("### slow")[1].split("### fast")
    assert f"⚠ **Kept although it was refused**: {waiver}." in slow
    assert slow.index(waiver) < slow.index("| Parity with its source")
    assert "although" not in fast


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"license": "mit"}, {"license": "mit"}),
        ({"license": "CC-BY-SA-4.0"}, {"license": "cc-by-sa-4.0"}),
        ({"license": "CC BY 4.0"}, {"license": "cc-by-4.0"}),
        (
            {"license": "LicenseRef-ACME-internal", "license_link": "LICENSE"},
            {"license": "other", "license_name": "licenseref-acme-internal",
             "license_link": "LICENSE"},
        ),
        (
            {"license": "other", "license_name": "acme", "license_link": "https://acme.example/l"},
            {"license": "other", "license_name": "acme", "license_link": "https://acme.example/l"},
        ),
    ],
)  # fmt: skip
def test_licences_that_the_hub_reads(
    tmp_path: Path, keys: dict[str, str], expected: dict[str, str]
) -> None:
    about = parse_about({**openmoji_about().model_dump(), **keys}, source="about.yaml")
    write_artifact(tmp_path / "a")
    card = write_model_card(
        tmp_path / "card.md", evaluations={}, artifacts={"a": tmp_path / "a/artifact.json"},
        about=about,
    )  # fmt: skip
    found = front_matter(card)
    assert {key: found[key] for key in found if key.startswith("license")} == expected
    assert check_card(card) == []


@pytest.mark.parametrize("key", ["license", "dataset_license"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"": "cc-by-sa"}, "did you mean cc-by-sa-3.0 or cc-by-sa-4.0"),
        ({"": "apache"}, "did you mean apache-2.0"),
        ({"": "GPL-3.0-or-later"}, "did you mean gpl-3.0"),
        ({"": "all rights reserved"}, "the Hugging Face Hub knows no licence"),
        ({"": ""}, "the Hugging Face Hub knows no licence"),
        ({"": "other"}, "_name: missing"),
        ({"": "other", "_name": "acme"}, "_link: missing"),
        ({"": "LicenseRef-ACME"}, "_link: missing"),
        ({"": "LicenseRef-ACME", "_link": "../../etc/passwd"}, "neither a file beside the card"),
        ({"": "LicenseRef-ACME", "_link": "javascript:alert(1)"}, "neither a file beside the"),
        ({"": "mit", "_name": "acme"}, "_name: has no effect"),
        ({"": "mit", "_link": "LICENSE"}, "_link: has no effect"),
    ],
)
def test_licences_that_it_does_not_read_are_refused(
    key: str, keys: dict[str, str], message: str
) -> None:
    stated = {f"{key}{end}": text for end, text in keys.items()}
    with pytest.raises(ConfigError) as caught:
        parse_about({**openmoji_about().model_dump(), **stated}, source="about.yaml")
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert key in caught.value.message


def test_the_list_is_the_hubs() -> None:
    assert len(set(HUB_LICENCES)) == len(HUB_LICENCES) == 82
    assert {"openrail++", "llama4", "apache-2.0", "unknown"} <= set(HUB_LICENCES)
    assert front_matter_id("LicenseRef-x") == "other" == front_matter_id("Other")


def dataset(folder: Path, counts: dict[str, int], about: dict[str, str] | None = None) -> Path:
    words = {**openmoji_about().model_dump(), **about} if about else None
    return write_dataset_card(
        folder / "dataset_card.md",
        statistics={"samples": sum(counts.values()), "licenses": counts},
        about=parse_about(words, source="about.yaml") if words else None,
    )


@pytest.mark.parametrize(
    ("counts", "about", "expected"),
    [
        ({"CC-BY-SA-4.0": 40}, {"dataset_license": "cc-by-sa-4.0"}, "cc-by-sa-4.0"),
        ({"CC0-1.0": 40}, None, "cc0-1.0"),
        ({"CC0-1.0": 40, "MIT": 3}, None, ["cc0-1.0", "mit"]),
        ({"LicenseRef-ACME-internal": 40}, None, "other"),
        ({"CC0-1.0": 40, "LicenseRef-ACME": 3}, None, ["cc0-1.0", "other"]),
        ({}, None, "unknown"),
        (
            {"CC0-1.0": 40, "LicenseRef-ACME": 3},
            {"dataset_license": "other", "dataset_license_name": "mixed",
             "dataset_license_link": "LICENSE"},
            "other",
        ),
    ],
)  # fmt: skip
def test_a_dataset_card_has_the_licences_of_its_manifest(
    tmp_path: Path, counts: dict[str, int], about: dict[str, str] | None, expected: Any
) -> None:
    card = dataset(tmp_path, counts, about)
    assert front_matter(card)["license"] == expected
    assert check_card(card) == []


@pytest.mark.parametrize("counts", [{"LicenseRef-ACME-internal": 40}, {"MIT": 1, "CC0-1.0": 9}])
def test_and_is_refused_where_it_would_contradict_it(
    tmp_path: Path, counts: dict[str, int]
) -> None:
    """Case G1: `cc-by-sa-4.0` stood above `LicenseRef-ACME-internal | 40 | 100.0 %`."""
    with pytest.raises(ConfigError, match=r"images are under .*, dataset_license says cc-by-sa"):
        dataset(tmp_path, counts, {"dataset_license": "cc-by-sa-4.0"})


def test_a_verdict_that_was_refused_is_not_printed(tmp_path: Path) -> None:
    write_project(tmp_path)
    split = tmp_path / "data/split.json"
    split.write_text(json.dumps({**json.loads(split.read_text()), "status": "refused"}))
    with pytest.raises(UsageError, match="the split record says refused"):
        write_model_card(
            tmp_path / "card.md", train=tmp_path / "runs/pilot/train.json", evaluations={},
            split=split,
        )  # fmt: skip
