"""All families of the zoo."""

from __future__ import annotations

import importlib.util

from zoo import cascades, dits, recent, recent_more, recent_rest, transformers, unets
from zoo.family import Family

FAMILIES: tuple[Family, ...] = (
    *unets.FAMILIES, *cascades.FAMILIES, *transformers.FAMILIES, *dits.FAMILIES, *recent.FAMILIES,
    *recent_more.FAMILIES, *recent_rest.FAMILIES,
)  # fmt: skip


def family(name: str) -> Family:
    """The family of a name."""
    return next(one for one in FAMILIES if one.name == name)


def lacks(one: Family) -> bool:
    """Whether a family's package is not installed here."""
    return bool(one.needs) and importlib.util.find_spec(one.needs) is None
