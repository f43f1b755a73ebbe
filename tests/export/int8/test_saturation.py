"""INT8 sums on processors with and without VNNI: 7-bit weights are exact on both, in each runtime,
and whoever opens an artifact finds out whether it gives its numbers."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelops.base.errors import ExportError, NotReproducedError
from modelops.base.processor import describe_processor, this_processor
from modelops.export.artifact.choice import choose_runtime
from modelops.export.artifact.directory import read_artifact
from modelops.export.artifact.open import open_artifact
from modelops.export.graphs.graph import Array, available_runtimes
from modelops.export.int8.lint import lint_qdq
from modelops.export.int8.qdq import QdqWriter, round_weights
from modelops.export.int8.ranges import measure_ranges
from modelops.export.int8.saturation import decide_weight_range
from modelops.export.onnx.weight_range import WeightRange, read_weight_range
from modelops.export.runtimes import probe
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.precision import served_precision
from modelops.export.runtimes.probe import (
    SAME_ERROR,
    compare_apart,
    compare_with_probe,
    read_probe,
    relative_errors,
    write_probe,
)
from small_graphs import (
    ConvNet,
    Transformer,
    joint_feed,
    random_rows,
    shared_network,
    write_gated,
    write_joint_attention,
)

NETWORKS = ("transformer", "convnet", "joint attention", "gated")
openvino = pytest.mark.skipif("openvino" not in available_runtimes(), reason="no OpenVINO here")
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is an instruction of x86")
Int8 = Callable[[str, WeightRange], tuple[Path, dict[str, Array]]]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Int8:
    """A network by name and range, everything in INT8, with its probe beside it; and eight rows."""
    made: dict[tuple[str, WeightRange], tuple[Path, dict[str, Array]]] = {}

    def make(name: str, weight_range: WeightRange) -> tuple[Path, dict[str, Array]]:
        if (name, weight_range) not in made:
            made[name, weight_range] = _quantise(name, weight_range, tmp_path_factory)
        return made[name, weight_range]

    return make


def _quantise(
    name: str, weight_range: WeightRange, factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Array]]:
    folder = factory.mktemp("int8")
    if name == "gated":
        source = write_gated(folder / "fp32.onnx")
        feed = {"x": np.random.default_rng(1).standard_normal((3, 6, 8)).astype(np.float32)}
    elif name == "joint attention":
        source, feed = write_joint_attention(folder / "fp32.onnx"), joint_feed()
    else:
        network = Transformer() if name == "transformer" else ConvNet()
        source, feed = shared_network(network, factory), random_rows(network, 8, 1).take(range(8))
    writer, target = QdqWriter(source), folder / "model.onnx"
    ranges = measure_ranges(source, writer.calibrated_tensors(), [feed])
    writer.write(target, ranges, list(writer.nodes), weight_range=weight_range)
    expected, answer = OrtGraph(source).run(feed), OrtGraph(target).run(feed)
    write_probe(folder, feed, expected, answer, quantised=target)
    return target, feed


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NETWORKS)
def test_seven_bits_are_exact_in_every_runtime(int8: Int8, name: str, runtime: str) -> None:
    if runtime not in available_runtimes():
        pytest.skip(f"no {runtime} here")
    path, feed = int8(name, "reduced")
    assert lint_qdq(path) == []
    assert read_weight_range(path) == "reduced"
    exact = OrtGraph(path, as_written=True).run(feed)
    here = open_graph(path, runtime).run(feed)  # type: ignore[arg-type]
    # Sums in another order may round one activation to the next level; saturating is tenfold that.
    errors = relative_errors(exact, here)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_exact_in_onnxruntime(int8: Int8, name: str) -> None:
    path, feed = int8(name, "full")
    assert read_weight_range(path) == "full"
    exact = OrtGraph(path, as_written=True).run(feed)
    assert relative_errors(exact, OrtGraph(path).run(feed)).max() < 1e-5


@x86
@openvino
@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_as_with_avx2_alone_saturates_with_eight_bits_only(int8: Int8, name: str) -> None:
    eight = compare_apart(int8(name, "full")[0], "openvino", isa="AVX2")
    seven = compare_apart(int8(name, "reduced")[0], "openvino", isa="AVX2")
    assert not eight.passed
    assert eight.error > 1.8 * eight.bound / SAME_ERROR  # that of exact sums
    assert seven.passed
    assert seven.error == pytest.approx(seven.bound / SAME_ERROR, rel=1e-2)


@openvino
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_in_openvino_are_exact_or_found_out(int8: Int8, name: str) -> None:
    path, _ = int8(name, "full")
    graph, kept = open_graph(path, "openvino"), read_probe(path.parent)
    found = compare_with_probe(kept, graph, file=path.name, quantised=True)
    assert found.passed is not this_processor().sums_saturate


def test_seven_bits_of_weights_and_of_what_products_read(int8: Int8) -> None:
    import onnx

    model = onnx.load(str(int8("transformer", "reduced")[0]))
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    weights = [array for array in arrays.values() if array.dtype == np.int8 and array.ndim > 1]
    assert weights
    assert {int(np.abs(array.astype(int)).max()) for array in weights} == {64}
    clipped = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clipped) == 4  # keys and values of two blocks
    for node in clipped:
        low, high = (float(arrays[name]) for name in node.input[1:])
        scale = next(
            float(arrays[user.input[1]]) for user in model.graph.node
            if user.op_type == "QuantizeLinear" and user.input[0] == node.output[0]
        )  # fmt: skip
        assert (low / scale, high / scale) == pytest.approx((-64, 64), rel=1e-6)
    values = np.array([[0.5, -1.28, 0.01]], np.float32)
    assert round_weights(values, 0, 64)[0].tolist() == [[25, -64, 0]]


def test_a_quantised_graph_keeps_what_it_says_of_its_axes(tmp_path: Path) -> None:
    import onnx

    from modelops.export.graphs.axes import read_multiples, write_multiples

    source = write_gated(tmp_path / "fp32.onnx")
    model = onnx.load(str(source))
    write_multiples(model, {"height": 4})
    onnx.save(model, str(source))
    writer, feed = QdqWriter(source), {"x": np.ones((2, 6, 8), np.float32)}
    ranges = measure_ranges(source, writer.calibrated_tensors(), [feed])
    writer.write(tmp_path / "int8.onnx", ranges, list(writer.nodes))
    assert read_multiples(onnx.load(str(tmp_path / "int8.onnx"))) == {"height": 4}


@pytest.mark.parametrize(
    ("errors", "served", "chosen", "why"),
    [
        ((0.030, 0.033), (0.030, 0.033), "reduced", "right on every processor"),
        ((0.030, 0.060), (0.031, 0.061), "full", "7 bits would have 2.00 times"),
        ((0.030, 0.060), (0.120, 0.060), "reduced", "4.0 times their error"),
        ((0.030, 0.060), (float("nan"), 0.060), "reduced", "saturate"),
    ],
)
def test_the_range_is_chosen_by_error_and_by_what_this_processor_does(
    errors: tuple[float, float], served: tuple[float, float], chosen: str, why: str
) -> None:
    ranges = ("full", "reduced")
    found = decide_weight_range(
        dict(zip(ranges, errors, strict=True)), dict(zip(ranges, served, strict=True)), "openvino"
    )
    assert found.chosen == chosen
    assert why in found.why
    asked = decide_weight_range({"full": errors[0]}, {"full": served[0]}, "openvino")
    assert (asked.chosen, asked.why) == ("full", "asked for")


def test_what_an_artifact_says_of_processors(int8_artifact: Path) -> None:
    record = read_artifact(int8_artifact)
    here = [one for one in record.reproduced if not one.imitated_by]
    assert {one.runtime for one in here} == set(available_runtimes("int8"))
    assert {one.processor for one in here} == {this_processor().kind}
    served = next(one for one in here if one.runtime == record.runtime)
    assert served.passed
    assert served.error <= served.bound
    assert served.precision == served_precision(record, record.runtime)
    assert set(record.calibration["weight_range"]["errors"]) == {"full", "reduced"}
    source = open_artifact(int8_artifact, batch_size=1)
    details: dict[str, Any] = dict(source.info.details)
    assert details["error"] <= details["error_bound"]
    assert details["processor"] == this_processor().kind


def test_wrong_numbers_are_refused_in_one_line_whoever_names_the_runtime(
    int8_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    artifact = tmp_path / "artifact"
    shutil.copytree(int8_artifact, artifact)
    path = artifact / "unet" / probe.PROBE
    arrays = load_file(path)
    # As if what runs here were as far off as saturated sums are: torch's outputs are elsewhere.
    error = arrays["exact"] - arrays["output"]
    exact = {"exact": arrays["output"] + error / 3, "answer": arrays["output"] + error / 3}
    save_file({**arrays, **exact}, path)
    record = read_artifact(artifact)
    for runtime in ("auto", *available_runtimes("int8")):
        with pytest.raises(NotReproducedError, match="numbers it was gated with") as caught:
            choose_runtime(artifact, record, f"digest {runtime}", runtime=runtime)
        assert "\n" not in caught.value.message
        assert this_processor().kind in caught.value.message
    save_file({k: v for k, v in arrays.items() if k != "exact"}, path)
    with pytest.raises(ExportError, match="no answers to compare with"):
        choose_runtime(artifact, record, "without", runtime="onnxruntime")


def test_the_answer_of_another_kind_of_processor_is_not_taken(
    int8_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    record = read_artifact(int8_artifact)
    choose_runtime(int8_artifact, record, "digest")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # as when a machine is moved while it sleeps
    choice = choose_runtime(int8_artifact, record, "digest")
    assert "limited to SSE41" in choice.processor
    kept = [json.loads(p.read_text()) for p in (tmp_path / "cache/runtimes").iterdir()]
    assert len({row["processor"] for row in kept}) == 2


def test_a_runtime_that_crashes_on_another_kind_takes_nobody_with_it(
    int8_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    record = read_artifact(int8_artifact)
    elsewhere = [one.model_copy(update={"processor": "another"}) for one in record.reproduced]
    unknown = record.model_copy(update={"reproduced": elsewhere})
    # OpenVINO did this with a real network's kernels for AVX2.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, faulthandler\n"
        f"if sys.orig_argv[-1] == {record.runtime!r}: faulthandler._sigsegv()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert choose_runtime(int8_artifact, record, "known here", runtime=record.runtime)
    with pytest.raises(NotReproducedError, match="it crashed: SIGSEGV"):
        choose_runtime(int8_artifact, unknown, "unknown", runtime=record.runtime)
    for other in set(available_runtimes("int8")) - {record.runtime}:
        choice = choose_runtime(int8_artifact, unknown, "unknown")
        assert choice.runtime == other
        assert f"{record.runtime} does not run it here (it crashed: SIGSEGV)" in choice.reason


def test_kinds_of_processors() -> None:
    avx2 = {"avx2": True}
    vnni = {**avx2, "avx512_f": True, "avx512_vnni": True}
    all_of_it = {**vnni, "avx512_bf16": True, "amx_tile": True}

    def kind(capabilities: dict[str, bool], limit: str = "") -> tuple[bool, bool]:
        variables = {"ONEDNN_MAX_CPU_ISA": limit} if limit else {}
        found = describe_processor("x86_64", capabilities, variables)
        return found.sums_saturate, found.has_bfloat16

    assert kind(avx2) == (True, False)
    assert kind({"avx2": True, "avx_vnni": True}) == (False, False)
    assert kind(vnni) == (False, False)
    assert kind(all_of_it) == (False, True)
    assert kind(all_of_it, "AVX2") == kind(all_of_it, "avx512_core") == (True, False)
    assert kind(all_of_it, "AVX512_CORE_VNNI") == (False, False)
    assert kind(all_of_it, "AVX512_CORE_BF16") == kind(all_of_it, "ALL") == (False, True)
    assert not describe_processor("aarch64", {"neon": True, "i8mm": True}, {}).sums_saturate
    text = describe_processor("x86_64", vnni, {"DNNL_MAX_CPU_ISA": "avx2"}).kind
    assert text == "x86_64 with AVX2, AVX-512, VNNI, oneDNN limited to AVX2"
