"""However a filter fails, its guard says so, and lets nothing through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from modelops.serving.moderation.guard import FilterError, FilterGuard

IMAGE = np.zeros((8, 8, 3), np.uint8)


def lazy() -> Iterator[Any]:
    yield SimpleNamespace(score=0.1, blocked=False)
    raise RuntimeError("in the middle of its answer")


@pytest.mark.parametrize(
    "answer",
    [
        None, 5, [None], [], [SimpleNamespace(score="low", blocked=False)],
        [SimpleNamespace(score=0.1)], [SimpleNamespace(score=0.1, blocked="no")],
        [SimpleNamespace(score=float("nan"), blocked=False)],
        [SimpleNamespace(score=1.1, blocked=False)],
        [SimpleNamespace(score=0.1, blocked=False)] * 3, lazy(),
    ],
    ids=range(11),
)  # fmt: skip
def test_an_answer_that_is_none_turns_the_guard_red(answer: Any) -> None:
    guard = green(lambda images: answer)
    with pytest.raises(FilterError):
        guard.check_images([IMAGE, IMAGE])
    assert guard.reason is not None
    guard.close()


@pytest.mark.parametrize(
    "answer",
    [
        None, True, SimpleNamespace(), SimpleNamespace(blocked="no"),
        SimpleNamespace(blocked=True, reasons=None), SimpleNamespace(blocked=False, reasons=lazy()),
    ],
    ids=range(6),
)  # fmt: skip
def test_the_same_of_prompts(answer: Any) -> None:
    guard = green(lambda text: answer)
    with pytest.raises(FilterError):
        guard.check_prompt("a zebra")
    assert guard.reason is not None
    guard.close()


def test_who_waited_too_long_behind_others_did_not_hang() -> None:
    """The filter is still at the first one; the second is not begun, then or later."""
    begun, go, seen = threading.Event(), threading.Event(), []

    def check(text: str) -> Any:
        seen.append(text)
        begun.set()
        go.wait()
        return SimpleNamespace(blocked=False, reasons=[])

    guard = green(check)
    guard.timeout_s = 60.0
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(guard.check_prompt("first")))
    first.start()
    assert begun.wait(60)
    guard.timeout_s = 0.05
    with pytest.raises(FilterError, match="no answer"):
        guard.check_prompt("second")
    guard.timeout_s = 60.0
    go.set()
    first.join(60)
    assert guard.check_prompt("third") == (False, [])  # not "still hangs"
    assert answers == [(False, [])] and seen == ["first", "third"]
    guard.close()


def green(check: Any) -> FilterGuard:
    guard = FilterGuard("own", lambda: SimpleNamespace(check=check))
    assert guard.probe(lambda: None) and guard.reason is None
    return guard
