"""Speed ratios on a machine that others use too: interleaved, in medians, with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from modelops.base.files import sha256_json
from modelops.base.seeding import numpy_generator
from modelops.records.base import Measurement

_RESAMPLES = 2000
_SETTLE_S = 0.02
WARMUP = 2  # calls of each run before it is timed


def interleaved_seconds(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = WARMUP,
    limit_s: float = math.inf,
    least_rounds: int = 5,
) -> dict[str, list[float]]:
    """Measure the wall time of each run in each round; a round runs all of them in turn.

    So a temporary slowdown of the machine affects all of them alike. The order is drawn anew in
    each round, and there is a pause before each run: worker threads of the previous run (OpenMP's,
    of eager torch) spin for some milliseconds on the cores of the next one. In a fixed order the
    graph after eager torch measured a third slower than it is.

    After `limit_s` seconds no further round begins, but at least `least_rounds` are made.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    generator = numpy_generator(0, "timing order")
    started = time.monotonic()
    for done in range(rounds):
        if done >= least_rounds and time.monotonic() - started > limit_s:
            break
        for index in generator.permutation(len(names)):
            name = names[index]
            time.sleep(_SETTLE_S)
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed_ratio(
    seconds: Mapping[str, list[float]], *, of: str, over: str, protocol: Mapping[str, Any]
) -> Measurement:
    """Measure how many times as fast `of` is as `over`: the ratio of their medians.

    The interval is a percentile bootstrap over rounds, which keeps a round's runs together.
    """
    fast, slow = np.asarray(seconds[of]), np.asarray(seconds[over])
    generator = numpy_generator(0, "speed-ratio")
    picks = generator.integers(0, len(fast), size=(_RESAMPLES, len(fast)))
    ratios = np.median(slow[picks], axis=1) / np.median(fast[picks], axis=1)
    value = float(np.median(slow) / np.median(fast))
    low, high = (float(bound) for bound in np.quantile(ratios, [0.025, 0.975]))
    identity = {"measure": "speed_ratio", "of": of, "over": over, **protocol}
    return Measurement(
        value=value,
        low=min(low, value),
        high=max(high, value),
        method="ratio of medians of interleaved rounds; percentile bootstrap over rounds",
        n=len(fast),
        unit="x",
        higher_is_better=True,
        protocol=sha256_json(identity),
        details={
            "of": of,
            "over": over,
            "of_ms": float(np.median(fast) * 1e3),
            "over_ms": float(np.median(slow) * 1e3),
            **{key: item for key, item in protocol.items() if isinstance(item, (int, str))},
        },
    )
