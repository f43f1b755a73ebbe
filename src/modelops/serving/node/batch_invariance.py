"""Batch invariance: how far an image made in a batch is from the same image made alone.

A runtime chooses its kernels by the number of rows, and they round differently. So an image may
depend a little on the requests in the same batch. This is measured once, when a release is built,
with the engine that will serve it. The release states the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.seeding import numpy_generator
from modelops.models.request import ImageRequest
from modelops.models.sources import PipelineSource
from modelops.records.evaluation import SourceInfo
from modelops.serving.node.golden import FALLBACK_FILE, GOLDEN_FILE, make_golden

PROMPTS = (
    "red heart", "a yellow sun", "flag of Japan", "cat face", "a green apple", "blue car",
    "rainbow", "house with a garden",
)  # fmt: skip
_MAX_ROWS = 16


def measure_batch_invariance(
    model_dir: str | Path,
    *,
    pictures: int = 16,
    steps: int | None = None,
    guidance: float | None = None,
    runtime: str = "auto",
) -> dict[str, Any]:
    """Make the same images with the offline pipeline, alone in the engine, and in its batches.

    The batches are mixed: every second image is unguided, and step counts range from half the
    default to the default, so that images join and leave all the time.

    Args:
        model_dir: a checkpoint or an exported artifact.
        pictures: number of images.
        steps, guidance: the release's defaults; the pipeline's own when not given.
        runtime: of an exported artifact.

    Returns:
        `runtime`, `precision`, `pictures`, and `widest_rows`, the widest batch that was seen. For
        `company` (in batches against alone) and `offline` (in batches against the pipeline that
        was evaluated): `identical` images, `max_difference` and `mean_difference` in grey levels
        of 255.
    """
    from modelops.serving.engine.engine import StepEngine
    from modelops.serving.node.load import open_model

    pipeline, info = open_model(Path(model_dir), runtime=runtime, batch_size=_MAX_ROWS)
    source = PipelineSource(pipeline, SourceInfo(kind="artifact", uri=str(model_dir)))
    engine = StepEngine(pipeline, max_rows=_MAX_ROWS)
    try:
        prompts = engine.model.usable_prompts(PROMPTS)
        usual = engine.fill(ImageRequest(prompt=prompts[0], seed=0, steps=steps, guidance=guidance))
        requests = _mixed(usual, prompts, pictures)
        alone = [engine.submit([request])[0].future.result() for request in requests]
        order = numpy_generator(0, "company").permutation(pictures)
        jobs = engine.submit([requests[index] for index in order])
        together = {int(index): job.future.result() for index, job in zip(order, jobs, strict=True)}
    finally:
        engine.close(drain=False)
    offline = [source.generate([request])[0] for request in requests]
    batched = [together[index].pixels for index in range(pictures)]
    return {
        "runtime": info.runtime,
        "precision": info.precision,
        "pictures": pictures,
        "widest_rows": max(max(image.batch_rows) for image in together.values()),
        "company": _differences(batched, [image.pixels for image in alone]),
        "offline": _differences(batched, offline),
    }


def release_proofs(
    model_dir: str | Path,
    folder: str | Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    fallback: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Make a release's proofs about serving its model. For `build_release`: `defaults` (the golden
    image and the batch invariance) and `extra_files` (the image, and that of the fallback if there
    is one, which are written to `folder`).
    """
    golden = Path(folder) / GOLDEN_FILE
    said: dict[str, Any] = {
        "golden": make_golden(model_dir, golden, steps=steps, guidance=guidance),
        "company": measure_batch_invariance(model_dir, steps=steps, guidance=guidance),
    }
    files = {GOLDEN_FILE: golden}
    if fallback is not None:
        files[FALLBACK_FILE] = Path(folder) / FALLBACK_FILE
        make_golden(fallback, files[FALLBACK_FILE], steps=steps, guidance=guidance)
        said["golden"]["fallback_file"] = FALLBACK_FILE
    return said, files


def _mixed(usual: ImageRequest, prompts: Sequence[str], pictures: int) -> list[ImageRequest]:
    assert usual.steps is not None
    counts = numpy_generator(0, "company-steps").integers(
        (usual.steps + 1) // 2, usual.steps + 1, size=pictures
    )
    return [
        ImageRequest(
            prompt=prompts[index % len(prompts)],
            seed=index,
            steps=int(count),
            guidance=usual.guidance if index % 2 else 1.0,
            height=usual.height,
            width=usual.width,
        )
        for index, count in enumerate(counts)
    ]


def _differences(
    these: Sequence[npt.NDArray[np.uint8]], those: Sequence[npt.NDArray[np.uint8]]
) -> dict[str, Any]:
    apart = [
        np.abs(this.astype(np.int16) - that.astype(np.int16))
        for this, that in zip(these, those, strict=True)
    ]
    return {
        "identical": sum(not difference.any() for difference in apart),
        "max_difference": max(int(difference.max()) for difference in apart),
        "mean_difference": round(float(np.mean([one.mean() for one in apart])), 4),
    }
