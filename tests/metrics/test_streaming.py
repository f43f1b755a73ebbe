"""Streamed statistics against one pass in extended precision, and their cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from modelops.base.errors import EvaluationError
from modelops.metrics.cmmd import cmmd, statistics_to_cmmd
from modelops.metrics.feature_files import (
    FeatureCache,
    map_features,
    release,
    row_chunks,
    write_features,
)
from modelops.metrics.features import cached_features, features_key
from modelops.metrics.frechet import (
    Statistics,
    features_to_statistics,
    frechet_interval,
)
from modelops.metrics.inception import (
    logits_to_inception_score,
    shuffled_order,
    streamed_inception_score,
)
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.prdc import prdc
from modelops.metrics.streaming import (
    RunningStatistics,
    cached_statistics,
    read_statistics,
    remove_statistics,
    stream_statistics,
    streamed_frechet_interval,
    streamed_interval,
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
            extractor, [names[i] for i in order],
            lambda: extractor.images_to_features(images[order]), tmp_path,
        )  # fmt: skip

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
    first = cached_statistics(
        _Mean(), list("abcd"), lambda: _Mean().images_to_features(images), tmp_path
    )
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
    again = cached_statistics(
        extractor, list("abcd"), lambda: extractor.images_to_features(images), tmp_path
    )
    assert extractor.seen == 4
    np.testing.assert_array_equal(first.covariance, again.covariance)
    assert read_statistics(entry) is not None


def test_removing_is_merging_backwards() -> None:
    data = features()
    part = features_to_statistics(data[40:90])
    left = remove_statistics(features_to_statistics(data), part)
    assert_equal(left, np.concatenate([data[:40], data[90:]]))
    with pytest.raises(EvaluationError, match="too few"):
        remove_statistics(part, features_to_statistics(data[40:89]))


def mapped(path: Path, data: np.ndarray) -> np.ndarray:
    """The same features as a memory map."""
    np.save(path, data.astype(np.float32), allow_pickle=False)
    found = map_features(path)
    assert found is not None and isinstance(found, np.memmap)
    return found


@pytest.mark.parametrize(("n", "m"), [(90, 70), (300, 30), (30, 300), (40, 9), (25, 25)])
def test_streamed_frechet_is_the_same_interval(tmp_path: Path, n: int, m: int) -> None:
    """Also where one covariance is singular: 12 dimensions against 9 vectors."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=(n, 12)).astype(np.float32)
    y = (generator.normal(size=(m, 12)) * 1.3 + 0.2).astype(np.float32)
    expected = frechet_interval(x, y, seed=3, groups=5)
    found = streamed_frechet_interval(
        mapped(tmp_path / "x.npy", x), mapped(tmp_path / "y.npy", y), seed=3, groups=5
    )
    for end in ("value", "low", "high"):
        assert getattr(found, end) == pytest.approx(getattr(expected, end), rel=1e-6)
    assert found.method == expected.method


def test_streamed_frechet_takes_known_statistics_of_the_second_set() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(60, 5)), generator.normal(size=(80, 5))
    plain = streamed_frechet_interval(x, y, seed=0, groups=4)
    assert plain == streamed_frechet_interval(x, y, seed=0, groups=4, known=stream_statistics(y))


def test_streamed_cmmd_is_near_the_exact_one() -> None:
    generator = np.random.default_rng(2)
    x = generator.normal(size=(200, 16)) + 0.5
    y = generator.normal(size=(150, 16))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    exact = cmmd(x, y)
    found = streamed_interval(x, y, lambda a, b: statistics_to_cmmd(a, b).value, seed=0, groups=40)
    assert found.value == pytest.approx(exact.value, rel=1e-3)
    width = (found.high - found.low) / (exact.high - exact.low)
    assert 0.7 < width < 1.4  # 40 groups against one image at a time


