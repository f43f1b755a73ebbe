"""Verdicts: what passes, what fails, and above all what may not pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelops.base.files import sha256_bytes, sha256_file, sha256_tree
from modelops.gates.decide import decide, overall
from modelops.records.base import Measurement, Record
from modelops.records.comparison import AbTestRecord, ComparisonRecord
from modelops.records.evaluation import EvaluationRecord, SliceMeasurement, SourceInfo
from modelops.records.export import ParityCheck
from modelops.records.read import read_record
from modelops.records.release import Criterion, Verdict
from modelops.records.train import CheckpointRef
from modelops.training.new_project import init_project
from project_records import (
    EARLY,
    FINAL,
    evaluation,
    measured,
    sampling,
    train_record,
    write_artifact,
    write_project,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is written once; tests change copies of it."""
    directory = tmp_path_factory.mktemp("project")
    init_project(directory)
    return write_project(directory)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def verdict_of(root: Path) -> Verdict:
    return decide(root / "policy.yaml", root=root, out_path=root / "gate/verdict.json")


def line(verdict: Verdict, name: str) -> Criterion:
    return next(criterion for criterion in verdict.criteria if criterion.name == name)


def early(**changes: Any) -> EvaluationRecord:
    return evaluation("checkpoint", EARLY, 90.0, **changes)


def rewrite(root: Path, name: str, **changes: Any) -> None:
    """An evaluation again, with some of its fields changed."""
    path = root / f"evaluations/{name}.json"
    record = read_record(path, EvaluationRecord)
    record.model_copy(update=changes).write(path)


def metric(root: Path, name: str, key: str, value: Measurement) -> None:
    record = read_record(root / f"evaluations/{name}.json", EvaluationRecord)
    rewrite(root, name, metrics={**record.metrics, key: value})


def policy(root: Path, *criteria: dict[str, Any], **changes: Any) -> None:
    data = yaml.safe_load((root / "policy.yaml").read_text("utf-8"))
    data.update(criteria=list(criteria) or data["criteria"], **changes)
    (root / "policy.yaml").write_text(yaml.safe_dump(data), "utf-8")


def test_good_records_that_belong_together_pass(root: Path) -> None:
    verdict = verdict_of(root)
    assert verdict.answer == "pass", [(c.name, c.reason) for c in verdict.criteria]
    assert verdict.subject_sha256 == sha256_tree(root / "artifacts/pilot/int8")
    assert verdict.policy_sha256 == sha256_file(root / "policy.yaml")
    final = root / "evaluations/final.json"
    assert verdict.inputs["final"].sha256 == sha256_file(final)
    learned = line(verdict, "learned")
    assert learned.bound == "≤ 0.5 × early = 45"
    assert (learned.value, learned.low) == (21.6, pytest.approx(19.44))
    assert read_record(root / "gate/verdict.json", Verdict) == verdict


def test_any_fail_wins_over_undecided_and_is_written(root: Path) -> None:
    metric(root, "final", "frechet_distance_lite0", measured(80, 70, 90, protocol="p"))
    rewrite(root, "final", protocols={"p": {}})
    rewrite(root, "early", protocols={"p": {}})
    metric(root, "early", "frechet_distance_lite0", measured(90, 80, 99, protocol="p"))
    (root / "data/smoke.json").unlink()
    verdict = verdict_of(root)
    assert line(verdict, "learned").answer == "fail"
    assert line(verdict, "data loads").answer == "undecided"
    assert verdict.answer == "fail"
    assert json.loads((root / "gate/verdict.json").read_text("utf-8"))["answer"] == "fail"


@pytest.mark.parametrize("kind", ["comparison", "abtest"])
def test_comparisons_and_blind_tests_decide_where_they_are_of_the_released(
    root: Path, kind: str
) -> None:
    def source(digest: str) -> SourceInfo:
        return SourceInfo(kind="checkpoint", uri="runs/a/step-1", sha256=digest)

    def evidence(second: str) -> Record:
        metrics = {"won": measured(0.7, 0.6, 0.8)}
        if kind == "comparison":
            return ComparisonRecord(
                first=source(EARLY), second=source(second), answer="pass", metrics=metrics
            )
        sources = {"A": source(EARLY), "B": source(second)}
        return AbTestRecord(question="?", sources=sources, records={}, n_pairs=9, metrics=metrics)

    data = yaml.safe_load((root / "policy.yaml").read_text("utf-8"))
    criterion = {"name": "wins", "evidence": "people", "metric": "won", "above": 0.5, "use": "low"}
    policy(root, criterion, evidence={**data["evidence"], "people": "people.json"})
    for second, answer in ((FINAL, "pass"), ("0" * 64, "undecided")):
        evidence(second).write(root / "people.json")
        verdict = verdict_of(root)
        assert verdict.answer == answer, line(verdict, "wins").reason
    assert "is not what is released" in line(verdict, "wins").reason


