"""Open a source together with the processes that share the work on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelops.base.errors import UsageError
from modelops.evaluation.workers.pool import WorkerPool
from modelops.evaluation.workers.ranks import LaunchedRanks, launched_ranks
from modelops.evaluation.workers.tasks import Workers
from modelops.evaluation.workers.threads import device_of
from modelops.models.sources import ModelSource


def open_with_workers(
    opening: Mapping[str, Any], processes: int
) -> tuple[ModelSource, Workers | None]:
    """Open the source of `modelops eval`, and the processes that share the work on it.

    Args:
        opening: keyword arguments of `open_source`.
        processes: value of --processes. Under a launcher it must be 1.

    Returns:
        The source and its workers; None if one process does all of the work.

    Raises:
        UsageError: --processes under a launcher, or a source that cannot be divided.
    """
    from modelops.evaluation.sources.open import open_source

    launched = launched_ranks()
    if launched is None and processes == 1:
        return open_source(**opening), None
    workers: Workers
    pool = None
    if launched is None:
        local, workers = 0, (pool := WorkerPool(processes, opening))
        opening = pool.opening
    elif processes > 1:
        raise UsageError(
            f"--processes {processes} within a launcher's {launched[1]} processes",
            hint="leave --processes out, or run the command without a launcher",
        )
    else:
        local, workers = launched[2], LaunchedRanks(*launched)
    try:
        source = open_source(**{**opening, "device": device_of(opening["device"], local)})
    except BaseException:
        workers.close()
        raise
    if pool is not None:
        pool.opening["sha256"] = source.info.sha256
    if source.info.kind == "endpoint":
        source.close()
        raise UsageError(
            "an endpoint is not divided among processes",
            hint="use several processes for a checkpoint, an artifact or a folder",
        )
    return source, workers
