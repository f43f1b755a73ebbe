"""Latency at 70 % of the node's saturation, and what happens at 300 %."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from serving.figures import (
    FULL,
    OK,
    Played,
    Rate,
    Spread,
    drain_times,
    knock_times,
    play,
    quantile,
    rate,
    within_factor_2,
)
from serving.mix import Wanted, poisson_times
from serving.options import CLIENTS, Options, Result, saturated
from serving.servers import NODE, serve


def latency(options: Options) -> Result:
    """p50 and p95 at 70 % of the node's saturation beside one request at a time."""
    mix = options.mix
    rows: list[dict[str, Any]] = []
    for index in range(options.rounds):
        with serve(NODE, options.paths) as server:
            bodies = [server.body(wanted) for wanted in mix]
            top = saturated(server, options, mix)["images_per_s"]
            single = play({"url": server.generate, "bodies": bodies,
                           "closed": {"concurrency": 1, "count": options.singles}})  # fmt: skip
            times = poisson_times(0.7 * top, options.steady_s, seed=index)
            steady = play({"url": server.generate, "bodies": bodies, "open": {"times": times}})
        alone: dict[tuple[int, float], list[float]] = {}
        for record in single.loads:
            wanted = mix[record.number]
            alone.setdefault((wanted.steps, wanted.guidance), []).append(record.latency)
        slow = [record.latency / float(np.median(alone[kind])) for record in steady.loads
                if (kind := _kind(mix[record.number % len(mix)])) in alone]  # fmt: skip
        one, many = ([r.latency for r in p.loads if r.status == OK] for p in (single, steady))
        row: dict[str, Any] = {
            "saturation_images_per_s": top, "offered_images_per_s": len(times) / options.steady_s,
            "single_p50": quantile(one, 0.5), "single_p95": quantile(one, 0.95),
            "p50": quantile(many, 0.5), "p95": quantile(many, 0.95), "p99": quantile(many, 0.99),
            "slowdown_p50": quantile(slow, 0.5), "slowdown_p95": quantile(slow, 0.95),
            "statuses": steady.statuses, "load_cores": steady.cores, "late_p99": steady.lateness(),
        }  # fmt: skip
        rows.append(row)
    result = Result({"rounds": rows})
    print(
        f"\nLatency at 70 % of saturation, Poisson, {options.steady_s:.0f} s; from the due time, ms"
    )
    for key in ("single_p50", "single_p95", "p50", "p95", "p99", "late_p99"):
        print(f"  {key:14}{Spread.of([row[key] for row in rows]).text(1, 1000):>28}")
    for key in ("slowdown_p50", "slowdown_p95"):
        ratio = Spread.of([row[key] for row in rows]).text()
        print(f"  {key:14}{ratio:>28}  times the same kind of request alone")
    print(f"  answers       {[row['statuses'] for row in rows]}")
    result.goal("p95 at 70 % / p95 of the same mix one at a time", 2.0,
                [row["p95"] / row["single_p95"] for row in rows], at_most=True)  # fmt: skip
    result.goal("p95 at 70 % / p50 of the same mix one at a time (strictest reading)", 2.0,
                [row["p95"] / row["single_p50"] for row in rows], at_most=True)  # fmt: skip
    return result


def _kind(wanted: Wanted) -> tuple[int, float]:
    return wanted.steps, wanted.guidance


