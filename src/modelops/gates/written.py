"""Verdicts in a text, however they are written: JSON, YAML, or blocks of either in Markdown."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

Fields = dict[str, Any]
_FENCE = re.compile(
    r"^[ \t>]*(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t>]*\1|\Z)", re.MULTILINE | re.DOTALL
)
_INDENTED = re.compile(r"(?:^(?: {4}|\t)[^\n]*(?:\n|\Z)|^[ \t]*\n)+", re.MULTILINE)
_QUOTED = re.compile(r"^[ \t]*(?:> ?)+", re.MULTILINE)


def verdicts_in(text: str) -> list[Fields]:
    """Return every mapping in a text whose kind is verdict.

    Raises:
        RecursionError: it is nested too deeply to be read.
    """
    try:
        found = [json.loads(text, object_pairs_hook=_folded)]
    except ValueError:
        plain = _QUOTED.sub("", text)
        blocks = [match[2] for match in _FENCE.finditer(text)]
        blocks += [match[0] for match in _INDENTED.finditer(plain)]
        found = [value for part in dict.fromkeys((text, plain)) for value in _json_in(part)]
        for block in [text, *(_QUOTED.sub("", one) for one in blocks)]:
            found += _yaml_in(textwrap.dedent(block))
    return [
        one for value in found for one in _mappings(value)
        if str(one.get("kind")).strip().casefold() == "verdict"
    ]  # fmt: skip


def _json_in(text: str) -> Iterator[Any]:
    """Yield each JSON object in a text; of a key given twice the last value counts."""
    decoder = json.JSONDecoder(object_pairs_hook=_folded)
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            yield value
        except ValueError:
            end = place + 1
        place = text.find("{", end)


def _yaml_in(text: str) -> Iterator[Any]:
    """Yield each YAML document of a text up to the first that is none, with tags left aside."""
    import yaml

    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            yield _plain(node, {})
    except (yaml.YAMLError, ValueError):
        return


def _plain(node: Any, known: dict[int, Any]) -> Any:
    """Turn a YAML node into mappings, lists and texts; an alias is turned once."""
    import yaml

    if id(node) in known:
        return known[id(node)]
    if isinstance(node, yaml.MappingNode):
        made: Any = known.setdefault(id(node), {})
        pairs = [(_plain(key, known), _plain(value, known)) for key, value in node.value]
        made.update(_folded([(str(key), value) for key, value in pairs]))
        return made
    if isinstance(node, yaml.SequenceNode):
        made = known.setdefault(id(node), [])
        made += [_plain(value, known) for value in node.value]
        return made
    return node.value if node is not None else None


def _folded(pairs: list[tuple[str, Any]]) -> Fields:
    return {key.strip().casefold(): value for key, value in pairs}


def _mappings(value: Any) -> Iterator[Fields]:
    """Yield a value's mappings at any depth, each once."""
    seen: set[int] = set()
    left = [value]
    while left:
        one = left.pop()
        if id(one) in seen or not isinstance(one, dict | list):
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            yield one
        left += one.values() if isinstance(one, dict) else one
