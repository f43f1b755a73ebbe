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


@pytest.mark.parametrize("write", ["emit", "say", "show", "table"])
def test_control_characters_of_others_do_not_reach_a_terminal(
    write: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "pilot\x1b[2J\x9b31m"
    if write == "emit":
        output.emit({}, text=hostile)
    elif write == "table":
        output.table(["name"], [[hostile]], title=hostile)
    else:
        getattr(output, write)(hostile)
    shown = "".join(capsys.readouterr())
    assert "\\u001b[2J\\u009b31m" in shown and not {"\x1b", "\x9b"} & set(shown)
