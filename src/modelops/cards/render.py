"""Templates to text, with undefined names, None and bare floats as errors."""

from __future__ import annotations

import functools
from typing import Any

import jinja2

from modelops.base.errors import ModelopsError
from modelops.cards import escape
from modelops.cards.about import TEMPLATES
from modelops.cards.numbers import record_link
from modelops.cards.sources import NOTES_BEGIN, NOTES_END


def render_template(name: str, context: dict[str, Any]) -> str:
    """Render a template of this package with an empty notes region.

    Raises:
        ModelopsError: the context lacks a name, or holds a number that was not formatted.
    """
    try:
        text = _environment().get_template(name).render(context)
    except (jinja2.UndefinedError, ValueError) as error:
        raise ModelopsError(f"{name}: {error}") from error
    lines = [line.rstrip() for line in text.split("\n")]
    kept = [line for number, line in enumerate(lines) if line or number == 0 or lines[number - 1]]
    return "\n".join(kept).rstrip("\n") + "\n"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,  # Markup passes, text is escaped by `finalize`
        finalize=escape.finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        code=escape.code,
        seconds=escape.seconds,
        megabytes=escape.megabytes,
        number=escape.number,
        literal=escape.string_literal,
        record=record_link,
    )
    environment.globals.update(
        link=escape.link, notes_begin=_mark(NOTES_BEGIN), notes_end=_mark(NOTES_END)
    )
    return environment


def _mark(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)
