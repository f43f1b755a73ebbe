"""What the commands print for people, where it goes into a pipe."""

from __future__ import annotations

import pytest

from modelops.cli import output


def test_a_table_in_a_pipe_breaks_no_cell(capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["a name of " + "many " * 30 + "words", "[red]1[/red]"]
    output.table(("source", "value"), [cells], title="title " * 40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title " * 40
    assert any(all(cell in line for cell in cells) for line in lines)
