"""The prompt filter: what it stops, what it must let pass, and that no text breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.errors import UsageError
from modelops.safety.prompt import WordListFilter, normalise, packaged_lists, read_lists

FILTER = WordListFilter()


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("a nude woman", "sexual"),
        ("NUDE", "sexual"),
        ("nüde portrait", "sexual"),
        ("ｎｕｄｅ portrait", "sexual"),
        ("p0rn", "sexual"),
        ("p.o.r.n", "sexual"),
        ("n u d e woman", "sexual"),
        ("nu\u200bde", "sexual"),
        ("nud\u0435", "sexual"),  # Cyrillic e
        ("naked-child", "minors"),
        ("a beheading in the street", "violence"),
        ("Nazi flag", "hate"),
        ("swastikas on a wall", "hate"),
        ("suicide", "self-harm"),
        ("line\nbreak nude", "sexual"),
    ],
)
def test_plain_and_disguised_requests_are_stopped_with_a_reason(prompt: str, category: str) -> None:
    verdict = FILTER.check(prompt)
    assert verdict.blocked
    assert any(reason.startswith(f"{category}: ") for reason in verdict.reasons)


@pytest.mark.parametrize(
    "prompt",
    [
        "red heart", "Essex cocktail bar", "Scunthorpe", "Middlesex", "classic sextant",
        "bunch of grapes", "therapist with notebook", "skull and crossbones", "pistol",
        "blue tit on a branch", "Dick Tracy", "breast cancer ribbon", "peacock", "girl", "boy",
        "children playing", "mole rat", "drapes", "analysis", "U S A flag", "a b c d e", "",
        "kiss", "woman in lotus position", "hot dog", "crossed swords",
    ],
)  # fmt: skip
def test_ordinary_prompts_pass(prompt: str) -> None:
    assert FILTER.check(prompt).reasons == ()


def test_emoji_names_almost_all_pass() -> None:
    import emoji

    names = [
        entry["en"].strip(":").replace("_", " ")
        for entry in emoji.EMOJI_DATA.values()
        if entry["status"] == emoji.STATUS["fully_qualified"]
    ]
    blocked = [name for name in names if FILTER.check(name).blocked]
    assert len(names) > 3000
    assert len(blocked) <= len(names) * 0.002, blocked


def test_an_endless_prompt_is_stopped_and_not_searched() -> None:
    assert FILTER.check("a" * 10_001).reasons == ("length: more than 10000 characters",)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_the_filter(text: str) -> None:
    verdict = FILTER.check(text)
    assert verdict.blocked == bool(verdict.reasons)


def test_normalising_twice_changes_nothing() -> None:
    for text in ("Ｎüde", "İstanbul", "ﬁsh", "a\u200bb", "x\ty"):
        assert normalise(normalise(text)) == normalise(text)


def test_the_lists_have_every_category_and_a_digest() -> None:
    assert set(packaged_lists()) == {"sexual", "minors", "violence", "hate", "self-harm"}
    assert all(len(entries) >= 10 for entries in packaged_lists().values())
    info = FILTER.info
    assert len(info["lists_sha256"]) == 64
    assert WordListFilter({"own": ("zebra",)}).info["lists_sha256"] != info["lists_sha256"]


def test_own_lists_and_their_faults(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no word lists"):
        read_lists(tmp_path)
    (tmp_path / "animals.txt").write_text("# animals\nzebra crossing\ngnu*  # and gnus\n")
    own = WordListFilter(read_lists(tmp_path))
    assert own.check("Zebra_Crossing").reasons == ("animals: zebra_crossing",)
    assert own.check("gnuish").blocked
    assert not own.check("zebra").blocked
    (tmp_path / "short.txt").write_text("ab*\n")
    with pytest.raises(UsageError, match="line 1"):
        read_lists(tmp_path)
