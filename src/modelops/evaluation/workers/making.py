"""Making of the images of jobs, in any process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from modelops.base.errors import ImageBlockedError, ModelopsError
from modelops.base.files import read_text, sha256_bytes, write_bytes
from modelops.base.images import encode_png
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
                data = encode_png(made)
                write_bytes(job.path, data)
                note_made(job.path, sha256_bytes(data))
                yield Outcome(job.place)


def note_made(path: Path, sha256: str) -> None:
    """Note the digest of an image in a log of this process beside it, `made-PID.jsonl`."""
    line = json.dumps({"name": path.name, "sha256": sha256}) + "\n"
    with path.with_name(f"made-{os.getpid()}.jsonl").open("a", encoding="utf-8") as log:
        log.write(line)


def made_digests(folder: Path) -> dict[str, str]:
    """Return the digest of each image that any process has noted in a folder, by file name."""
    found: dict[str, str] = {}
    for log in sorted(folder.glob("made-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for line in read_text(log).splitlines():
            try:
                entry = json.loads(line)
                found[str(entry["name"])] = str(entry["sha256"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off: the process was killed while it wrote
    return found
