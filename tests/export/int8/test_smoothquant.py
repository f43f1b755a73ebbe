"""SmoothQuant: the same function, its closed form, and kept only where it helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from modelops.base.errors import ExportError
from modelops.export.int8.smoothquant import (
    Channels,
    SmoothedTensors,
    channel_bounds,
    choose_smoothing,
    smooth_graph,
    smoothable_tensors,
    smoothing_scales,
)
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.probe import relative_errors
from small_graphs import ConvNet, Transformer, random_rows, shared_network


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
    bounds = channel_bounds(outlying, list(targets), rows.batches(8))
    counts = smooth_graph(outlying, tmp_path / "s.onnx", bounds, alpha=0.5, shift=False)
    onnx.checker.check_model(str(tmp_path / "s.onnx"), full_check=True)
    assert counts == SmoothedTensors(9, 4, 0)  # an adaptive and an affine norm in each block
    feed = random_rows(Transformer(), 8, 1).take(range(8))
    errors = relative_errors(OrtGraph(outlying).run(feed), OrtGraph(tmp_path / "s.onnx").run(feed))
    assert 0 < errors.max() < 1e-5
    shifted = smooth_graph(outlying, tmp_path / "shifted.onnx", bounds, alpha=0.5)
    assert (shifted.tensors, shifted.folded) == (9, 4)
    assert shifted.shifted >= 4  # into both kinds of norm, and behind GELU
    onnx.checker.check_model(str(tmp_path / "shifted.onnx"), full_check=True)
    got = OrtGraph(tmp_path / "shifted.onnx").run(feed)
    assert 0 < relative_errors(OrtGraph(outlying).run(feed), got).max() < 1e-5
    # a norm that is folded into keeps its output's name, so the same tensor can be looked at
    graph = onnx.load(str(outlying)).graph
    norm = next(n.output[0] for n in graph.node
                if n.op_type == "LayerNormalization" and n.output[0] in targets)  # fmt: skip
    whole = np.zeros_like(bounds[norm].low)
    after = channel_bounds(tmp_path / "s.onnx", [norm], rows.batches(8))[norm].largest(whole)
    before = bounds[norm].largest(whole)
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


def _one_signed(path: Path) -> dict[str, np.ndarray]:
    """|x| to three products with a bias of three kinds: none, an Add's, a Gemm's own; and one whose
    output is the graph's; and to one with a stack of matrices, which is left alone."""
    generator = np.random.default_rng(0)
    helper, constant = onnx.helper, onnx.numpy_helper.from_array
    weights = [
        constant(generator.normal(size=(8, 5)).astype(np.float32), f"w{i}") for i in range(4)
    ]
    rows = [constant(generator.normal(size=5).astype(np.float32), name) for name in ("b1", "b2")]
    rows.append(constant(generator.normal(size=(2, 8, 5)).astype(np.float32), "w4"))
    nodes = [
        helper.make_node("Abs", ["x"], ["y"]),
        helper.make_node("MatMul", ["y", "w0"], ["bare"], name="bare"),
        helper.make_node("MatMul", ["y", "w1"], ["product"], name="added"),
        helper.make_node("Add", ["b1", "product"], ["sum"]),
        helper.make_node("Gemm", ["y", "w2", "b2"], ["own"], name="own"),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("MatMul", ["z", "w3"], ["last"], name="last"),
        helper.make_node("MatMul", ["y", "w4"], ["stack"], name="stack"),
        helper.make_node("Concat", ["bare", "sum", "own"], ["out"], axis=1),
    ]
    for node in nodes:
        scopes = repr(["", "transformer_blocks.0", "transformer_blocks.0.ff", node.name])
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    row = onnx.helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "one_signed", [row("x", 1, ["n", 8])],
        [row("out", 1, ["n", 15]), row("last", 1, ["n", 5]), row("stack", 1, [2, "n", 5])],
        [*weights, *rows],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return {"x": generator.normal(size=(64, 8)).astype(np.float32)}


def test_a_shift_halves_what_has_one_sign_and_goes_into_every_kind_of_bias(tmp_path: Path) -> None:
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    feed = _one_signed(source)
    bounds = channel_bounds(source, ["y", "z"], [feed])
    assert bounds["y"].low.min() >= 0
    counts = smooth_graph(source, target, bounds, alpha=0.5)
    assert counts == SmoothedTensors(tensors=2, folded=0, shifted=1)  # "last" has no place for it
    onnx.checker.check_model(str(target), full_check=True)
    sessions = [onnxruntime.InferenceSession(str(path)) for path in (source, target)]
    for expected, got in zip(*(session.run(None, feed) for session in sessions), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    moved = channel_bounds(target, ["y_smoothed"], [feed])["y_smoothed"]
    np.testing.assert_allclose(moved.low, -moved.high, rtol=1e-4)
    plain = smooth_graph(source, tmp_path / "plain.onnx", bounds, alpha=0.5, shift=False)
    assert plain.shifted == 0
    wide = channel_bounds(tmp_path / "plain.onnx", ["y_smoothed"], [feed])["y_smoothed"]
    # At alpha 0.5 a channel's range is the root of what it was, times the same of the weights.
    np.testing.assert_allclose(moved.high / wide.high, 0.5**0.5, rtol=0.1)


def test_two_sided_activations_are_not_shifted(tmp_path: Path) -> None:
    _one_signed(tmp_path / "source.onnx")
    nearly = Channels(np.full(8, -1.0, np.float32), np.full(8, 1.05, np.float32))
    counts = smooth_graph(tmp_path / "source.onnx", tmp_path / "target.onnx", {"y": nearly})
    assert counts == SmoothedTensors(tensors=1, folded=0, shifted=0)
