"""A sign-off holds exactly as long as the file is what was signed."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelops.base.errors import GateFailedError, GateUndecidedError, UsageError
from modelops.gates.decide import decide
from modelops.gates.signoff import check_sign_offs, sign_off
from modelops.records.read import read_record
from modelops.records.release import Verdict
from modelops.training.new_project import init_project
from project_records import write_project


def test_a_sign_off_lapses_when_the_file_changes(tmp_path: Path) -> None:
    charter = tmp_path / "charter.md"
    charter.write_text("scope: small", "utf-8")
    written = sign_off(charter, name="Ada", role="Product owner")
    assert written.name == "charter.md.signoff-product-owner.json"
    assert [(s.state, s.name, s.role) for s in check_sign_offs(charter)] == [
        ("valid", "Ada", "Product owner")
    ]
    charter.write_text("scope: huge", "utf-8")
    assert [s.state for s in check_sign_offs(charter)] == ["lapsed"]
    charter.write_text("scope: small", "utf-8")
    assert [s.state for s in check_sign_offs(charter)] == ["valid"]


def test_a_sign_off_of_another_file_is_not_one_of_this(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("same", "utf-8")
    signed = sign_off(tmp_path / "a.md", name="Ada", role="r")
    signed.rename(tmp_path / "b.md.signoff-r.json")
    assert [s.state for s in check_sign_offs(tmp_path / "b.md")] == ["lapsed"]
    (tmp_path / "b.md.signoff-x.json").write_text("{}", "utf-8")
    assert sorted(s.state for s in check_sign_offs(tmp_path / "b.md")) == ["broken", "lapsed"]


@pytest.mark.parametrize("field", ["name", "role", "statement"])
@pytest.mark.parametrize("text", ["", "  ", "two\nlines", "\u202eback"])
def test_unreadable_words_are_refused(tmp_path: Path, field: str, text: str) -> None:
    (tmp_path / "a.md").write_text("x", "utf-8")
    words = {"name": "Ada", "role": "r", "statement": "yes", field: text}
    with pytest.raises(UsageError, match=f"--{field}"):
        sign_off(tmp_path / "a.md", **words)


def test_only_a_verdict_that_passes_can_be_signed(tmp_path: Path) -> None:
    init_project(tmp_path)
    write_project(tmp_path)
    out = tmp_path / "gate/verdict.json"
    decide(tmp_path / "policy.yaml", root=tmp_path, out_path=out)
    sign_off(out, name="Ada", role="release approver")
    verdict = read_record(out, Verdict)
    for answer, error in (("fail", GateFailedError), ("undecided", GateUndecidedError)):
        verdict.model_copy(update={"answer": answer}).write(out)
        with pytest.raises(error):
            sign_off(out, name="Ada", role="release approver")
    assert [s.state for s in check_sign_offs(out)] == ["lapsed"]
