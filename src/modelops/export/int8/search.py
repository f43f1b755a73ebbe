"""Search for the set of quantised groups that is fastest within an error budget.

Each group is judged by the effect of leaving it in fp32: the squared error that this removes and
the milliseconds that it costs, in the runtime that will serve the graph. Squared errors of groups
are nearly additive, so a greedy choice by error per millisecond is close to the best one. Its
prediction is then measured, and the choice is repeated with a corrected prediction until it holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from modelops.base.errors import UsageError
from modelops.base.seeding import numpy_generator
from modelops.export.graphs.graph import Graph
from modelops.export.int8.sensitivity import order_of_interest
from modelops.export.int8.variants import Variants, root_mean_square
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.timing import WARMUP, interleaved_seconds

_RESAMPLES = 1000
_TRIES = 6
_LEAST_ROUNDS = 5  # of a timing, unless fewer are asked for
_WORTH_KEEPING = 0.02  # share of the squared error that a group must add to be given up for nothing
_WHY_LIGHT = "adds error and does next to nothing of the work"
_WHY_IDLE = "adds error and saves nothing that can be told from 0"
_LEAST_SHARE = 0.005  # of a call's time: a smaller saving counts as none


@dataclass(frozen=True)
class GroupCost:
    """Error and time of one group of layers in INT8, with all others in INT8 too.

    Attributes:
        group: its name.
        nodes: number of its layers.
        squared_error: squared relative error that its rounding adds; may be below 0.
        ms_saved: milliseconds that INT8 saves a call, median; None if it was not timed.
        ms_low: lower end of the 95 % interval.
        ms_high: upper end.
        light: whether it does almost none of the work, so that INT8 saves nothing; False if its
            error is not known either.
    """

    group: str
    nodes: int
    squared_error: float
    ms_saved: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    light: bool = False


@dataclass(frozen=True)
class Decision:
    """Row of the search's table.

    Attributes:
        cost: the measured cost.
        int8: whether the group is quantised.
        why: the reason, in a few words.
        order: position in which it was given up (0 is first), or None.
    """

    cost: GroupCost
    int8: bool
    why: str
    order: int | None = None

    def as_record(self) -> dict[str, Any]:
        """Return the row as JSON values, also for a report's table."""
        root = math.copysign(math.sqrt(abs(self.cost.squared_error)), self.cost.squared_error)
        return {
            **asdict(self.cost),
            "error": root,
            "decision": "int8" if self.int8 else "fp32",
            "why": self.why,
            "order": self.order,
        }


@dataclass
class SearchResult:
    """Result of `search_groups`.

    Attributes:
        keep_fp32: groups to leave in fp32.
        table: a row for each group.
        budget: relative error that was allowed.
        error: of the chosen set in the serving runtime, against fp32.
        error_all_int8: error with everything in INT8.
        error_floor: error with nothing in INT8: the rounding of the serving precision.
        within_budget: whether `error` is within the budget.
        ms: milliseconds a call of the unquantised graph in the serving precision, of all in INT8,
            and of the chosen set, in one interleaved run.
        runtime, precision, batch, rounds: conditions of the timing.
        rows: number of rows for the errors above.
        group_rows: number of these rows for the groups' errors.
        tries: number of sets that were chosen and measured.
        why: reason why there is no set within the budget; empty if there is one.
    """

    keep_fp32: list[str] = field(default_factory=list)
    table: list[Decision] = field(default_factory=list)
    budget: float = 0.0
    error: float = 0.0
    error_all_int8: float = 0.0
    error_floor: float = 0.0
    within_budget: bool = False
    ms: dict[str, float] = field(default_factory=dict)
    runtime: str = ""
    precision: str = ""
    batch: int = 0
    rounds: int = 0
    rows: int = 0
    group_rows: int = 0
    tries: int = 0
    why: str = ""

    def as_record(self) -> dict[str, Any]:
        """Return the result as JSON values for artifact.json."""
        record = {**vars(self)}
        record["table"] = [decision.as_record() for decision in self.table]
        return record


