"""FID and its family in a whole evaluation, from locally made Inception weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))
import inception_peers as peers
from modelops.base.errors import UsageError
from modelops.base.images import read_image
from modelops.data.manifest import read_manifest
from modelops.data.split import read_splits
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.measures import fid
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.folder import FolderSource
from modelops.evaluation.sources.open import open_source
from modelops.metrics.frechet import features_to_statistics
from modelops.metrics.inception import InceptionExtractor


def test_the_reference_pictures_have_no_distance_to_themselves(corpus: Any, tmp_path: Path) -> None:
    manifest, splits = read_manifest(corpus.manifest), read_splits(corpus.splits)
    own = tmp_path / "pictures"
    own.mkdir()
    test = [row for row in manifest.rows if splits[row.id] == "test"]
    for row in test:
        picture = manifest.image_path(row)
        (own / picture.name).write_bytes(picture.read_bytes())
    weights = peers.random_weights(tmp_path, calibration=peers.picture_files(own)[:2])
    settings = EvaluationSettings(
        manifest=corpus.manifest, splits=corpus.splits, inception_weights=weights,
        fid_mode="legacy_tensorflow", resamples=20, safety="none",
    )  # fmt: skip
    record = evaluate(open_source(str(own)), settings, out_path=tmp_path / "out.json")
    metrics = record.metrics
    assert metrics["fid"].value == pytest.approx(0, abs=1e-6)
    for name in ("precision", "recall", "coverage"):
        assert metrics[f"{name}_inception"].value == 1
    assert metrics["kid"].value is not None and metrics["kid"].value < 0  # unbiased: below zero
    assert "too few to extrapolate" in (metrics["fid_infinity"].not_measured or "")
    assert "too few for 10 splits" in (metrics["inception_score"].not_measured or "")
    assert set(fid.KEYS) <= set(metrics)
    features = record.protocols[metrics["fid"].protocol or ""]["features"]
    assert features["mode"] == "legacy_tensorflow"
    assert any("none of the published files" in text for text in metrics["fid"].warnings)
    assert any("singular" in text for text in metrics["fid"].warnings)

    # And none to their own statistics, in a file as pytorch-fid writes it.
    made = features_to_statistics(
        InceptionExtractor(weights, mode="legacy_tensorflow").images_to_features(
            read_image(path) for path in FolderSource(own).files
        )
    )
    np.savez(tmp_path / "known.npz", mu=made.mean, sigma=made.covariance)
    settings = EvaluationSettings(
        reference=tmp_path / "known.npz", inception_weights=weights, fid_mode="legacy_tensorflow",
        resamples=20, safety="none", jackknife_groups=3,
    )  # fmt: skip
    record = evaluate(open_source(str(own)), settings, out_path=tmp_path / "known.json")
    found = record.metrics["fid"]
    assert found.value == pytest.approx(0, abs=1e-6)
    assert any("does not say how its images were resized" in text for text in found.warnings)
    assert "statistics alone" in (record.metrics["kid"].not_measured or "")
    assert "statistics alone" in (record.metrics["frechet_distance_lite0"].not_measured or "")
    assert record.reference is not None and record.reference.path.endswith("known.npz")


@pytest.mark.slow
def test_fid_is_extrapolated_to_infinitely_many_images(corpus: Any, tmp_path: Path) -> None:
    """By the function that metrics/test_frechet holds to its formula, on Inception features."""
    from modelops.metrics.frechet import frechet_infinity

    pictures = corpus.manifest.parent / "images"
    weights = peers.random_weights(tmp_path, calibration=peers.picture_files(pictures)[:2])
    settings = EvaluationSettings(
        manifest=corpus.manifest, splits=corpus.splits, inception_weights=weights, n=16,
        split="train", resamples=20, safety="none", seed=5, jackknife_groups=3,
    )  # fmt: skip
    out = tmp_path / "out.json"
    record = evaluate(open_source(str(pictures)), settings, out_path=out)
    found = record.metrics["fid_infinity"]
    extractor = InceptionExtractor(weights)
    fake = extractor.images_to_features(
        read_image(path) for path in FolderSource(pictures).files[:16]
    )
    manifest, splits = read_manifest(corpus.manifest), read_splits(corpus.splits)
    real = extractor.images_to_features(
        read_image(manifest.image_path(row)) for row in manifest.rows if splits[row.id] == "train"
    )
    expected = frechet_infinity(fake, real, seed=5).interval
    assert found.value == pytest.approx(expected.value, rel=1e-4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-3)
    assert found.details["mode"] == "clean" and found.details["n_reference"] == len(real)
    assert any("not yet linear" in text for text in found.warnings)


def test_unknown_modes_are_refused(corpus: Any) -> None:
    for field, message in (("fid_mode", "fid_mode 'x': one of clean"),
                           ("extractor_dtype", "extractor_dtype 'x': one of float32")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            EvaluationSettings(manifest=corpus.manifest, splits=corpus.splits, **{field: "x"})
