from __future__ import annotations

from pathlib import Path

import pytest

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.steps import Chain, Step


def chain(root: Path, ran: list[str], *, factor: int = 1, fail: bool = False) -> Chain:
    def double(report: object) -> str:
        ran.append("double")
        (root / "double").write_text(str(factor * 2 * int((root / "number").read_text())))
        return "doubled"

    def show(report: object) -> str:
        ran.append("show")
        if fail:
            raise ModelopsError("no")
        (root / "shown").mkdir(exist_ok=True)
        (root / "shown" / "text").write_text((root / "double").read_text())
        return "shown"

    return Chain(
        root,
        [
            Step(name="double", title="Double", run=double, inputs=["number"], outputs=["double"],
                 settings={"factor": factor}),
            Step(name="show", title="Show", run=show, inputs=["double"], outputs=["shown"]),
        ],
    )  # fmt: skip


def states(results: object) -> list[str]:
    return [result.state for result in results]  # type: ignore[attr-defined]


def test_only_what_changed_runs_again(tmp_path: Path) -> None:
    ran: list[str] = []
    (tmp_path / "number").write_text("4")
    assert states(chain(tmp_path, ran).run()) == ["done", "done"]
    assert states(chain(tmp_path, ran).run()) == ["fresh", "fresh"]
    (tmp_path / "shown" / "text").write_text("edited by hand")
    assert states(chain(tmp_path, ran).run()) == ["fresh", "done"]
    (tmp_path / "number").write_text("5")
    assert states(chain(tmp_path, ran).run()) == ["done", "done"]
    assert states(chain(tmp_path, ran, factor=2).run()) == ["done", "done"]
    assert states(chain(tmp_path, ran, factor=2).run(force=["double"])) == ["done", "fresh"]
    assert (tmp_path / "shown" / "text").read_text() == "20"


def test_a_failed_step_keeps_what_came_before(tmp_path: Path) -> None:
    ran: list[str] = []
    (tmp_path / "number").write_text("4")
    with pytest.raises(ModelopsError, match="no"):
        list(chain(tmp_path, ran, fail=True).run())
    assert states(chain(tmp_path, ran).run()) == ["fresh", "done"]


def test_missing_input_and_unknown_step_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="number is missing"):
        list(chain(tmp_path, []).run())
    with pytest.raises(UsageError, match="no step named dubble"):
        list(chain(tmp_path, []).run(force=["dubble"]))
