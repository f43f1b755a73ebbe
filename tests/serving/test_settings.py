"""Settings that make no sense are refused by their variables' names, however they came."""

from __future__ import annotations

from typing import Any

import pytest

from modelops.base.errors import UsageError
from modelops.serving.settings import NodeSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("runtime", "onnx"), ("receipts_failure", "ignore"), ("receipts_prompts", ""),
        ("quarantine_stages", "some"), ("quarantine_prompts", "yes"), ("max_rows", 1),
        ("drift_sample", 1.5), ("drift_sample", float("nan")),
    ],
)  # fmt: skip
def test_what_makes_no_sense(name: str, value: Any) -> None:
    variable = f"MODELOPS_{name.upper()}"
    with pytest.raises(UsageError, match=variable):
        NodeSettings.from_environment({variable: str(value)})
    with pytest.raises(UsageError, match=variable):
        NodeSettings(**{name: value})


@pytest.mark.parametrize("text", ["", "many", "-1", "nan", "inf", "1e9", "0x10", "1,5"])
@pytest.mark.parametrize("name", ["queue_limit", "deadline_s", "threads"])
def test_what_is_no_number(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"MODELOPS_{name.upper()}={text!r}: "):
        NodeSettings.from_environment({f"MODELOPS_{name.upper()}": text})


def test_only_what_may_be_zero_is() -> None:
    zeros = {
        "MODELOPS_PROFILE_S": "0",
        "MODELOPS_THREADS": "0",
        "MODELOPS_EVALUATE_EVERY_DAYS": "0",
    }
    assert NodeSettings.from_environment(zeros) == NodeSettings(profile_s=0)
    with pytest.raises(UsageError, match="out of range"):
        NodeSettings.from_environment({"MODELOPS_DEADLINE_S": "0"})
