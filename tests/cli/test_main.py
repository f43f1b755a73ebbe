"""What holds for every command."""

from __future__ import annotations

import json

import click
import pytest

from modelops.cli import reference
from modelops.cli.doctor import doctor
from modelops.cli.main import COMMANDS, cli, main


def commands() -> list[tuple[str, click.Command]]:
    return [(" ".join(path), command) for path, command in reference._walk(cli, ["modelops"])]


def test_every_listed_command_is_there_and_named_as_listed() -> None:
    context = click.Context(cli)
    for name in COMMANDS:
        assert cli.get_command(context, name) is not None, name


@pytest.mark.parametrize(("path", "command"), commands(), ids=[path for path, _ in commands()])
def test_every_command_explains_itself_with_an_example(path: str, command: click.Command) -> None:
    assert command.help, path
    if not isinstance(command, click.Group):
        assert f"{path} " in command.help or f"{path}\n" in command.help + "\n", (
            "a copyable example"
        )
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path}: {parameter.name} has no help"


def test_the_reference_is_up_to_date() -> None:
    doctor.get_help(click.Context(doctor))  # by itself it has no -h, and click remembers that
    assert reference.main(["--check"]) == 0


def test_a_misspelt_command_or_option_is_one_line_with_a_way_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evla"]) == 2
    assert "Did you mean 'eval'?" in capsys.readouterr().err
    assert main(["doctor", "--jsno"]) == 2
    assert "modelops doctor --help" in capsys.readouterr().err


def test_doctor_reports_as_json_and_finds_no_problem_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert code == 0, [finding for finding in findings if finding["state"] == "problem"]
    assert {"torch", "onnxruntime", "all-MiniLM-L6-v2"} <= {finding["name"] for finding in findings}
