"""What is believed: a gate, a record and a sign-off compute again what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelops.base.errors import GateFailedError, IntegrityError, UsageError
from modelops.base.files import sha256_file, sha256_tree
from modelops.cli.main import main
from modelops.gates.decide import decide
from modelops.gates.signoff import check_sign_offs, sign_off
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ParityCheck
from modelops.records.read import read_record
from modelops.records.release import Criterion, ReleaseRecord, Verdict
from modelops.releases.build import build_release
from modelops.releases.verify import verify_release
from project_records import write_artifact, write_project


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_project(tmp_path)
    (tmp_path / "policy.yaml").write_text(
        "version: 1\nsubject: artifact\n"
        "evidence: {artifact: artifacts/pilot/int8/artifact.json}\n"
        "criteria:\n  - {name: equal, evidence: artifact, parity: all}\n"
    )
    return tmp_path


def check(measure: Any, value: float, bound: float, **more: Any) -> ParityCheck:
    values = {"name": "images/openvino", "passed": True, "n": 4, **more}
    return ParityCheck(measure=measure, value=value, bound=bound, **values)


GOOD = (
    check("psnr_db", 40.0, 28.0),
    check("ssim", 0.99, 0.9),
    check("feature_distance", 0.01, 0.2),
)


@pytest.mark.parametrize(
    "bad",
    [
        check("psnr_db", 3.0, 28.0, passed=False),
        check("psnr_db", 3.0, 28.0),  # said to have passed
        check("ssim", 0.05, 0.9),
        check("feature_distance", 0.5, 0.2),
        check("psnr_db", 40.0, 28.0, n=0),
        check("psnr_db", 40.0, 28.0, passed=False),  # a waiver, or an older rule
    ],
)
@pytest.mark.parametrize("place", [0, 3])
def test_every_check_of_a_name_decides_by_its_value(
    root: Path, bad: ParityCheck, place: int
) -> None:
    def criterion(parity: list[ParityCheck]) -> Criterion:
        write_artifact(root / "artifacts/pilot/int8", parity=parity)
        return decide(root / "policy.yaml", root=root, out_path=root / "v.json").criteria[0]

    found = criterion([*GOOD[:place], bad, *GOOD[place:]])
    assert (found.answer, found.value) == ("fail", "3 of 4")
    assert bad.measure in found.reason
    found = criterion([*GOOD])
    assert (found.answer, found.value) == ("pass", "3 of 3")


def verdict(answer: Any, *answers: Any, **more: Any) -> dict[str, Any]:
    """A verdict's file as somebody might have written it."""
    lines = [
        {
            "name": f"c{i}",
            "evidence": "e",
            "metric": "m",
            "bound": "= b",
            "value": "b",
            "answer": a,
            "reason": "r",
        }
        for i, a in enumerate(answers)
    ]
    return {
        "kind": "verdict",
        "schema_version": 1,
        "status": "ok",
        "started_at": "2026-01-02T03:04:05Z",
        "answer": answer,
        "policy_sha256": "0" * 64,
        "criteria": lines,
        **more,
    }


@pytest.mark.parametrize("answers", [("fail",), ("pass", "undecided"), ("pass", "fail", "pass")])
def test_a_verdict_is_no_better_than_its_criteria(tmp_path: Path, answers: tuple[str, ...]) -> None:
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(verdict("pass", *answers)))
    with pytest.raises(UsageError, match="the answer is 'pass', that of the criteria"):
        read_record(path, Verdict)
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"w")
    with pytest.raises(UsageError, match="that of the criteria"):
        build_release(tmp_path / "r", model_dir=model, verdict=path, name="a", version="1")
    with pytest.raises(UsageError, match="that of the criteria"):
        sign_off(path, name="Ada", role="approver")