def test_overall_order() -> None:
    assert overall(["pass", "undecided", "fail"]) == "fail"
    assert overall(["pass", "undecided"]) == "undecided"
    assert overall(["pass"]) == "pass"


@pytest.mark.parametrize(
    ("use", "answer"), [("value", "pass"), ("low", "fail"), ("worst", "fail"), ("high", "pass")]
)
def test_the_chosen_end_of_the_interval_decides(root: Path, use: str, answer: str) -> None:
    metric(root, "final", "lit_alignment_gain", measured(0.2, -0.01, 0.4))
    policy(
        root,
        {"name": "c", "evidence": "final", "metric": "lit_alignment_gain", "above": 0, "use": use},
    )
    assert verdict_of(root).criteria[0].answer == answer


def test_zero_is_not_above_zero(root: Path) -> None:
    metric(root, "final", "lit_alignment_gain", measured(0.2, 0.0, 0.4))
    assert line(verdict_of(root), "follows prompts").answer == "fail"


@pytest.mark.parametrize(
    ("spoil", "criterion", "reason"),
    [
        (lambda p: p.unlink(), "safe", "is missing"),
        (lambda p: p.write_text("{", "utf-8"), "safe", "not JSON"),
        (lambda p: p.write_text('{"kind": "train"}', "utf-8"), "safe", "schema_version"),
        (
            lambda p: p.write_text(
                p.read_text("utf-8").replace('"high": 0.0143', '"high": NaN'), "utf-8"
            ),
            "safe",
            "finite",
        ),
    ],
)
def test_evidence_that_cannot_be_read_never_passes(
    root: Path, spoil: Any, criterion: str, reason: str
) -> None:
    spoil(root / "evaluations/int8.json")
    found = line(verdict_of(root), criterion)
    assert found.answer == "undecided"
    assert reason in found.reason
    assert str(root) not in found.reason


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_a_record_that_did_not_end_well_never_passes(root: Path, status: str) -> None:
    rewrite(root, "int8", status=status, error="out of memory")
    found = line(verdict_of(root), "safe")
    assert found.answer == "undecided"
    assert f"{status}: out of memory" in found.reason


def test_not_measured_absent_and_too_few_are_undecided(root: Path) -> None:
    metric(root, "int8", "unsafe_rate", Measurement.missing("no filter"))
    base = {"evidence": "final", "metric": "lit_alignment_gain", "above": 0}
    policy(
        root,
        {"name": "a", "evidence": "int8", "metric": "unsafe_rate", "at_most": 1},
        {"name": "b", "evidence": "final", "metric": "no_such_metric", "at_most": 1},
        {**base, "name": "c", "min_n": 257},
        {**base, "name": "d", "min_n": 256},
    )
    answers = {c.name: (c.answer, c.reason) for c in verdict_of(root).criteria}
    assert answers["a"] == ("undecided", "not measured: no filter")
    assert answers["b"][0] == "undecided"
    assert answers["c"] == ("undecided", "n = 256, fewer than the 257 asked for")
    assert answers["d"][0] == "pass"


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (early(extractor="clip"), "extractor.name: lite0 against clip"),
        (early(sampling=sampling(steps=4)), "sampling.steps: 24 against 4"),
        (early(sampling=sampling(seed=8)), "sampling.seed: 7 against 8"),
        (early(reference=None), "reference"),
    ],
)  # fmt: skip
def test_unlike_protocols_are_refused_with_what_differs(
    root: Path, other: EvaluationRecord, named: str
) -> None:
    other.write(root / "evaluations/early.json")
    found = line(verdict_of(root), "learned")
    assert found.answer == "undecided"
    assert "measured differently from early" in found.reason
    assert named in found.reason
    assert found.value == 21.6, "what was measured is still shown"


