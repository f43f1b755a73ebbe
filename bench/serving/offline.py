"""The offline limit: the same artifact and mix in one process, packed at will, nobody waiting.

    cd bench && python -m serving.offline PLAN.json RESULT.json

All requests are known beforehand: they are sorted so that batches of 16 rows are full and end
together. With the filter it is tried in both ways, beside the next batch and after each batch; the
faster one is the limit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modelops.export.artifact.open import open_artifact
from modelops.export.graphs.graph import process_cores
from serving.batches import BatchMaker, Checker, to_png
from serving.mix import Wanted


def packed(mix: Sequence[Wanted], max_rows: int) -> list[list[Wanted]]:
    """Batches of `max_rows` rows, guided and unguided apart, by step count."""
    batches: list[list[Wanted]] = []
    for guided in (False, True):
        own = sorted((w for w in mix if (w.guidance != 1.0) == guided), key=lambda w: -w.steps)
        size = max_rows // 2 if guided else max_rows
        batches += [own[start : start + size] for start in range(0, len(own), size)]
    return batches


def plain(maker: BatchMaker, batches: list[list[Wanted]]) -> None:
    """Images only."""
    for batch in batches:
        maker.make(batch, "dropped")


def after(maker: BatchMaker, batches: list[list[Wanted]], checker: Checker) -> None:
    """Filter and encode each batch on all cores before the next one."""
    for batch in batches:
        finish(maker.make(batch, "dropped"), checker)


def beside(maker: BatchMaker, batches: list[list[Wanted]], checker: Checker) -> None:
    """Filter and encode each batch in a second thread while the next one is made."""
    with ThreadPoolExecutor(1) as second:
        waiting = [second.submit(finish, maker.make(batch, "dropped"), checker)
                   for batch in batches]  # fmt: skip
        for future in waiting:
            future.result()


def finish(pictures: list[Any], checker: Checker) -> list[bytes]:
    """Filter and encode."""
    checker.check(pictures)
    return [to_png(picture) for picture in pictures]


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    mix = [Wanted(**entry) for entry in plan["mix"]]
    maker = BatchMaker(open_artifact(plan["artifact"]).pipeline)
    maker.warm(plan["max_rows"])
    batches = packed(mix, plan["max_rows"])
    runs: dict[str, Callable[[], None]] = {"plain": lambda: plain(maker, batches)}
    if plan["filtered"]:
        one, all_cores = Checker(1), Checker(process_cores())
        runs = {
            "filter beside": lambda: beside(maker, batches, one),
            "filter after": lambda: after(maker, batches, all_cores),
        }
    maker.make(batches[0], "dropped")  # the filter's first call is slow as well, but short
    images, row_steps = len(mix), sum(wanted.row_steps for wanted in mix)
    result = {}
    for name, run in runs.items():
        cpu, began = time.process_time(), time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        result[name] = {
            "images_per_s": images / seconds, "row_steps_per_s": row_steps / seconds,
            "images": images, "cores": (time.process_time() - cpu) / seconds,
        }  # fmt: skip
    best = max(result, key=lambda name: result[name]["images_per_s"])
    Path(sys.argv[2]).write_text(json.dumps({"best": best, **result[best], "all": result}))


if __name__ == "__main__":
    main()