def release(folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"w")
    path = folder / "v.json"
    path.write_text(json.dumps(verdict("pass", "pass", subject_sha256=sha256_tree(model))))
    build_release(folder / "r", model_dir=model, verdict=path, name="a", version="1")
    return folder / "r"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "another"), ("version", "2"), ("defaults", {"steps": 1}), ("status", "refused"),
        ("policy_sha256", "1" * 64), ("allowed_without_pass", True), ("verdict_answer", "fail"),
        ("duration_s", 9.0), ("error", "none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("resealed", [False, True])
def test_an_edit_of_release_json_is_found(
    tmp_path: Path, field: str, value: Any, resealed: bool
) -> None:
    folder = release(tmp_path)
    assert verify_release(folder).name == "a"
    data = json.loads((folder / "release.json").read_text())
    data[field] = value
    if resealed:  # by somebody who knows how: what other files say still counts
        data = json.loads(ReleaseRecord.model_validate(data).sealed().model_dump_json())
        if field in ("name", "version", "defaults", "duration_s", "error"):
            pytest.skip("only a signature can tell")
    (folder / "release.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError):
        verify_release(folder)


@pytest.mark.parametrize("name", ["verdict.json", "verdict.txt", "verdict", "verdict.JSON"])
def test_a_failing_verdict_cannot_be_signed_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(verdict("fail", "fail")))
    with pytest.raises(GateFailedError):
        sign_off(tmp_path / name, name="Ada", role="approver")
    (tmp_path / "charter.md").write_text("# no record\n")
    sign_off(tmp_path / "charter.md", name="Ada", role="approver")


def test_a_second_signer_of_a_role_never_replaces_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    charter = tmp_path / "charter.md"
    charter.write_text("scope: small")
    written = sign_off(charter, name="Ada", role="owner")
    digest = sha256_file(written)
    with pytest.raises(UsageError, match="Ada has signed as owner"):
        sign_off(charter, name="Bob", role="owner")
    assert main(["sign-off", str(charter), "--name", "Bob", "--role", "Owner"]) == 2
    assert sha256_file(written) == digest
    sign_off(charter, name="Ada", role="owner")  # once more
    sign_off(charter, name="Bob", role="reviewer")
    charter.write_text("scope: huge")
    sign_off(charter, name="Bob", role="owner")  # the first one has lapsed
    states = {state.role: (state.name, state.state) for state in check_sign_offs(charter)}
    assert states == {"owner": ("Bob", "valid"), "reviewer": ("Bob", "lapsed")}
    assert main(["sign-off", str(charter), "--name", "Cy", "--role", "reviewer"]) == 0
    assert "replaces that of Bob" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [
    lambda text: text.encode("utf-16"),
    lambda text: (text + " and more").encode(),
    lambda text: f"[{text}]".encode(),
    lambda text: text.replace('"verdict"', '"Verdict"', 1).encode(),
    lambda text: text.replace('"kind"', '"kind": "card", "kind"', 1).encode(),
])  # fmt: skip
@pytest.mark.parametrize("name", ["verdict.json", "verdict.txt"])
def test_a_verdict_that_cannot_be_read_is_not_signed(
    tmp_path: Path, spoil: Callable[[str], bytes], name: str
) -> None:
    verdict = {"kind": "verdict", "answer": "fail", "policy_sha256": "a" * 64}
    (tmp_path / name).write_bytes(spoil(json.dumps(verdict)))
    with pytest.raises(UsageError):
        sign_off(tmp_path / name, name="Ada", role="owner")


@pytest.mark.parametrize(("bound", "value", "more"), [
    ("≤ 0.5", 9.0, {}), ("> 0.1 (low end)", 0.2, {"low": 0.05, "high": 0.3}),
    ("≤ 0.5 (worst end)", 0.4, {"low": 0.3, "high": 0.6}), ("= down", "up", {}), ("= 0", 3.0, {}),
])  # fmt: skip
def test_a_criterion_passes_within_its_bound_only(
    bound: str, value: float | str, more: dict[str, float]
) -> None:
    parts = {"name": "x", "evidence": "e", "metric": "m", "reason": "so"}
    with pytest.raises(ValueError, match="is said to pass"):
        Criterion(**parts, bound=bound, value=value, answer="pass", **more)
    assert Criterion(**parts, bound=bound, value=value, answer="fail", **more).value == value
    for right, low, high in ((0.05, 0.01, 0.1), (0.5, 0.4, 0.5)):
        Criterion(**parts, bound="≤ 0.5 (high end)", value=right, answer="pass", low=low, high=high)
    Criterion(**parts, bound="= 0", value=0.0, answer="pass")