def choose_groups(
    costs: Sequence[GroupCost], *, squared_error: float, budget: float, least_ms: float = 0.0
) -> list[Decision]:
    """Choose from measured numbers alone; the same numbers give the same choice.

    First, groups whose INT8 surely does not pay (the whole interval of `ms_saved` is at or below 0)
    stay fp32. So do groups that are light, or save at most `least_ms` and perhaps nothing, if they
    add a fiftieth of the squared error or more. Then, while the predicted error is above the
    budget, the group with most error per millisecond saved is given up (a saving below the timing's
    resolution counts as that resolution). A group that adds no error is not given up for the
    budget. The last group in INT8 is kept; the caller's gates decide whether it is worth having.

    Args:
        costs: one for each group.
        squared_error: of the output with all groups in INT8 (relative error, squared).
        budget: relative error allowed; not negative.
        least_ms: a saving that is not worth an error.

    Raises:
        UsageError: a group twice, or a budget that is not a number of at least 0.
    """
    names = [cost.group for cost in costs]
    if len(set(names)) != len(names):
        raise UsageError("a group appears twice in the table")
    if not budget >= 0:
        raise UsageError(f"the error budget must be at least 0, got {budget}")
    decided: dict[str, Decision] = {}
    predicted = squared_error
    open_costs = list(costs)

    def give_up(cost: GroupCost, why: str) -> None:
        nonlocal predicted
        decided[cost.group] = Decision(cost, int8=False, why=why, order=len(decided))
        open_costs.remove(cost)
        predicted -= cost.squared_error

    slow = [cost for cost in costs if cost.ms_high is not None and cost.ms_high <= 0]
    for cost in sorted(slow, key=lambda c: (c.ms_saved or 0.0, c.group)):
        if len(open_costs) > 1:
            give_up(cost, "INT8 is not faster here")
    adding = [c for c in open_costs if c.squared_error >= _WORTH_KEEPING * squared_error > 0]
    for cost in sorted(adding, key=lambda c: (-c.squared_error, c.group)):
        if len(open_costs) > 1 and (cost.light or _saves_nothing(cost, least_ms)):
            give_up(cost, _WHY_LIGHT if cost.light else _WHY_IDLE)
    while predicted > budget**2 and len(open_costs) > 1:
        harmful = [cost for cost in open_costs if cost.squared_error > 0]
        if not harmful:
            break
        worst = max(harmful, key=lambda c: (_error_per_ms(c), c.squared_error, c.group))
        give_up(worst, "most error for the time it saves, above the budget")
    for cost in open_costs:
        decided[cost.group] = Decision(cost, int8=True, why=_why_int8(cost))
    return [decided[name] for name in names]


