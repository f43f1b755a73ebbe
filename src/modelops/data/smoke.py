"""The DataLoader smoke test: can training eat these shards without choking?"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.environment import current_environment
from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import sha256_file
from modelops.base.seeding import derive_seed, numpy_generator
from modelops.data.shards import ShardDataset, ShardSample, read_shard_manifest
from modelops.records.base import InputRef, Measurement
from modelops.records.data import SmokeReport

MAX_STALL_RATIO = 20.0  # slowest batch over the median, once the workers are warm
MIN_STALL_SECONDS = 1.0  # a faster batch is no stall, whatever the median is
OnProgress = Callable[[int, int], None]  # (done, total)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Remove the SIGCHLD handler that torch's DataLoader leaves in the process.

    With it a later child's end, of a server say, interrupts whatever the process is doing then.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


@_own_signals()
def smoke_test(
    shard_manifest: str | Path,
    out_path: str | Path | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> SmokeReport:
    """Read every sample of every split through a torch DataLoader and judge what comes out.

    The verdict is `pass` when every sample decodes, all images have one size, no caption is
    empty, ids are unique within and across splits, and no batch stalls: slower than 20 times the
    median and 1 s. Damage found while reading is a reason in the report, not an exception.

    Args:
        shard_manifest: shard_manifest.csv.
        out_path: where to write the report (smoke.json); None writes nothing.
        batch_size: samples a batch, at least 1.
        workers: DataLoader worker processes.
        seed: of the reading order.
        on_progress: called with (done, total) samples.

    Raises:
        UsageError: shard_manifest.csv is missing or malformed, or an argument is out of range.
    """
    if batch_size < 1 or workers < 0:
        raise UsageError(
            f"batch size {batch_size}, {workers} workers", hint="use at least 1 and at least 0"
        )
    started, clock = datetime.now(UTC), time.perf_counter()
    rows = read_shard_manifest(shard_manifest)
    total = sum(row.samples for row in rows)
    reasons: list[str] = []
    places: dict[str, str] = {}
    sizes: Counter[tuple[int, ...]] = Counter()
    seconds: list[float] = []  # of every batch
    warm: list[float] = []  # without each loader's first, which waits for its workers to start
    read_seconds, done, decoded = 0.0, 0, 0
    for split in dict.fromkeys(row.split for row in rows):
        try:
            dataset = ShardDataset(shard_manifest, split)
        except ModelopsError as error:
            reasons.append(f"{split}: {error}")
            continue
        for name in dataset.ids:
            if name in places:
                reasons.append(f"id {name!r} is in {places[name]} and in {split}")
            places[name] = split
        begin = last = time.perf_counter()
        for number, batch in enumerate(_loader(dataset, batch_size, workers, seed)):
            seconds.append(time.perf_counter() - last)
            warm += seconds[-1:] if number else []
            for index, sample in batch:
                if isinstance(sample, str):
                    reasons.append(f"{split}: {dataset.ids[index]!r}: {sample}")
                    continue
                decoded += 1
                sizes[sample.image.shape] += 1
                if not sample.caption.strip():
                    reasons.append(f"{split}: {sample.id!r} has an empty caption")
            done += len(batch)
            if on_progress:
                on_progress(done, total)
            last = time.perf_counter()
        read_seconds += last - begin
        dataset.close()
    if len(sizes) > 1:
        reasons.append(f"images differ in size: {_list_sizes(sizes)}")
    if done != total:
        reasons.append(f"{done} samples read, {total} listed in {Path(shard_manifest).name}")
    median = float(np.median(warm)) if warm else 0.0
    slowest = max(warm, default=0.0)
    ratio = slowest / median if median > 0 else 1.0
    if ratio > MAX_STALL_RATIO and slowest > MIN_STALL_SECONDS:
        reasons.append(f"a batch took {slowest:.2f} s, {ratio:.0f} times the median")
    rate = decoded / read_seconds if read_seconds > 0 else 0.0
    report = SmokeReport(
        verdict="fail" if reasons else "pass",
        reasons=reasons,
        n_samples=decoded,
        n_shards=len(rows),
        images_per_second=round(rate, 1),
        slowest_batch_over_median=round(ratio, 2),
        measurements={
            "images_per_second": _rate_interval(seconds, rate, batch_size, workers, seed)
        },
        inputs={
            "shard_manifest": InputRef(
                path=Path(shard_manifest).name, sha256=sha256_file(shard_manifest)
            )
        },
        seeds={"order": seed},
        environment=current_environment(),
        started_at=started,
        duration_s=round(time.perf_counter() - clock, 3),
    )
    if out_path is not None:
        report.write(out_path)
    return report


class _Forgiving:
    """A dataset that gives (index, sample), or (index, reason) where the sample is damaged."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, ShardSample | str]:
        try:
            return index, self.dataset[index]
        except (ModelopsError, ValueError) as error:
            return index, str(error).splitlines()[0]


def _loader(dataset: ShardDataset, batch_size: int, workers: int, seed: int) -> Any:
    """A DataLoader over a shuffled split, yielding lists."""
    import torch
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(derive_seed(seed, "smoke order", dataset.split))
    wrapped: Any = _Forgiving(dataset)
    return DataLoader(
        wrapped, batch_size=batch_size, shuffle=True, generator=generator,
        num_workers=workers, collate_fn=list,
    )  # fmt: skip


def _rate_interval(
    seconds: list[float], rate: float, batch_size: int, workers: int, seed: int
) -> Measurement:
    """Images per second with a bootstrap interval over batches."""
    if not seconds or rate <= 0:
        return Measurement.missing("no batch was read")
    times = np.array(seconds)
    draws = numpy_generator(seed, "smoke bootstrap").integers(0, len(times), (1000, len(times)))
    means = times[draws].mean(axis=1)
    low, high = rate * np.quantile(times.mean() / means, [0.025, 0.975])
    return Measurement(
        value=rate, low=min(float(low), rate), high=max(float(high), rate), n=len(times),
        method="bootstrap over batches", unit="images/s", higher_is_better=True,
        details={"batch_size": batch_size, "workers": workers},
    )  # fmt: skip


def _list_sizes(sizes: Counter[tuple[int, ...]]) -> str:
    common = sizes.most_common(3)
    return ", ".join(f"{shape[1]}x{shape[0]} ({count})" for shape, count in common)