@pytest.mark.parametrize("status", ["refused", "failed"])
def test_a_sign_off_that_is_not_ok_is_not_valid(tmp_path: Path, status: str) -> None:
    charter = tmp_path / "charter.md"
    charter.write_text("scope: small")
    written = sign_off(charter, name="Ada", role="owner")
    written.write_text(json.dumps({**json.loads(written.read_text()), "status": status}))
    assert [state.state for state in check_sign_offs(charter)] == ["broken"]


RATE = {"value": 0.1, "low": 0.0, "high": 0.2, "n": 50}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": -3}, "greater than or equal to 0"),
        ({"value": 0.5}, "outside its interval"),
        ({"value": -0.1}, "outside its interval"),
        ({"confidence": 0.01}, "greater than or equal to 0.5"),
        ({"confidence": 1.0}, "less than 1"),
        ({"value": "0.1"}, "valid number"),
        ({"n": "50"}, "valid integer"),
        ({"n": True}, "valid integer"),
        ({"high": True}, "valid number"),
        ({"low": -0.1, "value": -0.05}, "is impossible"),
        ({"high": 1.2}, "is impossible"),
    ],
)
def test_evidence_that_is_none_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "e.json"
    record = {
        "kind": "evaluation", "schema_version": 1, "status": "ok",
        "started_at": "2026-01-02T03:04:05Z",
        "source": {"kind": "folder", "uri": "images"},
    }  # fmt: skip

    def write(rate: dict[str, Any]) -> None:
        path.write_text(json.dumps({**record, "metrics": {"unsafe_rate": rate}}))

    write(RATE)
    assert read_record(path, EvaluationRecord).metrics["unsafe_rate"].n == 50
    write({**RATE, **change})
    with pytest.raises(UsageError, match=message):
        read_record(path, EvaluationRecord)


@pytest.mark.parametrize("field", ["status", "schema_version", "started_at"])
def test_what_a_record_does_not_state_is_not_guessed(tmp_path: Path, field: str) -> None:
    """A failed record without its status was `ok`, an old one without its date was of today."""
    path = tmp_path / "v.json"
    data = verdict("fail", "fail", status="failed")
    path.write_text(json.dumps(data))
    assert read_record(path, Verdict).status == "failed"
    del data[field]
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=f"{field}: missing"):
        read_record(path, Verdict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "evaluation", "kind": "verdict"}', "the key 'kind' is there twice"),
        ('{"kind": "evaluation", "n_failed_images": NaN}', "NaN is not a finite number"),
        ('{"kind": "evaluation", "n_failed_images": ' + "9" * 5000 + "}", "digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["twice", "nan", "digits", "deep"],
)
def test_json_that_nobody_should_write_is_one_line(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_record(path, EvaluationRecord)
    assert main(["report", str(path)]) == 2
    assert capsys.readouterr().err.count("Traceback") == 0


def test_true_is_not_one_in_a_policy_either(tmp_path: Path) -> None:
    write_project(tmp_path)
    record = tmp_path / "evaluations/final.json"
    policy = {
        "version": 1,
        "subject": "final",
        "evidence": {"final": str(record.relative_to(tmp_path))},
        "criteria": [
            {"name": name, "evidence": "final", "field": "n_failed_images", "equals": wanted}
            for name, wanted in (("number", 0), ("word", False))
        ],
    }
    (tmp_path / "p.yaml").write_text(json.dumps(policy))
    verdict = decide(tmp_path / "p.yaml", root=tmp_path, out_path=tmp_path / "v.json")
    assert [line.answer for line in verdict.criteria] == ["pass", "fail"]
    policy["criteria"] = [{"name": "x", "evidence": "final", "metric": "m", "at_most": 1,
                           "min_n": True}]  # fmt: skip
    (tmp_path / "p.yaml").write_text(json.dumps(policy))
    with pytest.raises(UsageError, match="min_n"):
        decide(tmp_path / "p.yaml", root=tmp_path, out_path=tmp_path / "v.json")
