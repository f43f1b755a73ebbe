"""The model card prints what the records say, nothing else, and says what nobody measured."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from modelops.base.errors import ConfigError, UsageError
from modelops.base.files import sha256_file, write_json
from modelops.cards.about import openmoji_about, parse_about
from modelops.cards.model import write_model_card
from modelops.gates.decide import decide
from modelops.records.base import Measurement
from modelops.records.evaluation import (
    EvaluationRecord,
    MemorizationVerdict,
    OverfittingNote,
    SliceMeasurement,
)
from modelops.records.read import read_record
from modelops.training.new_project import init_project
from project_records import (
    FINAL,
    PNG,
    evaluation,
    measured,
    sampling,
    train_record,
    write_artifact,
    write_project,
)

HOSTILE = (
    "<script>alert(1)</script> | [x](javascript:alert(1)) ![p](http://e.vil/p.png) `a` **b**\n# H"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is written once; tests change copies of it."""
    directory = tmp_path_factory.mktemp("project")
    init_project(directory)
    write_project(directory)
    decide(directory / "policy.yaml", root=directory, out_path=directory / "gate/verdict.json")
    return directory


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def card_of(root: Path, **changes: Any) -> str:
    values: dict[str, Any] = {
        "train": root / "runs/pilot/train.json",
        "evaluations": {n: root / f"evaluations/{n}.json" for n in ("early", "final", "int8")},
        "artifacts": {"int8": root / "artifacts/pilot/int8/artifact.json"},
        "verdict": root / "gate/verdict.json",
        "split": root / "data/split.json",
        "dedup": root / "data/dedup_report.json",
        "pictures": {
            "Samples from fixed seeds": root / "evaluations/final/grid.png",
            "Loss curve": root / "runs/pilot/loss.png",
        },
    }
    values["about"] = openmoji_about()
    path = write_model_card(root / "cards/model_card.md", **{**values, **changes})
    return path.read_text("utf-8")


def html(card: str) -> str:
    """The card as a reader sees it, with raw HTML passed through, as the Hub does."""
    body = card.split("---\n", 2)[2]
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def test_every_measured_number_leads_to_its_record(root: Path) -> None:
    card = card_of(root)
    digest = sha256_file(root / "evaluations/final.json")
    assert f"[final.json](../evaluations/final.json) `{digest[:12]}`" in card
    assert digest in card
    assert "**21.6** \\[19.44, 23.76\\] <sub>n 256</sub>" in card
    assert "bootstrap, 300 resamples, 95 % interval, protocol" in card
    for target in re.findall(r"\]\(([^)#]+)\)", card):
        if not target.startswith("http"):
            assert (root / "cards" / target).is_file(), target


def test_the_tables_are_tables_and_the_pictures_are_shown(root: Path) -> None:
    page = html(card_of(root))
    assert page.count("<table>") >= 12
    assert "|---" not in page
    assert '<img src="grid.png" alt="Samples from fixed seeds"' in page
    assert (root / "cards/grid.png").read_bytes() == PNG
    assert "All emojis designed by OpenMoji" in page


def test_what_was_not_measured_says_so(root: Path) -> None:
    card = card_of(root)
    assert "*not measured: no Inception weights were given*" in card
    assert "*not measured: not in this record*" in card
    assert "Fairness across groups\n\n*Not measured" in card
    assert "Energy, emissions | *not measured" in card


def test_it_is_never_called_fid(root: Path) -> None:
    card = card_of(root)
    assert "**Not FID**" in card
    for line in card.splitlines():
        if line.startswith("| FID"):
            assert "21.6" not in line


def test_the_hub_reads_every_result_back(root: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card_of(root)).data
    assert (data.license, data.library_name, data.datasets) == (
        "cc-by-sa-4.0", "diffusers", ["openmoji"],
    )  # fmt: skip
    results = {(r.metric_args["evaluation"], r.metric_type): r for r in data.eval_results}
    assert len(results) == len(data.eval_results) == 10
    frechet = results["final", "frechet_distance_lite0"]
    assert frechet.metric_value == 21.6
    assert (frechet.metric_args["n"], frechet.metric_args["seed"]) == (256, 7)
    assert frechet.metric_args["record_sha256"] == sha256_file(root / "evaluations/final.json")
    assert not any(evaluation == "early" for evaluation, _ in results), "a baseline is no result"
    assert ("final", "fid") not in results, "what was not measured is no result"


