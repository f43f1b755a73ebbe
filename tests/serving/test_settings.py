"""Settings that make no sense are refused by their variables' names, however they came."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from modelops.base.errors import UsageError
from modelops.cli.main import cli
from modelops.serving.settings import OF_COMMANDS, NodeSettings, known_variables


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("runtime", "onnx"), ("receipts_failure", "ignore"), ("receipts_prompts", "none"),
        ("quarantine_stages", "some"), ("quarantine_prompts", "yes"), ("max_rows", 1),
        ("drift_sample", 1.5), ("drift_sample", float("nan")), ("page", "maybe"), ("workers", 65),
        ("log_keep", 1.5), ("images_per_minute", 0),
    ],
)  # fmt: skip
def test_what_makes_no_sense(name: str, value: Any) -> None:
    variable = f"MODELOPS_{name.upper()}"
    with pytest.raises(UsageError, match=variable):
        NodeSettings.from_environment({variable: str(value)})
    with pytest.raises(UsageError, match=variable):
        NodeSettings(**{name: value})


@pytest.mark.parametrize("text", ["many", "-1", "nan", "inf", "1e9", "0x10", "1,5"])
@pytest.mark.parametrize("name", ["queue_limit", "deadline_s", "threads"])
def test_what_is_no_number(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"MODELOPS_{name.upper()}={text!r} "):
        NodeSettings.from_environment({f"MODELOPS_{name.upper()}": text})


def test_only_what_may_be_zero_is() -> None:
    zeros = {
        "MODELOPS_PROFILE_S": "0",
        "MODELOPS_THREADS": "0",
        "MODELOPS_EVALUATE_EVERY_DAYS": "0",
    }
    assert NodeSettings.from_environment(zeros) == NodeSettings(profile_s=0)
    with pytest.raises(UsageError, match="should be greater than 0"):
        NodeSettings.from_environment({"MODELOPS_DEADLINE_S": "0"})


def test_an_empty_variable_is_not_set() -> None:
    empty = dict.fromkeys(known_variables(), "")
    assert NodeSettings.from_environment(empty) == NodeSettings()


def test_what_was_given_is_what_another_process_reads() -> None:
    given = NodeSettings(
        workers=2, page=False, log_mb=0.02, log_prompts=True, receipts="a folder",
        api_keys=("ab" * 32, "cd" * 32), allowed_origins=("https://studio.example",),
        images_per_minute=60, drift_sample=0.25,
    )  # fmt: skip
    assert NodeSettings.from_environment(given.to_environment()) == given
    assert len(given.to_environment()) == 9


def test_a_key_that_stands_where_a_digest_should_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        NodeSettings.from_environment({"MODELOPS_API_KEYS": "mo-secret"})
    assert "secret" not in str(caught.value)
    shown = NodeSettings(api_keys=("ab" * 32,)).table()
    assert [row["value"] for row in shown if row["variable"] == "MODELOPS_API_KEYS"] == ["(set)"]


def test_the_settings_print_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_WORKERS", "2")
    result = CliRunner().invoke(cli, ["serve", "settings", "--json"])
    rows = {row["variable"]: row for row in json.loads(result.output)["settings"]}
    assert set(rows) == known_variables() - set(OF_COMMANDS)
    assert rows["MODELOPS_WORKERS"]["value"] == "2" and rows["MODELOPS_WORKERS"]["set"]
    assert all(row["about"].endswith(".") for row in rows.values())
    text = CliRunner().invoke(cli, ["serve", "settings"]).output
    assert "* MODELOPS_WORKERS=2 (default 1)\n" in text and "  MODELOPS_PAGE=1\n" in text
    monkeypatch.setenv("MODELOPS_WORKRES", "3")
    assert "MODELOPS_WORKERS is one" in str(
        CliRunner().invoke(cli, ["serve", "settings"]).exception
    )
