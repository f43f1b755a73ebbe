"""Text stays text wherever a card puts it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from modelops.base.errors import ModelopsError
from modelops.cards.escape import code, finalize, link, markdown, number, one_line, seconds
from modelops.cards.render import render_template

TEXT = st.text(max_size=60) | st.text(alphabet="<>[]()!|`*_~#-+=1.:\\/&@$ \n\taw", max_size=40)
MARKS = {"strong", "em", "s", "code_inline", "link", "image", "html_inline", "html_block",
         "heading", "bullet_list", "ordered_list", "blockquote", "hr", "fence"}  # fmt: skip


def tokens(text: str) -> set[str]:
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = set()
    for token in page.parse(text):
        found.add(token.type.removesuffix("_open"))
        found |= {child.type.removesuffix("_open") for child in token.children or []}
    return found


@given(TEXT)
def test_no_text_becomes_markup(text: str) -> None:
    assert not tokens(markdown(text)) & MARKS


@given(TEXT)
def test_no_text_leaves_its_table_cell(text: str) -> None:
    row = (
        MarkdownIt("commonmark")
        .enable("table")
        .render(f"| a | b |\n|---|---|\n| x{markdown(text)} | {code(text)} |\n")
    )
    assert row.count("<td") == 2
    assert row.count("<tr") == 2


@given(TEXT)
def test_what_is_read_is_what_was_written(text: str) -> None:
    page = MarkdownIt("commonmark").render(f"x {markdown(text)} x")
    import html

    shown = html.unescape(page).strip().removeprefix("<p>").removesuffix("</p>")
    assert shown.split() == ["x", *one_line(text).split(), "x"]


def test_signs_that_turn_a_line_around_are_dropped() -> None:
    assert one_line("a\u202eb\u200bc\x00d\re\u2028f") == "abcd e f"
    assert one_line("\U0001f469\u200d\U0001f680") == "\U0001f469\u200d\U0001f680"


@pytest.mark.parametrize("target", ["javascript:alert(1)", "data:text/html,x", "file:///etc"])
def test_only_web_addresses_and_files_are_links(target: str) -> None:
    assert "](" not in link("label", target)


def test_a_path_with_spaces_is_one_link() -> None:
    assert link("a", "my dir/(x).json") == "[a](my%20dir/%28x%29.json)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_that_is_none(value: float) -> None:
    with pytest.raises(ValueError, match="never prints"):
        number(value)


@pytest.mark.parametrize("value", [None, 0.5, True])
def test_a_template_cannot_print_what_nobody_formatted(value: object) -> None:
    with pytest.raises(ValueError, match="cannot print"):
        finalize(value)


def test_an_undefined_name_is_an_error() -> None:
    with pytest.raises(ModelopsError, match="undefined"):
        render_template("model_card.md.j2", {})


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (21.600001, "21.6"), (1e-9, "1e-09"), (-0.003, "-0.003"),
                        (123456.0, "123,456")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_times() -> None:
    assert [seconds(s) for s in (2.25, 580.4, 7300)] == ["2.2 s", "9 min 40 s", "2 h 1 min"]