def test_blocks_and_files_do_not_change_what_needs_pairs(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    x = generator.normal(size=(130, 6)).astype(np.float32)
    y = generator.normal(size=(90, 6)).astype(np.float32)
    files = mapped(tmp_path / "x.npy", x), mapped(tmp_path / "y.npy", y)
    whole = kernel_distance(x, y)
    parts = kernel_distance(*files, block=32)
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert prdc(x, y, seed=0, block=7) == prdc(*files, seed=0) == prdc(x, y, seed=0, block=1000)


def test_features_are_written_in_chunks_and_mapped(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 2, 3), np.uint8)
    extractor, seen = _Mean(), []
    path = tmp_path / "f.npy"
    write_features(
        extractor, len(images), lambda i: images[i], path,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    found = map_features(path, 2500, 3)
    assert found is not None
    np.testing.assert_array_equal(found, _Mean().images_to_features(images))
    assert seen == [(1024, 2500), (2048, 2500), (2500, 2500)]
    release(found)
    np.testing.assert_array_equal(found[2400:], _Mean().images_to_features(images[2400:]))
    assert map_features(path, 2499, 3) is None and map_features(path, 2500, 4) is None
    assert [rows.stop for rows in row_chunks(5, 2)] == [2, 4, 5]
    images[7] = 0
    with pytest.raises(EvaluationError, match="1 of 1024 images have features"):
        write_features(_Broken(), len(images), lambda i: images[i], tmp_path / "g.npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npy"]


class _Broken(_Mean):
    def images_to_features(self, images: Iterable[np.ndarray], **more: Any) -> np.ndarray:
        found = super().images_to_features(images)
        found[found.sum(axis=1) == 0] = np.nan
        return found


def test_the_cache_gives_the_same_features_without_extracting(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    plain = cached_features(_Mean(), list("abcde"), lambda i: images[i], None)
    first, second = _Mean(), _Mean()
    for extractor, folder in ((first, tmp_path), (second, tmp_path), (_Mean(), None)):
        made = FeatureCache(folder).features(extractor, list("abcde"), lambda i: images[i])
        np.testing.assert_array_equal(made, plain)
    assert (first.seen, second.seen) == (5, 0)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "text", "not finite", "another shape", "pickle"]
)
def test_damaged_features_are_extracted_again(tmp_path: Path, damage: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    plain = FeatureCache(tmp_path).features(_Mean(), list("abcde"), lambda i: images[i]).copy()
    (path,) = tmp_path.glob("*.npy")
    bad: dict[str, Any] = {
        "cut": path.read_bytes()[:-4], "empty": b"", "text": b"features",
    }  # fmt: skip
    arrays: dict[str, Any] = {
        "not finite": plain * np.float32("nan"), "another shape": plain[:4],
        "pickle": np.array([{"a": 1}], object),
    }  # fmt: skip
    if damage in bad:
        path.write_bytes(bad[damage])
    else:
        np.save(path, arrays[damage], allow_pickle=True)
    extractor = _Mean()
    again = FeatureCache(tmp_path).features(extractor, list("abcde"), lambda i: images[i])
    assert extractor.seen == 5
    np.testing.assert_array_equal(again, plain)


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 3), np.uint8)
    size = 50 * 3 * 4 + 128
    cache = FeatureCache(tmp_path, limit=2 * size)

    def get(version: int) -> int:
        extractor = _Mean(version=version)
        cache.features(extractor, [str(i) for i in range(50)], lambda i: images[i])
        path = tmp_path / f"{features_key(extractor, [str(i) for i in range(50)])}.npy"
        os.utime(path, ns=(next(clock), next(clock)))
        return extractor.seen

    clock = iter(range(10**9, 10**9 + 100))
    assert [get(1), get(2), get(1), get(3)] == [50, 50, 0, 50]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * size
    assert [get(1), get(2)] == [0, 50]  # 2 was used longest ago when 3 came


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    (tmp_path / "file").write_text("not a folder")
    made = FeatureCache(tmp_path / "file" / "cache").features(
        _Mean(), list("abcde"), lambda i: images[i]
    )
    np.testing.assert_array_equal(made, _Mean().images_to_features(images))


class _Classifier:
    """Logits of fixed weights: all that the score asks of an extractor."""

    weights = np.random.default_rng(9).normal(size=(1008, 6))

    def features_to_logits(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(features, np.float64) @ self.weights.T


@pytest.mark.parametrize("splits", [1, 3])
def test_the_streamed_inception_score_is_the_same(splits: int) -> None:
    features = np.random.default_rng(3).normal(size=(100, 6)).astype(np.float32)
    order, extractor = shuffled_order(100, 5), cast(Any, _Classifier())
    expected = logits_to_inception_score(
        extractor.features_to_logits(features), splits=splits, order=order
    )
    found = streamed_inception_score(extractor, features, splits=splits, order=order, chunk=7)
    for end in ("value", "low", "high"):
        assert getattr(found, end) == pytest.approx(getattr(expected, end), rel=1e-12)
    assert found.method == expected.method
    features[3, 2] = np.nan
    with pytest.raises(EvaluationError, match="not finite"):
        streamed_inception_score(extractor, features)
    with pytest.raises(EvaluationError, match="too few for 10"):
        streamed_inception_score(extractor, features[:19])