def test_a_card_without_evaluations_or_verdict_is_possible_and_says_so(root: Path) -> None:
    card = card_of(
        root, evaluations={}, artifacts={}, verdict=None, split=None, dedup=None, pictures={}
    )
    assert "*Not decided yet.*" in card
    assert "*none yet*" in card
    html(card)


def test_a_failed_evaluation_is_shown_as_failed(root: Path) -> None:
    record = read_record(root / "evaluations/int8.json", EvaluationRecord)
    record.model_copy(update={"status": "failed", "error": "out of memory"}).write(
        root / "evaluations/int8.json"
    )
    card = card_of(root)
    assert "**failed**" in card
    assert "not measured: the evaluation failed: out of memory" in card
    assert "evaluation: int8" not in card, "nor offered to the Hub"
    assert "on other records than this card prints: evaluation int8" in card


def test_columns_that_do_not_compare_are_marked(root: Path) -> None:
    evaluation("artifact", "0" * 64, 5.0, extractor="clip").write(root / "evaluations/int8.json")
    assert "was measured under different protocols; its columns do not compare" in card_of(root)


def test_a_checkpoint_of_another_run_is_marked(root: Path) -> None:
    evaluation("checkpoint", "0" * 64, 5.0).write(root / "evaluations/final.json")
    assert "⚠ a checkpoint that the run does not list" in card_of(root)


def test_text_from_records_stays_text(root: Path) -> None:
    record = evaluation("checkpoint", FINAL, 21.6, sampling=sampling(scheduler=HOSTILE))
    record.metrics[f"slice.{HOSTILE}"] = measured(1, 0, 2, method=HOSTILE, warnings=[HOSTILE])
    record.metrics["clipscore"] = Measurement.missing(HOSTILE)
    record.write(root / "evaluations/final.json")
    train_record(run_name=HOSTILE).write(root / "runs/pilot/train.json")
    write_json(root / "runs/pilot/config.json", {"model": {"name": HOSTILE}})
    about = openmoji_about().model_copy(
        update={"name": HOSTILE, "summary": HOSTILE, "example_prompt": "'; rm -rf / #\n```",
                "limitations": [HOSTILE, "# H", "1. x", "--- y"], "attribution": [HOSTILE]}
    )  # fmt: skip
    card = card_of(root, about=about, pictures={HOSTILE: root / "runs/pilot/loss.png"})
    page = html(card)
    for sign in ("<script", 'href="javascript', 'e.vil/p.png"', "<strong>b</strong>"):
        assert sign not in page, sign
    assert "&lt;script&gt;" in page
    images = re.findall(r"<img src=\"([^\"]*)\"", page)
    assert images == ["loss.png"]
    headings = re.findall(r"<h1>(.*?)</h1>", page)
    assert len(headings) == 1
    columns = {row.count("<td") for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)}
    assert columns <= {0, 2, 3, 4, 5, 6}
    assert "rm -rf / #\\n" not in card and "\\u0027; rm -rf" in card


def test_groups_and_copying_are_told(root: Path) -> None:
    def group(verdict: str, **more: Any) -> SliceMeasurement:
        return SliceMeasurement.model_validate(
            {"by": "words", "value": HOSTILE, "metric": "lit_alignment_gain", "verdict": verdict,
             "n_groups": 12, "n_prompts": 12, "inside": measured(0.125, 0.1, 0.2),
             "rest": measured(0.5, 0.4, 0.6), "difference": measured(-0.375, -0.5, -0.2), **more}
        )  # fmt: skip

    record = evaluation("checkpoint", FINAL, 21.6)
    record.slices = [group("differs"), group("too few", value="three of them")]
    record.memorization = MemorizationVerdict(
        answer="cannot tell", reason=f"too few {HOSTILE}", rule="a rule", alpha=0.05,
        overfitting=OverfittingNote(answer="overfitting", reason="validation stands still"),
    )  # fmt: skip
    record.write(root / "evaluations/final.json")
    page = html(card_of(root))
    assert "<strong>differs</strong>" in page and "<strong>0.125</strong>" in page
    assert "three of them" not in page
    assert "final: cannot tell: too few" in page
    assert "final: overfitting: validation stands still" in page
    assert "<script" not in page
    widths = {row.count("<td") for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)}
    assert 7 in widths and widths <= {0, 2, 3, 4, 5, 6, 7}, "no cell is torn by a bar in a name"


