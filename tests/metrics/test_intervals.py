"""Intervals against literals and by simulation; protocol identity; the feature cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.base.errors import EvaluationError, MissingWeightsError
from modelops.metrics.features import cached_features, write_arrays
from modelops.metrics.inception import InceptionExtractor
from modelops.metrics.intervals import (
    bootstrap_mean,
    bootstrap_median,
    clopper_pearson,
)
from modelops.metrics.protocol import (
    protocol_differences,
    protocol_id,
    require_same_protocol,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # R: binom.test(x, n)$conf.int
        (0, 200, 0.0, 0.01827534),
        (10, 10, 0.6915029, 1.0),
        (5, 20, 0.08657147, 0.4910459),
    ],
)
def test_clopper_pearson_literals(successes: int, n: int, low: float, high: float) -> None:
    made = clopper_pearson(successes, n)
    assert made.low == pytest.approx(low, abs=1e-6)
    assert made.high == pytest.approx(high, abs=1e-6)


def test_impossible_counts_are_refused() -> None:
    for successes, n in ((1, 0), (5, 4), (-1, 4)):
        with pytest.raises(EvaluationError):
            clopper_pearson(successes, n)


def test_bootstrap_coverage_by_simulation() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for index in range(200):
        made = bootstrap_mean(generator.exponential(size=60), seed=index, resamples=400)
        hits += made.low <= 1.0 <= made.high
    assert 180 <= hits <= 198  # 90 to 99 %


def test_bootstrap_is_seeded_and_refuses_nan() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    assert bootstrap_median(values, seed=0).value == np.median(values)
    with pytest.raises(EvaluationError, match="not finite"):
        bootstrap_mean(np.array([1.0, np.nan]), seed=0)


def test_protocols_differ_by_name_and_value() -> None:
    first = {"features": {"resize": "bicubic", "dim": 4}, "n": 10}
    second = {"features": {"resize": "bilinear", "dim": 4}, "n": 10, "ddof": 1}
    assert protocol_id(first) == protocol_id({"n": 10, "features": {"dim": 4, "resize": "bicubic"}})
    assert protocol_id(first) != protocol_id(second)
    assert protocol_differences(first, second) == [
        "ddof: absent against 1",
        "features.resize: bicubic against bilinear",
    ]
    with pytest.raises(EvaluationError, match=r"features\.resize: bicubic against bilinear"):
        require_same_protocol(first, second, metric="fid")
    require_same_protocol(first, dict(first), metric="fid")


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


def test_features_are_cached_by_content_and_protocol(tmp_path: Path) -> None:
    image = np.full((2, 2, 3), 7, np.uint8)
    extractor = _Mean()
    first = cached_features(extractor, ["a", "b"], lambda _: image, tmp_path)
    again = cached_features(extractor, ["a", "b"], lambda _: image, tmp_path)
    np.testing.assert_array_equal(first, again)
    assert extractor.seen == 2
    cached_features(extractor, ["a", "c"], lambda _: image, tmp_path)
    assert extractor.seen == 4
    other = _Mean(version=2)
    cached_features(other, ["a", "b"], lambda _: image, tmp_path)
    assert other.seen == 2


def test_a_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    image = np.full((2, 2, 3), 7, np.uint8)
    first = cached_features(_Mean(), ["a"], lambda _: image, tmp_path)
    (entry,) = tmp_path.glob("*.npz")
    entry.write_bytes(entry.read_bytes()[:40])
    np.testing.assert_array_equal(cached_features(_Mean(), ["a"], lambda _: image, tmp_path), first)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="objects"):
        write_arrays(tmp_path / "a.npz", names=np.array(["a", None], object))


def test_inception_needs_its_weights(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="no such file"):
        InceptionExtractor(tmp_path / "inception-2015-12-05.pt")
    fake = tmp_path / "inception-2015-12-05.pt"
    fake.write_bytes(b"not TorchScript")
    with pytest.raises(MissingWeightsError, match="not the Inception"):
        InceptionExtractor(fake).images_to_features([np.zeros((8, 8, 3), np.uint8)])