def overload(options: Options) -> Result:
    """Three times what the node can do: answers, goodput, and whether Retry-After is right.

    The goodput is that of the time after the queue is full. Three readings of right, because under
    a steady overload a free place goes to whoever knocks first, and no server knows who that is:

    - turn: said against the time until all that had been let in before the refused request was
      answered: then it would have been its turn. The goal is read on this one.
    - knocking: said against the time until a probe that knocks every 50 ms was let in.
    - obeying: the same load from clients that wait as told; how often they are told to wait.
    """
    mix, rows = options.mix, []
    for index in range(options.rounds):
        limit = options.queue_limit
        with serve(NODE, options.paths, extra={"MODELOPS_QUEUE_LIMIT": str(limit)}) as server:
            bodies = [server.body(wanted) for wanted in mix]
            top = saturated(server, options, mix, clients=min(CLIENTS, limit))
            speed, full_s = 3 * top["images_per_s"], limit / (2 * top["images_per_s"])
            end = full_s + options.overload_s
            probe = server.body(Wanted(mix[0].prompt, 0, 1, 1.0))
            storm = play({
                "url": server.generate, "bodies": bodies,
                "open": {"times": poisson_times(speed, end, seed=100 + index)},
                "probes": {"count": 2, "every_s": 0.05, "body": probe},
            })  # fmt: skip
            obeying = play({
                "url": server.generate, "bodies": bodies, "obey": True,
                "open": {"times": poisson_times(speed, options.obey_s, seed=200 + index)},
            })  # fmt: skip
        rows.append(_overload_row(storm, obeying, rate(storm, mix, full_s + 1.0, end), top))
    result = Result({"rounds": rows})
    print(f"\n300 % of saturation, Poisson, {options.overload_s:.0f} s")
    print(f"  answers {[row['statuses'] for row in rows]}")
    for key, text, scale, digits in (
        ("refused_p50", "a 429 takes, p50, ms", 1000, 1),
        ("refused_p95", "a 429 takes, p95, ms", 1000, 1),
        ("accepted_p50", "a 200 takes, p50, s", 1, 2),
        ("said_p50", "Retry-After, p50, s", 1, 2),
        ("turn_p50", "its turn came after, p50, s", 1, 2),
        ("turn_right", "right by its turn, share", 1, 2),
        ("knock_p50", "knocking was let in after, p50, s", 1, 2),
        ("knock_right", "right by knocking, share", 1, 2),
        ("obey_first", "obeying: let in at the first retry, share", 1, 2),
        ("obey_tries_p95", "obeying: tries, p95", 1, 1),
        ("obey_right", "obeying: first Retry-After right, share", 1, 2),
        ("load_cores", "load generator, cores", 1, 2),
    ):
        print(f"  {text:44}{Spread.of([row[key] for row in rows]).text(digits, scale):>24}")
    others = [float(row["others"]) for row in rows]
    result.goal("answers at 300 % that are neither 200 nor 429", 0, others, at_most=True)
    result.goal("Retry-After within a factor of 2 (its turn), share", 0.9,
                [row["turn_right"] for row in rows])  # fmt: skip
    result.goal("goodput at 300 % / saturation, row-steps", 0.9,
                [row["goodput"] for row in rows])  # fmt: skip
    return result


def _overload_row(
    storm: Played, obeying: Played, good: Rate, top: dict[str, float]
) -> dict[str, Any]:
    turns, knocks = drain_times(storm), knock_times(storm)
    refused = [record.latency for record in storm.loads if record.status == FULL]
    accepted = [record.latency for record in storm.loads if record.status == OK]
    first: dict[int, tuple[float, float]] = {}
    tries: dict[int, tuple[int, float]] = {}
    for record in sorted(obeying.loads, key=lambda record: record.sent):
        if record.status == FULL:
            first.setdefault(record.number, (record.retry_after_s or 0.0, record.done))
        elif record.status == OK:
            tries[record.number] = (record.attempt, record.sent)
    waited = [(said, tries[index][1] - refused_at)
              for index, (said, refused_at) in first.items() if index in tries]  # fmt: skip
    again = [tries[index][0] for index in first if index in tries]
    return {
        "statuses": storm.statuses, "obeying_statuses": obeying.statuses,
        "others": sum(r.status not in (OK, FULL) for r in (*storm.records, *obeying.records)),
        "goodput": good.row_steps_per_s / top["row_steps_per_s"],
        "saturation": top, "good": asdict(good), "load_cores": storm.cores,
        "refused_p50": quantile(refused, 0.5), "refused_p95": quantile(refused, 0.95),
        "accepted_p50": quantile(accepted, 0.5),
        "said_p50": quantile([said for said, _ in turns], 0.5),
        "turn_p50": quantile([was for _, was in turns], 0.5),
        "turn_right": within_factor_2(turns), "turns": len(turns),
        "knock_p50": quantile([was for _, was in knocks], 0.5),
        "knock_right": within_factor_2(knocks), "knocks": len(knocks),
        "obey_first": float(np.mean([n == 1 for n in again])) if again else float("nan"),
        "obey_tries_p95": quantile([float(n) for n in again], 0.95),
        "obey_right": within_factor_2(waited),
    }  # fmt: skip