def test_another_sampler_belongs_to_the_source(root: Path) -> None:
    early(sampling=sampling(scheduler="Other")).write(root / "evaluations/early.json")
    assert line(verdict_of(root), "learned").answer == "pass"


def test_another_n_or_no_protocol_at_all_is_unlike(root: Path) -> None:
    record = read_record(root / "evaluations/early.json", EvaluationRecord)
    old = record.metrics["frechet_distance_lite0"]
    metric(root, "early", "frechet_distance_lite0", old.model_copy(update={"n": 64}))
    assert "n: 256 against 64" in line(verdict_of(root), "learned").reason
    metric(root, "early", "frechet_distance_lite0", old.model_copy(update={"protocol": None}))
    assert "protocol: not recorded" in line(verdict_of(root), "learned").reason


def test_a_ratio_to_nothing_is_undecided(root: Path) -> None:
    record = read_record(root / "evaluations/early.json", EvaluationRecord)
    old = record.metrics["frechet_distance_lite0"]
    zero = old.model_copy(update={"value": 0.0, "low": 0.0, "high": 0.0})
    metric(root, "early", "frechet_distance_lite0", zero)
    assert "means nothing" in line(verdict_of(root), "learned").reason


def test_an_evaluation_of_another_artifact_does_not_belong(root: Path) -> None:
    evaluation("artifact", sha256_bytes(b"another"), 22.0).write(root / "evaluations/int8.json")
    verdict = verdict_of(root)
    assert verdict.answer == "undecided"
    assert "does not belong together" in line(verdict, "safe").reason


def test_a_final_evaluation_of_another_checkpoint_does_not_belong(root: Path) -> None:
    evaluation("checkpoint", EARLY, 5.0).write(root / "evaluations/final.json")
    found = line(verdict_of(root), "follows prompts")
    assert found.answer == "undecided"
    assert "does not belong together" in found.reason


def test_an_artifact_exported_from_another_checkpoint_does_not_belong(root: Path) -> None:
    digest = write_artifact(root / "artifacts/pilot/int8", checkpoint=sha256_bytes(b"x"))
    evaluation("artifact", digest, 22.0).write(root / "evaluations/int8.json")
    verdict = verdict_of(root)
    assert line(verdict, "safe").answer == "pass"
    assert "does not belong together" in line(verdict, "learned").reason
    assert "no checkpoint that the subject is made of" in line(verdict, "loss falls").reason


def test_a_baseline_of_another_run_does_not_belong(root: Path) -> None:
    evaluation("checkpoint", sha256_bytes(b"x"), 900.0).write(root / "evaluations/early.json")
    assert (
        "not a checkpoint that the training record lists"
        in line(verdict_of(root), "learned").reason
    )
    policy(root, baselines={"early": "any"})
    assert line(verdict_of(root), "learned").answer == "pass"


def test_the_released_model_is_no_baseline_of_itself(root: Path) -> None:
    evaluation("checkpoint", FINAL, 900.0).write(root / "evaluations/early.json")
    assert "is the released model itself" in line(verdict_of(root), "learned").reason


def test_an_artifact_that_changed_by_a_byte_is_not_released(root: Path) -> None:
    (root / "artifacts/pilot/int8/unet/model.onnx").write_bytes(b"grapH")
    verdict = verdict_of(root)
    assert verdict.answer == "undecided"
    assert verdict.subject_sha256 is None
    assert {c.answer for c in verdict.criteria} == {"undecided"}
    assert "model.onnx" in verdict.criteria[0].reason


def test_records_of_other_shards_do_not_belong(root: Path) -> None:
    smoke = json.loads((root / "data/smoke.json").read_text("utf-8"))
    smoke["inputs"]["shard_manifest"]["sha256"] = "0" * 64
    (root / "data/smoke.json").write_text(json.dumps(smoke), "utf-8")
    assert "shards: not the same file as in train" in line(verdict_of(root), "data loads").reason
    smoke["inputs"] = {}
    (root / "data/smoke.json").write_text(json.dumps(smoke), "utf-8")
    found = line(verdict_of(root), "data loads")
    assert found.answer == "undecided"
    assert "does not say which data it is about" in found.reason


