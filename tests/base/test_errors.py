"""What others wrote is shown by a terminal, and not obeyed."""

from __future__ import annotations

import json

import pytest

from modelops.base.errors import EvaluationError, first_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x1b]0;title\x07b", "a\\u001b[2J\\u001b]0;title\\u0007b"),
        ("\x9b31m", "\\u009b31m"),
        ("moved\rback\b", "moved\\u000dback\\u0008"),
        ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
        ("name\udcff", "name\\udcff"),
        ("two\nlines\tand 👩\u200d💻, Żółć, 中文", "two\nlines\tand 👩\u200d💻, Żółć, 中文"),
    ],
)
def test_control_characters_are_made_visible(text: str, shown: str) -> None:
    assert printable(text) == shown
    error = EvaluationError(text, hint=text)
    assert (error.message, error.hint) == (shown, shown)
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


@pytest.mark.parametrize(
    ("text", "line"), [("\n  \n said \n more", "said"), ("", "ValueError"), (" \n", "ValueError")]
)
def test_the_first_line_that_says_anything(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
