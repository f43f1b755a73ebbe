"""JSON values that were changed in one place, as a fuzzer or a forger would."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_DELETED = object()
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "pass", "ok", [], {}, -1, 0, 1, 1e308, 10**30, float("nan"),
    float("inf"), "f" * 64, "../x", "\0",
)  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change: the place, by keys from the top, what was there and what is there now."""

    place: tuple[Any, ...]
    old: Any
    new: Any

    def __str__(self) -> str:
        new = "deleted" if self.new is _DELETED else repr(self.new)[:40]
        return f"{'.'.join(map(str, self.place))}: {new}"

    def of(self, data: Any) -> Any:
        """A copy of `data` with this change."""
        if not self.place:
            return None if self.new is _DELETED else self.new
        changed = copy.deepcopy(data)
        inner = changed
        for key in self.place[:-1]:
            inner = inner[key]
        if self.new is _DELETED:
            del inner[self.place[-1]]
        else:
            inner[self.place[-1]] = self.new
        return changed

    def write(self, path: Path, data: Any) -> None:
        """Write `data` with this change."""
        path.write_text(json.dumps(self.of(data)), "utf-8")


def all_mutations(data: Any, place: tuple[Any, ...] = ()) -> Iterator[Mutation]:
    """Every field deleted, negated, as text, not finite, huge, of another type or repeated."""
    news = [_DELETED, *_VALUES, [data], {"x": data}]
    if isinstance(data, int | float) and not isinstance(data, bool):
        news += [-data, str(data), data * 1_000_000]
    if isinstance(data, str):
        news.append(f"{data} ")
    if isinstance(data, list) and data:
        news += [data + data, data[:-1], data[1:]]
    for new in news:
        if type(new) is not type(data) or new != data:
            yield Mutation(place, data, new)
    items = data.items() if isinstance(data, dict) else enumerate(data) if _is_list(data) else ()
    for key, inner in items:
        yield from all_mutations(inner, (*place, key))


def deletions(data: dict[str, Any]) -> list[Mutation]:
    """Each field of the top deleted."""
    return [Mutation((key,), data[key], _DELETED) for key in data]


def some_mutations(data: Any, count: int, *, seed: int = 0) -> list[Mutation]:
    """A drawn part of all mutations, the same in every run."""
    found = list(all_mutations(data))
    if len(found) <= count:
        return found
    drawn = np.random.default_rng(seed).choice(len(found), count, replace=False)
    return [found[index] for index in sorted(drawn)]


def _is_list(data: Any) -> bool:
    return isinstance(data, list)