def test_a_split_by_another_dedup_report_does_not_belong(root: Path) -> None:
    rules = yaml.safe_load((root / "policy.yaml").read_text("utf-8"))
    asked = {"name": "leaks", "evidence": "split", "metric": "train_test", "at_most": 0.1}
    rules["criteria"].append(asked)
    (root / "policy.yaml").write_text(yaml.safe_dump(rules), "utf-8")
    split = json.loads((root / "data/split.json").read_text("utf-8"))
    for digest, answer in ((sha256_file(root / "data/dedup_report.json"), "pass"),
                           ("0" * 64, "undecided")):  # fmt: skip
        split["inputs"]["dedup"] = {"path": "dedup_report.json", "sha256": digest}
        (root / "data/split.json").write_text(json.dumps(split), "utf-8")
        assert line(verdict_of(root), "leaks").answer == answer


def test_parity_that_failed_fails_and_none_at_all_is_undecided(root: Path) -> None:
    bad = ParityCheck(name="unet", measure="max_abs_error", value=1, bound=0.1, passed=False, n=2)
    policy(root, {"name": "p", "evidence": "artifact", "parity": "all"})
    write_artifact(root / "artifacts/pilot/int8", parity=[bad])
    assert verdict_of(root).criteria[0].answer == "fail"
    write_artifact(root / "artifacts/pilot/int8", parity=[])
    assert verdict_of(root).criteria[0].answer == "undecided"
    policy(root, {"name": "p", "evidence": "artifact", "parity": ["vae"]})
    assert verdict_of(root).criteria[0].reason == "not checked: vae"


def test_speed_leakage_and_fields(root: Path) -> None:
    speed = {
        "evidence": "artifact",
        "metric": "speed.denoiser_batch8_over_onnxruntime_fp32",
        "use": "low",
    }
    policy(
        root,
        {**speed, "name": "faster", "at_least": 2.0},
        {**speed, "name": "much faster", "at_least": 3.0},
        {"name": "leak", "evidence": "split", "metric": "leakage.train_test", "at_most": 0.01},
        {"name": "all made", "evidence": "final", "field": "n_failed_images", "at_most": 0},
        {"name": "no such", "evidence": "final", "field": "n_failures", "at_most": 0},
        {"name": "no number", "evidence": "train", "field": "run_name", "at_most": 0},
    )
    answers = [c.answer for c in verdict_of(root).criteria]
    assert answers == ["pass", "fail", "pass", "pass", "undecided", "undecided"]


@pytest.mark.parametrize(("trend", "answer"), [("up", "fail"), ("unknown", "undecided")])
def test_an_unknown_trend_is_not_a_failed_one(root: Path, trend: str, answer: str) -> None:
    train_record(loss_trend=trend).write(root / "runs/pilot/train.json")
    assert line(verdict_of(root), "loss falls").answer == answer


def test_a_checkpoint_can_be_the_subject(root: Path) -> None:
    checkpoint = root / "runs/checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"w")
    digest = sha256_tree(checkpoint)
    evaluation("checkpoint", digest, 21.6).write(root / "evaluations/final.json")
    listed = [
        CheckpointRef(step=1, images_seen=1, path="a", sha256=EARLY),
        CheckpointRef(step=2, images_seen=2, path="b", sha256=digest),
    ]
    train_record(checkpoints=listed).write(root / "runs/pilot/train.json")
    learned = yaml.safe_load((root / "policy.yaml").read_text("utf-8"))["criteria"][2]
    policy(root, learned, subject="final")
    verdict = verdict_of(root)
    assert (verdict.answer, verdict.subject_sha256) == ("pass", digest)
    (checkpoint / "weights").write_bytes(b"v")
    assert "changed since measured" in verdict_of(root).criteria[0].reason


def test_a_symbolic_link_out_of_the_project_is_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside.json"
    (root / "data/smoke.json").rename(outside)
    (root / "data/smoke.json").symlink_to(outside)
    assert line(verdict_of(root), "data loads").answer == "undecided"


def slices(**gains: tuple[float, str]) -> list[SliceMeasurement]:
    """{tone: (alignment gain, verdict)}, each 0.05 either side; the rest has 0.2."""
    direction: dict[str, Any] = {"higher_is_better": True, "protocol": "s", "n": 12}

    def measurement(value: float) -> Measurement:
        return measured(value, value - 0.05, value + 0.05, **direction)

    return [
        SliceMeasurement(
            by="words", value=f"skin-tone:{tone}", metric="lit_alignment_gain", verdict=verdict,
            n_groups=12, n_prompts=30, inside=measurement(gain), rest=measurement(0.2),
            difference=measurement(gain - 0.2) if verdict != "too few"
            else Measurement.missing("fewer than 10 independent groups on one side"),
        )
        for tone, (gain, verdict) in gains.items()
    ]  # fmt: skip


