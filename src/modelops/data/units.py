"""Metadata groups and near-duplicate pairs to indivisible units, and units to splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelops.base.errors import UsageError
from modelops.base.seeding import derive_seed
from modelops.data.neighbours import Pairs

CAP_SHARE = 0.5  # of the smallest split: a unit grown by likeness may not be larger


@dataclass(frozen=True, slots=True)
class Units:
    """Indivisible units of samples.

    Attributes:
        unit_of: unit index of each sample.
        names: a name for each unit, the least metadata group in it.
        sizes: samples in each unit.
        cap: samples that a unit grown by likeness may hold.
        cut_pairs: near-duplicate pairs left between units because of the cap.
        linked_pairs: near-duplicate pairs across metadata groups, before any cut.
    """

    unit_of: list[int]
    names: list[str]
    sizes: list[int]
    cap: int
    cut_pairs: int
    linked_pairs: int

    def __len__(self) -> int:
        return len(self.names)

    def describe(self) -> str:
        """One line for the report."""
        if not self.cut_pairs:
            return "connected components of metadata groups and near-duplicate pairs"
        return (
            "metadata groups joined along near-duplicate pairs, most alike first, into units of at "
            f"most {self.cap} samples"
        )

    def warnings(self) -> list[str]:
        """Warnings for a reader of the split."""
        if not self.cut_pairs:
            return []
        return [
            f"likeness chains further than a split is wide: {self.cut_pairs} of "
            f"{self.linked_pairs} near-duplicate pairs between groups join different units; see "
            "leakage for what crosses the splits"
        ]


def build_units(
    groups: Sequence[str],
    pairs: Pairs,
    same: Sequence[tuple[int, int]],
    *,
    fractions: Sequence[float],
) -> Units:
    """Join samples of one group and of one image always, near duplicates while units stay small.

    Near-duplicate pairs are taken from the most alike down (single linkage), and a pair whose
    union would exceed half of the smallest split is left out: chains of small steps would otherwise
    tie most of a corpus together.
    """
    count = len(groups)
    parents = list(range(count))
    sizes = [1] * count

    def find(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def join(first: int, second: int) -> None:
        low, high = sorted((find(first), find(second)))
        if low != high:
            parents[high] = low
            sizes[low] += sizes[high]

    first_of: dict[str, int] = {}
    for index, group in enumerate(groups):
        join(first_of.setdefault(group, index), index)
    for first, second in same:
        join(first, second)
    cap = max(1, int(CAP_SHARE * min(fractions) * count))
    linked = 0
    for place in np.lexsort((pairs.second, pairs.first, -pairs.cosine)).tolist():
        first, second = int(pairs.first[place]), int(pairs.second[place])
        linked += groups[first] != groups[second]
        one, other = find(first), find(second)
        if one != other and sizes[one] + sizes[other] <= cap:
            join(one, other)
    roots = [find(index) for index in range(count)]
    numbers = {root: number for number, root in enumerate(dict.fromkeys(roots))}
    unit_of = [numbers[root] for root in roots]
    names = [""] * len(numbers)
    totals = [0] * len(numbers)
    for index, unit in enumerate(unit_of):
        names[unit] = min(names[unit] or groups[index], groups[index])
        totals[unit] += 1
    cut = sum(
        unit_of[int(first)] != unit_of[int(second)]
        for first, second in zip(pairs.first, pairs.second, strict=True)
    )
    return Units(unit_of, names, totals, cap, cut, linked)


def deal_units(units: Units, fractions: Sequence[float], *, seed: int) -> list[int]:
    """The split of each unit (0 train, 1 val, 2 test), by a hash of (seed, unit name).

    Units come in hashed order; each goes to a split drawn in proportion to the room left there.
    Every split gets at least one unit.

    Raises:
        UsageError: there are fewer units than splits.
    """
    if len(units) < len(fractions):
        raise UsageError(
            f"{len(units)} groups cannot fill {len(fractions)} splits",
            hint="add images that are not variants of one another",
        )
    total = sum(units.sizes)
    order = sorted(
        range(len(units)),
        key=lambda unit: (derive_seed(seed, "split order", units.names[unit]), unit),
    )
    room = [fraction * total for fraction in fractions]
    assigned = [0] * len(units)
    for unit in order:
        weights = [left if left >= units.sizes[unit] * 0.5 else 0.0 for left in room]
        if sum(weights) <= 0:
            choice = int(np.argmax(room))
        else:
            draw = derive_seed(seed, "split", units.names[unit]) / 2**53 * sum(weights)
            choice = int(np.searchsorted(np.cumsum(weights), draw, side="right"))
            choice = min(choice, len(weights) - 1)
        assigned[unit] = choice
        room[choice] -= units.sizes[unit]
    for split in range(len(fractions)):
        if split not in assigned:
            spare = [unit for unit in order if assigned.count(assigned[unit]) > 1]
            assigned[min(spare, key=lambda unit: units.sizes[unit])] = split
    return assigned
