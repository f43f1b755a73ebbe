"""Samples of a source, kept on disk, so that a killed evaluation can continue."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops import __version__
from modelops.base.environment import current_environment
from modelops.base.files import remove_leftovers, sha256_file, sha256_json, write_bytes
from modelops.base.images import read_image
from modelops.evaluation.prompts import PlannedImage, image_name
from modelops.evaluation.workers.making import made_digests, make_images
from modelops.evaluation.workers.tasks import Job, Outcome, Workers
from modelops.evaluation.workers.threads import fewer_threads
from modelops.models.request import ImageRequest
from modelops.models.sources import ModelSource

Image = npt.NDArray[np.uint8]
COMPLETE = "complete"
# Packages that may change an image.
_MAKERS = ("diffusers", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch",
           "transformers")  # fmt: skip


@dataclass(slots=True)
class Samples:
    """Images of a plan.

    Attributes:
        plan: the planned images.
        paths: PNG of each image that was made, by its place in the plan.
        failures: reason for each image that was not made.
        blocked: places that the source's own filter refused; they are failures too.
        reused: number of images that an earlier run had made.
    """

    plan: Sequence[PlannedImage]
    paths: dict[int, Path] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    blocked: set[int] = field(default_factory=set)
    reused: int = 0

    @property
    def made(self) -> list[int]:
        """Places of the images that were made, in order."""
        return sorted(self.paths)

    def read(self, place: int) -> Image:
        """Read one image, uint8 [H, W, 3]."""
        return read_image(self.paths[place])


def draw_samples(
    source: ModelSource,
    plan: Sequence[PlannedImage],
    request: ImageRequest,
    directory: Path,
    *,
    workers: Workers | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Make the images that are not in the cache yet.

    Args:
        request: steps, guidance and size of every image.
        directory: the cache; images lie in a folder named by source and sampling. A source without
            a digest (a service that does not name its release) may have changed since, so its
            images only serve to finish an evaluation that was cut short.

    Workers stay open to read the images later; after an error they end.
    """
    inputs = [planned.image.sha256 for planned in plan if planned.image is not None]
    cache = directory / _sampling_key(source, request, inputs)
    is_folder = source.n_images is not None
    jobs = [
        Job(
            place,
            ImageRequest(
                prompt=planned.prompt, seed=place if is_folder else planned.seed,
                steps=request.steps, guidance=request.guidance,
                height=request.height, width=request.width, image=planned.image,
            ),
            cache / image_name(planned.prompt, planned.seed, place * is_folder),
        )
        for place, planned in enumerate(plan)
        if planned.fault is None
    ]  # fmt: skip
    faults = {place: each.fault for place, each in enumerate(plan) if each.fault is not None}
    finished = set(faults)

    def find() -> list[Job]:
        if source.info.sha256 is None and (cache / COMPLETE).exists():
            shutil.rmtree(cache)
        remove_leftovers(cache)
        known = made_digests(cache)
        missing = [job for job in jobs if not _usable(job.path, known.get(job.path.name))]
        finished.update({job.place for job in jobs} - {job.place for job in missing})
        return missing

    def report(outcome: Outcome) -> None:
        finished.add(outcome.place)
        if on_progress:
            on_progress(len(finished), len(plan))

    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        if workers:
            stack.push(lambda error, *_: workers.close() if error else None)
        if workers and workers.share_cores:
            stack.enter_context(fewer_threads(workers.processes))
        share = workers.divide(find, report) if workers else find()
        if on_progress:
            on_progress(len(finished), len(plan))
        for outcome in make_images(source, share):
            outcomes.append(outcome)
            report(outcome)
            if workers:
                workers.check()
        if workers:
            outcomes = workers.collect(outcomes)

    failed = {outcome.place: outcome for outcome in outcomes if outcome.failure is not None}
    samples = Samples(
        plan,
        paths={job.place: job.path for job in jobs if job.place not in failed},
        failures=dict(
            sorted({**{p: o.failure or "" for p, o in failed.items()}, **faults}.items())
        ),
        blocked={place for place, outcome in failed.items() if outcome.blocked},
        reused=len(jobs) - len(outcomes),
    )
    write_bytes(cache / COMPLETE, b"")
    return samples


def _usable(path: Path, sha256: str | None) -> bool:
    """Whether a file holds the very bytes that were made under its name."""
    return sha256 is not None and path.is_file() and sha256_file(path) == sha256


def _sampling_key(source: ModelSource, request: ImageRequest, inputs: Sequence[str]) -> str:
    info = source.info
    versions = current_environment().packages if info.kind in ("checkpoint", "artifact") else {}
    identity: dict[str, Any] = {
        "uri": info.uri if info.kind == "endpoint" else None,
        "versions": {"modelops": __version__, **{n: versions.get(n) for n in _MAKERS}},
        "source": info.sha256 or info.uri, "kind": info.kind, "runtime": info.runtime,
        "precision": info.precision, "scheduler": source.scheduler_name, "steps": request.steps,
        "guidance": request.guidance, "height": request.height, "width": request.width,
        **({"inputs": inputs} if inputs else {}),
    }  # fmt: skip
    return sha256_json(identity)[:16]