TONES = {"dark": (0.1, "differs"), "light": (0.18, "within noise"), "medium": (-0.3, "too few")}
GAIN = "lit_alignment_gain"


@pytest.mark.parametrize(
    ("name", "bound", "answer", "reason"),
    [
        (f"slices.words.skin-tone:dark.{GAIN}", {"at_least": 0.1}, "pass", "the value 0.1 is"),
        (f"slices.words.skin-tone:dark.{GAIN}", {"at_least": 0.1, "use": "low"}, "fail", "0.05"),
        (f"slices.words.skin-tone:dark.{GAIN}.difference", {"above": -0.1, "use": "worst"}, "fail",
         "low end -0.15"),
        (f"slices.words.worst.{GAIN}", {"at_least": 0.1}, "pass",
         "skin-tone:dark is the worst of 2 slices, 1 with too few groups left out"),
        (f"slices.words.worst.{GAIN}.difference", {"at_least": -0.2, "use": "low"}, "pass",
         "-0.15"),
        (f"slices.words.worst.{GAIN}.difference", {"at_least": -0.05}, "fail", "skin-tone:dark"),
        (f"slices.words.worst.{GAIN}", {"at_least": {"plus": -0.1, "of": "early"}}, "undecided",
         "early: not measured: the evaluation has no slices"),
        (f"slices.words.skin-tone:medium.{GAIN}.difference", {"at_least": -9}, "undecided",
         "fewer than 10"),
        (f"slices.words.skin-tone:blue.{GAIN}", {"at_least": 0}, "undecided", "no slice"),
        ("slices.words.worst.unsafe_rate", {"at_most": 1}, "undecided", "no slice"),
        (f"slices.tags.worst.{GAIN}", {"at_least": 0}, "undecided", "words.skin-tone:dark"),
        (f"slices.words.worst.{GAIN}", {"at_least": 0, "min_n": 13}, "undecided", "n = 12"),
    ],
)  # fmt: skip
def test_a_policy_reads_slices(
    root: Path, name: str, bound: dict[str, Any], answer: str, reason: str
) -> None:
    rewrite(root, "final", slices=slices(**TONES))
    policy(root, {"name": "fair", "evidence": "final", "metric": name, **bound})
    found = line(verdict_of(root), "fair")
    assert found.answer == answer, found.reason
    assert reason in found.reason


def test_slices_against_those_of_a_baseline(root: Path) -> None:
    """Relative bounds take the same slice of the other record; unlike protocols do not compare."""
    same = {"s": {"metric": "gain"}}
    rewrite(root, "final", slices=slices(**TONES), protocols=same)
    rewrite(root, "early", slices=slices(dark=(0.04, "within noise")), protocols=same)
    criterion = {"name": "fair", "evidence": "final", "metric": f"slices.words.worst.{GAIN}",
                 "at_least": {"plus": 0.05, "of": "early"}}  # fmt: skip
    policy(root, criterion)
    assert line(verdict_of(root), "fair").answer == "pass"
    rewrite(root, "early", slices=slices(dark=(0.06, "within noise")), protocols=same)
    assert line(verdict_of(root), "fair").answer == "fail"
    rewrite(root, "early", protocols={"s": {"metric": "another"}})
    assert line(verdict_of(root), "fair").answer == "undecided"


def test_a_worst_slice_needs_slices_that_can_be_judged_and_a_direction(root: Path) -> None:
    policy(root, {"name": "fair", "evidence": "final", "metric": f"slices.words.worst.{GAIN}",
                  "at_least": 0})  # fmt: skip
    rewrite(root, "final", slices=slices(dark=(0.5, "too few")))
    assert "none of the 1 slices" in line(verdict_of(root), "fair").reason
    both_ways = [
        one.model_copy(update={"inside": one.inside.model_copy(update={"higher_is_better": None})})
        for one in slices(dark=(0.5, "differs"))
    ]
    rewrite(root, "final", slices=both_ways)
    found = line(verdict_of(root), "fair")
    assert found.answer == "undecided" and "no better direction" in found.reason
