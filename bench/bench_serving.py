"""The node under load, beside stock BentoML services and the offline limit; issue 5's goals.

    python bench/bench_serving.py --release release --checkpoint runs/pilot/checkpoints/step-1193 \
        --manifest data/manifest.parquet
    python bench/bench_serving.py ... --only overload --rounds 5
    python bench/bench_serving.py ... --quick          (two minutes; the figures mean nothing)

Each server runs in its own process by `bentoml serve`, one after another; the load comes from one
more process. Prompts are held-out captions, steps 8 to 30, guidance 1 or 3, the same list for all.
Wants a machine that does nothing else: with two cores a neighbour is a third of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# The servers take the cores they find; a limit meant for tests would be measured instead.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.pop(_name, None)

from modelops.base.environment import current_environment  # noqa: E402
from modelops.base.files import read_json  # noqa: E402
from serving.latency import latency, overload  # noqa: E402
from serving.mix import BLOCK, read_prompts  # noqa: E402
from serving.options import Goal, Options, Result  # noqa: E402
from serving.servers import Paths  # noqa: E402
from serving.throughput import throughput  # noqa: E402
from serving.upkeep import memory, overhead, startup  # noqa: E402

SECTIONS: dict[str, Callable[[Options], Result]] = {
    "throughput": throughput, "latency": latency, "overload": overload,
    "overhead": overhead, "startup": startup, "memory": memory,
}  # fmt: skip
QUICK = {
    "rounds": 1, "warm_s": 2.0, "window_s": 4.0, "steady_s": 5.0, "overload_s": 5.0, "obey_s": 3.0,
    "singles": 16, "offline_images": BLOCK, "starts": 1, "memory_requests": 300,
    "mixed_requests": 100, "queue_limit": 16, "only_filtered": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", type=Path, required=True, help="what the node serves")
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="the torch pipeline its artifact was made of")  # fmt: skip
    parser.add_argument("--manifest", type=Path, required=True,
                        help="with splits.parquet beside it: its test captions")  # fmt: skip
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="fresh starts of each server")
    parser.add_argument("--quick", action="store_true", help="does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the server
    release = given.release.resolve()
    options = Options(
        paths=Paths(release=release, checkpoint=given.checkpoint.resolve(),
                    model=read_json(release / "release.json")["model"]),
        prompts=read_prompts(given.manifest),
        **(QUICK if given.quick else {"rounds": given.rounds}),
    )  # fmt: skip
    machine, load = current_environment(), os.getloadavg()[0]
    print(f"{machine.cpu}, {machine.cores} cores, load before {load:.2f}"
          f"{'  (NOT QUIET)' if load > 0.3 else ''}; {len(options.prompts)} prompts, "
          f"{options.rounds} rounds{', QUICK: figures mean nothing' if given.quick else ''}",
          flush=True)  # fmt: skip
    goals: list[Goal] = []
    report = {"machine": machine.model_dump(), "load_before": load, "quick": given.quick}
    began = time.monotonic()
    for name in given.only or SECTIONS:
        result = SECTIONS[name](options)
        goals += result.goals
        report[name] = result.figures
        for goal in result.goals:
            print(goal.line())
        print(f"  [{name}: {time.monotonic() - began:.0f} s since the start]", flush=True)
        report["goals"] = [
            {"text": g.text, "bound": g.bound, "at_most": g.at_most, "value": g.found.value,
             "low": g.found.low, "high": g.found.high, "verdict": g.verdict} for g in goals
        ]  # fmt: skip
        if given.json:  # after each section: a later one may fail
            given.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print("\nGoals")
    for goal in goals:
        print(goal.line())


if __name__ == "__main__":
    main()
