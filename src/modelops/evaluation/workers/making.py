"""Making of the images of jobs, in any process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelops.base.errors import ImageBlockedError, ModelopsError
from modelops.base.files import write_bytes
from modelops.data.images import encode_png
from modelops.evaluation.workers.tasks import Job, Outcome
from modelops.models.sources import ModelSource


def make_images(source: ModelSource, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Make the images of jobs that share steps, guidance and size, and write them as PNG."""
    if not jobs:
        return
    chunk = source.whole_calls(jobs[0].request)
    for start in range(0, len(jobs), chunk):
        part = jobs[start : start + chunk]
        images = source.generate_each([job.request for job in part])
        for job, made in zip(part, images, strict=True):
            if isinstance(made, ModelopsError):
                yield Outcome(job.place, made.message, isinstance(made, ImageBlockedError))
            else:
                write_bytes(job.path, encode_png(made))
                yield Outcome(job.place)