def search_groups(
    variants: Variants,
    *,
    budget: float,
    batch: int = 8,
    rounds: int = 9,
    time_limit_s: float = 300.0,
    alone: Mapping[str, float] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> SearchResult:
    """Measure every group's error and time, choose, and measure the choice.

    Each group is left out of an otherwise quantised graph, which runs interleaved with the graph
    that has all groups in INT8. Three graphs and the reference are in memory at a time. If half of
    a group's part of `time_limit_s` is not enough for the timing, there are fewer rounds and then
    fewer rows in a call. After `time_limit_s` the remaining groups are not timed. Their error is
    assumed to be the one they add alone, or else an equal share of the unexplained error. Groups
    are measured on the variants' few rows, the chosen set on all held-out rows.

    Args:
        variants: of the graph, in the runtime and precision that will serve it.
        budget: relative error of the output (root mean square over held-out rows).
        batch: rows of a timed call at most.
        rounds: interleaved calls of each graph at most.
        time_limit_s: for the groups; the choice itself is always measured.
        alone: relative error of groups that alone are in INT8, see `scan_groups`.
        on_step: called with (steps done, steps).

    Raises:
        UsageError: a budget below 0, no rounds, or no rows in a batch.
    """
    if not budget >= 0:
        raise UsageError(f"the error budget must be at least 0, got {budget}")
    if rounds < 3 or batch < 1:
        raise UsageError(f"rounds must be at least 3 and batch positive, got {rounds} and {batch}")
    started = time.monotonic()
    total = len(variants.groups) + 2
    floor_graph = variants.serve(variants.source)
    floor = root_mean_square(variants.row_errors(floor_graph))
    rounding = root_mean_square(variants.rounding_errors())
    with variants.written() as path:
        full = variants.serve(path)
    if time_limit_s:
        share = time_limit_s / len(variants.groups)
        batch, rounds = _pace(variants, full, batch, rounds, share / 2)
    feed = variants.timing_feed(batch)
    measured: dict[str, GroupCost] = {}
    full_ms: list[float] = []
    order = order_of_measuring(variants.groups, alone or {})
    for done, group in enumerate(order):
        on_step(done, total)
        if len(order) == 1 or time.monotonic() - started > time_limit_s:
            continue
        with variants.written([group]) as path:
            error = root_mean_square(variants.row_errors(OrtGraph(path), few=True))
            graph = variants.serve(path)
        runs = {"without": partial(graph.run, feed), "full": partial(full.run, feed)}
        seconds = interleaved_seconds(runs, rounds=rounds)
        del graph, runs
        full_ms.append(float(np.median(seconds["full"])) * 1e3)
        saved, low, high = _milliseconds_saved(seconds["without"], seconds["full"])
        measured[group] = GroupCost(
            group, len(variants.groups[group]), rounding**2 - error**2, saved, low, high,
            light=group in variants.light,
        )  # fmt: skip
    costs = _with_unmeasured(variants, measured, rounding**2, alone or {})
    result = SearchResult(
        budget=budget, error_floor=floor, runtime=variants.runtime,
        precision=variants.precision, batch=batch, rounds=rounds,
        rows=len(variants.held_out), group_rows=len(variants.few),
    )  # fmt: skip
    result.error_all_int8 = root_mean_square(variants.row_errors(full))
    if floor >= budget:
        what = f"{variants.runtime} in {variants.precision}"
        result.why = f"without INT8 {what} is off by {floor:.3g}, the budget is {budget:.3g}"
    allowed = math.inf if result.why else budget  # nothing that is given up would help
    least_ms = _LEAST_SHARE * float(np.median(full_ms)) if full_ms else 0.0
    chosen: Graph = full
    while result.tries < _TRIES:
        on_step(len(order), total)
        result.tries += 1
        both = floor**2 + rounding**2
        result.table = choose_groups(costs, squared_error=both, budget=allowed, least_ms=least_ms)
        keep = [row.cost.group for row in result.table if not row.int8]
        if keep != result.keep_fp32 or result.tries == 1:
            result.keep_fp32 = keep
            with variants.written(keep) as path:
                chosen = variants.serve(path)
            result.error = root_mean_square(variants.row_errors(chosen))
        result.within_budget = result.error <= budget
        if result.within_budget or result.why or len(keep) + 1 >= len(order):
            break
        allowed *= 0.97 * budget / result.error  # errors were not additive: aim lower
    if not (result.within_budget or result.why):
        result.why = f"the fewest layers in INT8 that were tried are off by {result.error:.3g}"
    on_step(len(order) + 1, total)
    runs = {"unquantised": partial(floor_graph.run, feed), "all_int8": partial(full.run, feed)}
    runs["chosen"] = partial(chosen.run, feed)
    seconds = interleaved_seconds(runs, rounds=rounds)
    result.ms = {name: float(np.median(values) * 1e3) for name, values in seconds.items()}
    on_step(total, total)
    return result


def order_of_measuring(
    groups: Mapping[str, Sequence[str]], alone: Mapping[str, float]
) -> list[str]:
    """Order the groups: unknown ones first, then those that add most error alone."""
    return sorted(order_of_interest(groups), key=lambda group: -alone.get(group, math.inf))


def _with_unmeasured(
    variants: Variants,
    measured: dict[str, GroupCost],
    squared_error: float,
    alone: Mapping[str, float],
) -> list[GroupCost]:
    """Return the measured costs; other groups get an assumed error, see `search_groups`."""
    groups = variants.groups
    guessed = {g: alone[g] ** 2 for g in groups if g not in measured and g in alone}
    known = guessed | {group: cost.squared_error for group, cost in measured.items()}
    share = max(squared_error - sum(known.values()), 0.0) / max(1, len(groups) - len(known))
    return [
        measured.get(group)
        or GroupCost(
            group,
            len(groups[group]),
            guessed.get(group, share),
            light=group in guessed and group in variants.light,
        )
        for group in groups
    ]


def _pace(
    variants: Variants, graph: Graph, batch: int, rounds: int, seconds: float
) -> tuple[int, int]:
    """Return the rows (at most `batch`) and rounds with which two graphs are timed in about this
    many seconds; found from one row upwards, as a full batch may take all of the time."""
    least, chosen = min(rounds, _LEAST_ROUNDS), (1, min(rounds, _LEAST_ROUNDS))
    size = 1
    while True:
        run = {"call": partial(graph.run, variants.timing_feed(size))}
        call = min(interleaved_seconds(run, rounds=2, warmup=1)["call"])
        fits = int(seconds / (2 * call)) - WARMUP
        if fits < least:
            return chosen
        chosen = size, min(rounds, fits)
        if size == batch:
            return chosen
        size = min(2 * size, batch)


def _saves_nothing(cost: GroupCost, least_ms: float) -> bool:
    """Return whether a saving is too little to matter, and may be none."""
    if cost.ms_saved is None or cost.ms_low is None:
        return False
    return cost.ms_saved <= least_ms and cost.ms_low <= 0


def _error_per_ms(cost: GroupCost) -> float:
    """Return the error per millisecond; 0 if it was not timed, so that it comes last. A saving
    below the timing's resolution counts as that resolution."""
    if cost.ms_saved is None or cost.ms_low is None or cost.ms_high is None:
        return 0.0
    resolution = (cost.ms_high - cost.ms_low) / 2
    return cost.squared_error / max(cost.ms_saved, resolution, 1e-6)


def _why_int8(cost: GroupCost) -> str:
    if cost.ms_saved is None:
        return "not measured: out of time"
    if cost.ms_low is not None and cost.ms_low > 0:
        return "faster than without INT8"
    return "not surely slower than without INT8"


def _milliseconds_saved(
    without: Sequence[float], full: Sequence[float]
) -> tuple[float, float, float]:
    """Return the median of paired differences in ms, and its 95 % percentile-bootstrap interval."""
    differences = (np.asarray(without) - np.asarray(full)) * 1e3
    generator = numpy_generator(0, "milliseconds-saved")
    picks = generator.integers(0, len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.quantile(np.median(differences[picks], axis=1), [0.025, 0.975])
    return float(np.median(differences)), float(low), float(high)
