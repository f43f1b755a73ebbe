"""Streamed statistics against one pass in extended precision, and their cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.errors import EvaluationError
from modelops.metrics.frechet import Statistics
from modelops.metrics.streaming import (
    RunningStatistics,
    cached_statistics,
    read_statistics,
    write_statistics,
)


def features(n: int = 301, dimension: int = 7) -> np.ndarray:
    """Means far from zero beside small spreads: where sums of squares lose their digits."""
    generator = np.random.default_rng(5)
    return np.asarray(1e3 + generator.normal(size=(n, dimension)) * np.logspace(-1, 1, dimension))


def assert_equal(found: Statistics, data: np.ndarray) -> None:
    exact = data.astype(np.longdouble)
    mean = exact.mean(axis=0)
    centred = exact - mean
    covariance = centred.T @ centred / (len(data) - 1)
    spread = np.sqrt(np.diag(covariance))
    assert found.n == len(data)
    assert np.abs(found.mean / mean - 1).max() < 1e-12
    assert np.abs((found.covariance - covariance) / np.outer(spread, spread)).max() < 1e-12


@pytest.mark.parametrize("batch", [1, 2, 64, 300, 1000])
def test_every_batch_size_gives_the_statistics_of_the_whole(batch: int) -> None:
    data = features()
    running = RunningStatistics()
    for start in range(0, len(data), batch):
        running.update(data[start : start + batch])
    assert_equal(running.statistics(), data)


def test_processes_merge_in_any_order_and_through_files(tmp_path: Path) -> None:
    data = features()
    parts = []
    for rank in range(3):
        running = RunningStatistics()
        running.update(data[rank::3])
        write_statistics(tmp_path / f"{rank}.npz", running.statistics())
    for order in ((0, 1, 2), (2, 0, 1)):
        whole = RunningStatistics()
        whole.merge(RunningStatistics())  # a process without images
        for rank in order:
            part = read_statistics(tmp_path / f"{rank}.npz")
            assert part is not None
            whole.merge(part)
        assert_equal(whole.statistics(), data)
        parts.append(whole)


def test_memory_does_not_grow_and_nothing_of_the_batches_is_kept() -> None:
    running, batch = RunningStatistics(), np.ones((4, 3), np.float32)
    running.update(batch)
    batch += 7  # must not reach into what was summed up
    running.update(np.zeros((0, 3)))
    np.testing.assert_array_equal(running.statistics().mean, np.ones(3))
    assert running.n == 4


def test_what_cannot_be_summed_up_is_refused() -> None:
    running = RunningStatistics()
    with pytest.raises(EvaluationError, match="two are needed"):
        running.statistics()
    running.update(np.ones((1, 3)))
    with pytest.raises(EvaluationError, match="two are needed"):
        running.statistics()
    for bad in (np.ones(3), np.full((2, 3), np.nan), np.ones((2, 4))):
        with pytest.raises(EvaluationError):
            running.update(bad)
    assert running.n == 1


class _Mean:
    """Mean colour: an extractor small enough to test the cache with."""

    dim = 3

    def __init__(self, version: int = 1) -> None:
        self.protocol: dict[str, Any] = {"extractor": "mean colour", "version": version}
        self.seen = 0

    def images_to_features(self, images: Iterable[np.ndarray], **_: Any) -> np.ndarray:
        rows = [image.mean(axis=(0, 1)) for image in images]
        self.seen += len(rows)
        return np.array(rows, np.float32)


def test_reference_statistics_are_cached_by_content_and_protocol(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    names = list("abcde")
    extractor = _Mean()

    def get(extractor: _Mean, order: list[int]) -> Statistics:
        return cached_statistics(
            extractor, [names[i] for i in order], lambda i: images[order[i]], tmp_path, batch=2
        )

    first = get(extractor, [0, 1, 2, 3, 4])
    again = get(extractor, [4, 2, 0, 1, 3])  # a set has no order
    np.testing.assert_array_equal(first.covariance, again.covariance)
    assert extractor.seen == 5
    get(extractor, [0, 1, 2, 3])
    assert extractor.seen == 9
    other = _Mean(version=2)
    get(other, [0, 1, 2, 3, 4])
    assert other.seen == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other arrays", "not finite"])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8)
    first = cached_statistics(_Mean(), list("abcd"), lambda i: images[i], tmp_path)
    (entry,) = tmp_path.glob("*.npz")
    data = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(data[:60])
    elif damage == "flipped":
        entry.write_bytes(data[:150] + bytes([data[150] ^ 255]) + data[151:])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "other arrays":
        np.savez(entry, mean=np.zeros(2))
    else:
        np.savez(entry, mean=first.mean * np.nan, covariance=first.covariance, n=np.array(4))
    extractor = _Mean()
    again = cached_statistics(extractor, list("abcd"), lambda i: images[i], tmp_path)
    assert extractor.seen == 4
    np.testing.assert_array_equal(first.covariance, again.covariance)
    assert read_statistics(entry) is not None
