"""A drift log without a node, for processes that are killed: loads no torch until it must."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry

from modelops.monitoring.rows import PREFIX
from modelops.serving.telemetry.drift import DriftLog
from modelops.serving.telemetry.segments import SegmentLog, result_counter

if TYPE_CHECKING:
    from modelops.serving.engine.jobs import EngineImage


def open_log(folder: Path, **options: Any) -> tuple[DriftLog, CollectorRegistry]:
    registry = CollectorRegistry()
    counter = result_counter("modelops_drift_rows", "x", registry, "written", "failed", "dropped")
    segments = SegmentLog(
        folder, prefix=PREFIX, max_bytes=options.pop("max_bytes", 1_000_000), what="drift log",
        counter=counter,
    )  # fmt: skip
    made = {"sample": 1.0, "identity": {"release": "a" * 64, "model": "b" * 64}} | options
    log = DriftLog(
        segments=segments, filters={"prompt": "words", "image": "open_nsfw"}, results=counter,
        **made,
    )  # fmt: skip
    return log, registry


def picture(side: int = 8) -> EngineImage:
    from modelops.models.request import ImageRequest
    from modelops.serving.engine.jobs import EngineImage

    request = ImageRequest(prompt="x", seed=1, steps=2, guidance=1.0, height=side, width=side)
    pixels = np.zeros((side, side, 3), np.uint8)
    return EngineImage(
        pixels=pixels, request=request, queue_s=0.0, denoise_s=0.1, mean_rows=1.0, batch_rows=(1,)
    )  # fmt: skip


def count(registry: CollectorRegistry, result: str) -> float:
    return registry.get_sample_value("modelops_drift_rows_total", {"result": result}) or 0.0
