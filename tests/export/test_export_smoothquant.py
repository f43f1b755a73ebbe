"""SmoothQuant: the same function, its closed form, and kept only where it helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_graphs import ConvNet, Transformer, random_rows, shared_network

from modelops.errors import ExportError
from modelops.export.int8.smoothquant import (
    channel_maxima,
    choose_smoothing,
    smooth_graph,
    smoothable_tensors,
    smoothing_scales,
)
from modelops.export.parity import relative_errors
from modelops.export.runtimes.onnxruntime import OrtGraph


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with two channels that are about 25 times as large as the rest."""
    return shared_network(Transformer(outliers=25.0), tmp_path_factory)


def test_the_scales_are_the_papers() -> None:
    x, w = np.array([16.0, 1.0, 0.0], np.float32), np.array([1.0, 4.0, 2.0], np.float32)
    assert np.allclose(smoothing_scales(x, w, 0.5), [4.0, 0.5, 1.0])
    assert np.allclose(smoothing_scales(x, w, 1.0), [16.0, 1.0, 1.0])
    assert np.allclose(smoothing_scales(x, w, 0.0), [1.0, 0.25, 1.0])


def test_the_smoothed_graph_computes_the_same_and_evens_the_channels(
    outlying: Path, tmp_path: Path
) -> None:
    rows = random_rows(Transformer(), 16, 0)
    targets = smoothable_tensors(outlying)
    assert sorted(len(nodes) for nodes in targets.values()) == [1] * 7 + [3] * 2  # q, k, v share
    maxima = channel_maxima(outlying, list(targets), rows.batches(8))
    smoothed, folded = smooth_graph(outlying, tmp_path / "s.onnx", maxima, alpha=0.5)
    onnx.checker.check_model(str(tmp_path / "s.onnx"), full_check=True)
    assert (smoothed, folded) == (9, 4)  # an adaptive and an affine norm in each block
    feed = random_rows(Transformer(), 8, 1).take(range(8))
    errors = relative_errors(OrtGraph(outlying).run(feed), OrtGraph(tmp_path / "s.onnx").run(feed))
    assert 0 < errors.max() < 1e-5
    # a norm that is folded into keeps its output's name, so the same tensor can be looked at
    graph = onnx.load(str(outlying)).graph
    norm = next(n.output[0] for n in graph.node
                if n.op_type == "LayerNormalization" and n.output[0] in targets)  # fmt: skip
    after = channel_maxima(tmp_path / "s.onnx", [norm], rows.batches(8))[norm]
    before = maxima[norm]
    assert before.max() / np.median(before) > 10
    assert after.max() / np.median(after) < 0.5 * before.max() / np.median(before)


def test_it_is_kept_where_it_lowers_the_error_on_other_rows(outlying: Path, tmp_path: Path) -> None:
    rows, held_out = (random_rows(Transformer(), 16, seed) for seed in (0, 1))
    target = tmp_path / "smoothed.onnx"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    kept = choose_smoothing(outlying, target, scratch, rows=rows, held_out=held_out)
    assert kept.alpha is not None
    assert kept.errors[kept.alpha] == min(kept.errors.values()) < 0.98 * kept.error_before
    assert target.exists()
    assert kept.as_record()["errors"][f"{kept.alpha:g}"] == kept.errors[kept.alpha]
    target.unlink()
    for path in scratch.iterdir():
        path.unlink()
    refused = choose_smoothing(
        outlying, target, scratch, rows=rows, held_out=held_out, alphas=(0.5,), least_gain=0.99
    )
    assert refused.alpha is None
    assert refused.errors.keys() == {0.5}
    assert not target.exists()


def test_a_network_without_products_of_tokens_is_left_alone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = shared_network(ConvNet(), tmp_path_factory)
    assert smoothable_tensors(source) == {}
    rows = random_rows(ConvNet(), 8, 0)
    result = choose_smoothing(
        source, tmp_path / "s.onnx", tmp_path, rows=rows, held_out=random_rows(ConvNet(), 8, 1)
    )
    assert (result.alpha, result.errors) == (None, {})


def test_an_alpha_outside_its_range_is_refused(outlying: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="alpha must be in"):
        smooth_graph(outlying, tmp_path / "s.onnx", {}, alpha=1.5)
