"""What a request costs in the front end; start-up; memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from serving.figures import OK, Played, Spread, phases_by_request, play, quantile
from serving.mix import BLOCK, Wanted, make_mix
from serving.options import Goal, Options, Result, saturated
from serving.servers import BATCHING, NODE, ONE_BY_ONE, Server, serve

LONGEST = BATCHING["longest"]


def overhead(options: Options) -> Result:
    """What a request costs outside the engine, the filters and the seal."""
    mix, rounds = options.mix, []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "requests.log"
            extra = {"MODELOPS_LOG_FILE": str(log), "MODELOPS_LOG_FORMAT": "json"}
            row: dict[str, Any] = {}
            with serve(NODE, options.paths, extra=extra) as server:
                bodies = [server.body(wanted) for wanted in mix]
                saturated(server, options, mix)  # whatever is slow the first time
                for clients in (1, 8):
                    began = log.stat().st_size
                    played = play({
                        "url": server.generate, "bodies": bodies,
                        "closed": {"concurrency": clients, "count": options.singles * clients},
                    })  # fmt: skip
                    time.sleep(1.0)  # the log's own thread writes it
                    row[f"{clients} clients"] = _front_end(played, log, began)
            rounds.append(row)
    result = Result({"rounds": rounds})
    print("\nFront end: a request's latency less its phases in engine, filters and seal, ms")
    for clients in (1, 8):
        rows = [row[f"{clients} clients"] for row in rounds]
        for key in (
            "p50",
            "p95",
            "latency_p50",
            *sorted(k for k in rows[0] if k.startswith("phase ")),
        ):
            print(f"  {clients} at a time  {key:22}"
                  f"{Spread.of([row[key] for row in rows]).text(2, 1000):>26}")  # fmt: skip
    for clients in (1, 8):
        result.goal(f"front end per request, p50, {clients} at a time", 5.0,
                    [1000 * row[f"{clients} clients"]["p50"] for row in rounds],
                    at_most=True, unit=" ms")  # fmt: skip
    return result


def _front_end(played: Played, log: Path, began: int) -> dict[str, float]:
    phases = phases_by_request(log, began)
    outside: list[float] = []
    latencies: list[float] = []
    parts: dict[str, list[float]] = {}
    for record in played.loads:
        own = phases.get(f"load-{record.number}-0")
        if own is None or record.status != OK:
            continue
        own.pop("total", None)
        outside.append(record.latency - sum(own.values()))
        latencies.append(record.latency)
        for name, seconds in own.items():
            parts.setdefault(name, []).append(seconds)
    return {
        "n": len(outside), "p50": quantile(outside, 0.5), "p95": quantile(outside, 0.95),
        "latency_p50": quantile(latencies, 0.5),
        **{f"phase {name}": quantile(values, 0.5) for name, values in parts.items()},
    }  # fmt: skip


def startup(options: Options) -> Result:
    """Seconds from launch to a green /readyz."""
    seconds: dict[str, list[float]] = {}
    megabytes: dict[str, float] = {}
    for index in range(options.starts):
        for name in (NODE, ONE_BY_ONE, LONGEST) if index == 0 else (NODE,):
            with serve(name, options.paths) as server:
                seconds.setdefault(name, []).append(server.start_s)
                megabytes[name] = server.rss_mb()
    print("\nStart to ready, s (files in the page cache), and resident megabytes then")
    for name, values in seconds.items():
        print(
            f"  {name:28}{Spread.of(values).text():>24}{megabytes[name]:9.0f} MB  n={len(values)}"
        )
    return Result({"seconds": seconds, "rss_mb": megabytes})


def memory(options: Options) -> Result:
    """Resident memory of the node over thousands of cheap requests, then with hang-ups mixed in.

    The slope is Theil and Sen's, with its 95 % interval, after the first tenth.
    """
    cheap = make_mix(options.prompts, 2 * BLOCK, steps=(1, 2))
    result = Result()
    print("\nMemory of the node's processes")
    with serve(NODE, options.paths) as server:
        plain = {"bodies": [server.body(w) for w in cheap],
                 "closed": {"concurrency": 16, "count": options.memory_requests}}  # fmt: skip
        streams = _can_stream(server, cheap[0])
        bodies: list[str] = []
        leave: list[float | None] = []
        for index, wanted in enumerate(cheap):  # of four: plain, plain, stream, one that leaves
            long = Wanted(wanted.prompt, wanted.seed, 30, 3.0)
            more = {"stream": True, "partial_images": 2} if streams and index % 4 >= 2 else {}
            bodies.append(server.body(long if index % 4 == 3 else wanted, **more))
            leave.append(0.02 + 0.002 * (index % 100) if index % 4 == 3 else None)
        mixed = {"bodies": bodies, "leave_s": leave,
                 "closed": {"concurrency": 16, "count": options.mixed_requests}}  # fmt: skip
        for label, plan in (("cheap requests", plain), ("with hang-ups", mixed)):
            row = _watched(server, plan)
            result.figures[label] = row
            streamed = "" if label == "cheap requests" else (
                ", a quarter streamed" if streams else ", no streaming here")  # fmt: skip
            print(f"  {label}{streamed}: {row['requests']} requests, {row['statuses']}")
            slope = Spread(row["slope"], row["slope_low"], row["slope_high"])
            print(f"    {row['first_mb']:.0f} MB after a tenth, {row['last_mb']:.0f} at the end; "
                  f"slope {slope.text()} MB per 1,000 requests")  # fmt: skip
            growth = [
                1000 * value / row["first_mb"] for value in (slope.value, slope.low, slope.high)
            ]
            result.goals.append(Goal(f"growth over 10,000 requests, {label}", 5.0,
                                     Spread(*growth), at_most=True, unit=" %"))  # fmt: skip
    return result


def _watched(server: Server, plan: dict[str, Any]) -> dict[str, Any]:
    samples: list[tuple[float, float]] = []

    def look() -> None:
        samples.append((time.monotonic(), server.rss_mb()))

    return memory_row(play({"url": server.generate, **plan}, look), samples)


def memory_row(played: Played, samples: list[tuple[float, float]]) -> dict[str, Any]:
    """Resident memory at every 20th part of the requests; the slope leaves out the first tenth."""
    from scipy.stats import theilslopes

    done = np.sort([record.done for record in played.loads])
    counts = np.linspace(0, len(done) - 1, 21).astype(int)[1:]
    times = np.asarray([moment - played.began for moment, _ in samples])
    megabytes = np.interp(done[counts], times, [mb for _, mb in samples])
    slope, _, low, high = theilslopes(megabytes[1:], counts[1:] / 1000)
    return {
        "requests": len(done), "at": (counts + 1).tolist(), "rss_mb": megabytes.tolist(),
        "first_mb": float(megabytes[1]), "last_mb": float(megabytes[-1]),
        "slope": float(slope), "slope_low": float(low), "slope_high": float(high),
        "statuses": played.statuses,
    }  # fmt: skip


def _can_stream(server: Server, wanted: Wanted) -> bool:
    body = server.body(wanted, stream=True, partial_images=2)
    played = play({"url": server.generate, "bodies": [body],
                   "closed": {"concurrency": 1, "count": 1}})  # fmt: skip
    return played.loads[0].status == OK