def test_nan_is_refused(root: Path) -> None:
    path = root / "evaluations/final.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace('"value": 21.6', '"value": NaN'), "utf-8")
    with pytest.raises(UsageError, match=r"final\.json.*finite"):
        card_of(root)
    assert not (root / "cards/model_card.md").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "runs/pilot/none.json"}, "none.json"),
        ({"train": "evaluations/final.json"}, "expected 'train'"),
        ({"evaluations": {"final": "nowhere.json"}}, "nowhere.json"),
        ({"pictures": {"grid": "nowhere.png"}}, "nowhere.png"),
        ({"pictures": {"grid": "policy.yaml"}}, "not a PNG"),
    ],
)
def test_what_is_missing_is_named(root: Path, changes: dict[str, Any], message: str) -> None:
    def below(value: Any) -> Any:
        return {k: root / v for k, v in value.items()} if isinstance(value, dict) else root / value

    with pytest.raises(UsageError) as caught:
        card_of(root, **{key: below(value) for key, value in changes.items()})
    assert message in str(caught.value)


def test_another_runs_config_is_refused(root: Path) -> None:
    write_json(root / "runs/pilot/config.json", {"config_sha256": "0" * 64, "config": {}})
    with pytest.raises(UsageError, match="not the config of the run"):
        card_of(root)


def test_the_runs_settings_are_listed(root: Path) -> None:
    config = {"config": {"training": {"lr": 1e-4, "betas": [0.9, 0.99]}, "ema": {"use": True}}}
    write_json(root / "runs/pilot/config.json", config)
    card = card_of(root)
    assert "| `training.lr` | `0.0001` |" in card
    assert "| `training.betas` | `0.9, 0.99` |" in card


def test_warnings_units_and_details_stand_beside_the_number(root: Path) -> None:
    record = evaluation("checkpoint", FINAL, 21.6)
    record.metrics["lit_retrieval_top1"] = measured(
        0.25, 0.2, 0.3, unit="rate", warnings=["few | prompts"], details={"chance": 1 / 128}
    )
    record.write(root / "evaluations/final.json")
    card = card_of(root)
    assert "| Own prompt found first <sub>rate</sub> |" in card
    assert "**0.25** \\[0.2, 0.3\\] <sub>n 256</sub> ⚠1 |" in card
    assert "- ⚠1 few \\| prompts" in card
    assert "`chance 0.007812`" in card


def test_no_path_of_one_machine_is_printed(root: Path) -> None:
    for name in ("early", "final", "int8"):
        path = root / f"evaluations/{name}.json"
        record = read_record(path, EvaluationRecord)
        record.source.uri = str(root / record.source.uri)
        record.write(path)
    card = card_of(root)
    assert str(root) not in card
    assert 'from_pretrained("runs/pilot/checkpoints/step-2000"' in card


def test_a_failed_parity_is_not_shown_as_passed(root: Path) -> None:
    from modelops.records.export import ParityCheck

    bad = ParityCheck(name="u", measure="max_abs_error", value=1, bound=0.1, passed=False, n=2)
    write_artifact(root / "artifacts/pilot/int8", parity=[bad], speed={})
    card = card_of(root)
    assert "| `u` | max abs error | 1 | ≤ 0.1 | **failed** | 2 |" in card
    assert "Speed: *not measured*." in card


def test_about_refuses_unknown_keys_and_missing_ones() -> None:
    good = openmoji_about().model_dump()
    with pytest.raises(ConfigError, match="did you mean 'limitations'"):
        parse_about({**good, "limitation": []}, source="about.yaml")
    with pytest.raises(ConfigError, match=r"about\.yaml: license"):
        parse_about({k: v for k, v in good.items() if k != "license"}, source="about.yaml")
