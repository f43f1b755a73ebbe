"""INT8 graphs of any network: groups, ranges, both schemes, and the proof that they ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from modelops.base.errors import ExportError, UsageError
from modelops.export.graphs.graph import Array
from modelops.export.int8.accept import onnxruntime_execution, openvino_execution, unproven_layers
from modelops.export.int8.groups import group_of, node_groups, role_of, stage_of
from modelops.export.int8.lint import lint_ort_cpu, lint_qdq
from modelops.export.int8.ortcpu import choose_kind, judge_ort_cpu, write_ort_cpu
from modelops.export.int8.qdq import QdqWriter, quantize_graph, round_weights
from modelops.export.int8.ranges import (
    METHODS,
    Calibration,
    Range,
    entropy_bin,
    measure_ranges,
    percentile_bin,
    visit_tensors,
)
from modelops.export.int8.rewrite import split_columns
from modelops.export.int8.variants import Variants
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.probe import relative_errors
from small_graphs import (
    ConvNet,
    Transformer,
    joint_feed,
    random_rows,
    shared_network,
    write_gated,
    write_joint_attention,
)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_network(Transformer(), tmp_path_factory)


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_network(ConvNet(), tmp_path_factory)


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("unet.conv_in", "conv_in"),
        ("unet.conv_out", "conv_out"),
        ("unet.time_embedding.linear_1", "embeddings"),
        ("unet.add_embedding.linear_2", "embeddings"),
        ("unet.down_blocks.1.resnets.0.time_emb_proj", "embeddings"),
        ("unet.down_blocks.1.resnets.0.conv1", "resnets/down_blocks.1"),
        ("unet.up_blocks.0.resnets.2.conv_shortcut", "shortcuts"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "attention_qkv/mid_block"),
        ("unet.mid_block.attentions.0.proj_in", "attention_out/mid_block"),
        ("unet.up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj",
         "feed_forward/up_blocks.2"),
        ("unet.down_blocks.0.downsamplers.0.conv", "resampling"),
        ("transformer.pos_embed.proj", "conv_in"),
        ("transformer.proj_out", "conv_out"),
        ("transformer.norm_out.linear", "modulation"),
        ("transformer.context_embedder", "embeddings"),
        ("transformer.caption_projection.linear_1", "embeddings"),
        ("transformer.adaln_single.linear", "modulation"),
        ("transformer.transformer_blocks.3.norm1_context.linear", "modulation"),
        ("transformer.transformer_blocks.3.attn.add_q_proj",
         "attention_qkv/transformer_blocks.3"),
        ("transformer.transformer_blocks.3.attn.to_add_out", "attention_out/transformer_blocks.3"),
        ("transformer.transformer_blocks.3.ff_context.net.2", "feed_forward/transformer_blocks.3"),
        ("transformer.transformer_blocks.3.ff.conv_depth", "feed_forward/transformer_blocks.3"),
        ("transformer.single_transformer_blocks.9.proj_mlp",
         "feed_forward/single_transformer_blocks.9"),
        ("transformer.single_transformer_blocks.9.proj_out",
         "feed_forward/single_transformer_blocks.9"),
        ("net.stages.4.mystery", "layers/stages.4"),
        ("net.mystery", "other"),
    ],
)  # fmt: skip
def test_the_group_is_the_role_and_the_block(path: str, group: str) -> None:
    words = path.split(".")
    scopes = [".".join(words[:count]) for count in range(len(words) + 1)]
    assert group_of(repr([*scopes, "linear_7"])) == group


def test_deep_networks_have_few_groups_and_every_layer_is_in_one(transformer: Path) -> None:
    writer = QdqWriter(transformer)
    fine, coarse = writer.groups(), writer.groups(max_groups=8)
    assert {"attention_qkv/transformer_blocks.0", "modulation", "conv_out"} <= set(fine)
    assert len(coarse) <= 8
    assert "attention_qkv/transformer_blocks.0..transformer_blocks.1" in coarse
    for groups in (fine, coarse):
        names = [name for members in groups.values() for name in members]
        assert sorted(names) == sorted(writer.nodes)
    assert node_groups(transformer) == fine
    assert (role_of(""), stage_of("")) == ("other", "")


def test_weights_are_rounded_to_the_nearest_step_of_their_channel() -> None:
    values = np.array([[0.5, -1.27, 0.004], [0.0, 0.0, 0.0]], np.float32)
    rounded, scales = round_weights(values, 0)
    assert np.allclose(scales, [0.01, 1.0])
    assert rounded.tolist() == [[50, -127, 0], [0, 0, 0]]
    assert round_weights(values.T, 1)[0].T.tolist() == rounded.tolist()


def test_ranges_against_numpy_in_any_batching(transformer: Path) -> None:
    network = Transformer()
    rows = random_rows(network, 12, 0)
    names = ["hidden_states", *QdqWriter(transformer).calibrated_tensors()[1:3]]
    whole = measure_ranges(transformer, names, rows.batches(12))
    parts = measure_ranges(transformer, names, rows.batches(3))
    noise = rows.feeds["hidden_states"]
    assert whole["hidden_states"] == Range(float(noise.min()), float(noise.max()))
    for name in names:
        assert whole[name].low == pytest.approx(parts[name].low, abs=1e-5)
        assert whole[name].high == pytest.approx(parts[name].high, abs=1e-5)
        assert whole[name].low <= 0 <= whole[name].high


def test_an_input_without_rows_goes_in_whole(tmp_path: Path) -> None:
    kinds = (("x", ["batch", 4]), ("positions", ["tokens", 4]), ("y", None))
    x, positions, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in kinds
    )
    node = onnx.helper.make_node("Gemm", ["x", "positions"], ["y"], transB=1)
    graph = onnx.helper.make_graph([node], "g", [x, positions], [y])
    opset = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    feed = {"x": np.eye(4, dtype=np.float32), "positions": np.diag([1, 2, 3, 9]).astype(np.float32)}
    assert measure_ranges(path, ["y"], [feed])["y"] == Range(0.0, 9.0)
    seen: list[tuple[int, ...]] = []
    visit_tensors(path, ["y"], [feed], lambda _, array: seen.append(array.shape))
    assert seen == [(4, 4)]  # not [1, 1] or [4, 1]: only x was cut for the first look


def test_clipping_of_histograms() -> None:
    uniform = np.zeros(2048, np.int64)
    uniform[:1000] = 1000
    uniform[2047] = 5  # 5 in a million far outside
    assert percentile_bin(uniform, 99.999) == 1000
    assert percentile_bin(uniform, 100.0) == 2048
    bell = (1e6 * np.exp(-0.5 * (np.arange(2048) / 100) ** 2)).astype(np.int64)
    bell[2047] = 5
    assert 200 < entropy_bin(bell) < 600
    empty = np.zeros(2048, np.int64)
    assert entropy_bin(empty) == percentile_bin(empty) == 2048


def _error(source: Path, target: Path, feed: dict[str, Array], runtime: str) -> float:
    graph = open_graph(target, runtime)  # type: ignore[arg-type]
    return float(relative_errors(OrtGraph(source).run(feed), graph.run(feed)).mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_close_graph(transformer: Path, tmp_path: Path, method: str) -> None:
    rows, held_out = (random_rows(Transformer(), 16, seed) for seed in (0, 1))
    target = tmp_path / "int8.onnx"
    quantize_graph(
        transformer,
        target,
        Calibration(rows, tmp_path / "table.json", method),  # type: ignore[arg-type]
    )
    assert lint_qdq(target) == []
    assert 1e-4 < _error(transformer, target, held_out.take(range(8)), "onnxruntime") < 0.06
    other = next(name for name in METHODS if name != method)
    with pytest.raises(ExportError, match="another graph or method"):
        quantize_graph(transformer, target, Calibration(rows, tmp_path / "table.json", other))


def test_the_symmetric_graph_equals_that_of_onnxruntimes_quantiser(
    convnet: Path, tmp_path: Path
) -> None:
    from onnxruntime import quantization as ort

    rows = random_rows(ConvNet(), 16, 0)
    writer = QdqWriter(convnet)
    groups = {k: v for k, v in writer.groups().items() if k in ("conv_in", "conv_out")}
    nodes = [name for names in groups.values() for name in names]
    keep = [group for group in writer.groups() if group not in groups]

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = rows.batches(8)

        def __len__(self) -> int:
            return 2

        def get_next(self) -> dict[str, Array] | None:
            return self.feeds.pop() if self.feeds else None

    theirs, ours = tmp_path / "theirs.onnx", tmp_path / "ours.onnx"
    ort.quantize_static(
        str(convnet), str(theirs), Reader(), quant_format=ort.QuantFormat.QDQ,
        per_channel=True, activation_type=ort.QuantType.QInt8, weight_type=ort.QuantType.QInt8,
        nodes_to_quantize=nodes,
        extra_options={
            "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    )  # fmt: skip
    quantize_graph(convnet, ours, Calibration(rows, tmp_path / "table.json"), keep_fp32=keep)
    feed = rows.take(range(8))
    first, second = OrtGraph(theirs).run(feed), OrtGraph(ours).run(feed)
    assert relative_errors(first, second).max() < 1e-5
    assert relative_errors(OrtGraph(convnet).run(feed), second).min() > 1e-3


def test_only_quantised_layers_read_rounded_tensors(convnet: Path, tmp_path: Path) -> None:
    rows = random_rows(ConvNet(), 8, 0)
    quantize_graph(convnet, tmp_path / "int8.onnx", Calibration(rows, tmp_path / "table.json"))
    model = onnx.load(str(tmp_path / "int8.onnx"))
    rounded = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    readers = {n.op_type for n in model.graph.node if set(n.input) & rounded}
    assert readers <= {"Conv", "Gemm", "MatMul"}
    assert sum(i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1
               for i in model.graph.initializer) == 0  # fmt: skip


@pytest.mark.parametrize("kind", ["transformer", "convnet"])
def test_every_quantised_layer_runs_in_int8(
    kind: str, transformer: Path, convnet: Path, tmp_path: Path
) -> None:
    source, network = (
        (transformer, Transformer()) if kind == "transformer" else (convnet, ConvNet())
    )
    rows = random_rows(network, 16, 0)
    feed, table = rows.take(range(8)), tmp_path / "table.json"
    quantize_graph(source, tmp_path / "sym.onnx", Calibration(rows, table), weight_range="reduced")
    write_ort_cpu(source, tmp_path / "ort.onnx", Calibration(rows, table))
    assert lint_ort_cpu(tmp_path / "ort.onnx") == []
    assert lint_ort_cpu(tmp_path / "sym.onnx") != []
    assert lint_qdq(tmp_path / "ort.onnx") != []
    assert _error(source, tmp_path / "ort.onnx", feed, "onnxruntime") < 0.05
    execution = onnxruntime_execution(tmp_path / "ort.onnx")
    assert unproven_layers(tmp_path / "ort.onnx", execution) == []
    writer = QdqWriter(source)
    layers = len(writer.nodes) - len(writer.products)
    assert execution["int8_layers"] == layers - (kind == "convnet")
    pytest.importorskip("openvino")
    graph = open_graph(tmp_path / "sym.onnx", "openvino")
    execution = openvino_execution(graph, feed)  # type: ignore[arg-type]
    assert unproven_layers(tmp_path / "sym.onnx", execution) == []
    assert execution["int8_layers"] >= layers
    assert execution["rest"] == "f32"
    float_run = openvino_execution(open_graph(source, "openvino"), feed)  # type: ignore[arg-type]
    assert float_run["int8_layers"] == 0
    assert _error(source, tmp_path / "sym.onnx", feed, "openvino") < 0.06


def test_the_second_graph_is_kept_only_where_it_pays(convnet: Path, tmp_path: Path) -> None:
    rows, held_out = (random_rows(ConvNet(), 8, seed) for seed in (0, 1))
    table = tmp_path / "table.json"
    variants = Variants(convnet, tmp_path, Calibration(rows, table), held_out=held_out)
    target = tmp_path / "ort.onnx"
    report = judge_ort_cpu(variants, target, Calibration(rows, table), rounds=3, error_bound=0.0)
    assert report["kept"] is None
    assert "is above 0" in report["why"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json"]
    assert set(report["kinds"]) == {"matmul", "conv", "conv+matmul"}
    rows_of = {
        "a": {"why": "", "speed": {"8": {"value": 1.2}}},
        "b": {"why": "", "speed": {"8": {"value": 1.4}}},
        "c": {"why": "too far off", "speed": {"8": {"value": 9.0}}},
    }
    assert choose_kind(rows_of, "8")[0] == "b"
    with pytest.raises(UsageError, match="unknown kind"):
        write_ort_cpu(convnet, target, Calibration(rows, table), kind="guess")


@pytest.fixture(scope="module")
def joint_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_joint_attention(tmp_path_factory.mktemp("joint") / "model.onnx")


def test_attentions_products_are_a_group_and_other_products_are_none(
    transformer: Path, joint_attention: Path
) -> None:
    groups = QdqWriter(transformer).groups()
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        assert len(groups[f"attention_products/{block}"]) == 2
    assert QdqWriter(joint_attention).groups()["attention_products"] == ["scores", "values"]
    assert "angles" not in QdqWriter(joint_attention).nodes


# OpenVINO's sums of 8-bit weights are exact with VNNI only, see test_saturation.py.
@pytest.mark.parametrize(
    ("runtime", "weight_range", "rounded"),
    [
        ("onnxruntime", "full",
         {"scaled_query", "scaled_keys_clipped", "attention", "joined_clipped"}),
        ("openvino", "reduced",
         {"scaled_query", "scaled_keys_64_clipped", "attention", "joined_64_clipped"}),
    ],
)  # fmt: skip
def test_products_of_what_was_joined_are_right_in_both_runtimes(
    joint_attention: Path, tmp_path: Path, runtime: str, weight_range: Any, rounded: set[str]
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    writer, feed = QdqWriter(joint_attention), joint_feed()
    ranges = measure_ranges(joint_attention, writer.calibrated_tensors(), [feed])
    target = tmp_path / "products.onnx"
    writer.write(target, ranges, list(writer.products), weight_range=weight_range)
    assert lint_qdq(target) == []
    assert 1e-4 < _error(joint_attention, target, feed, runtime) < 0.03
    nodes = onnx.load(str(target)).graph.node
    assert {n.input[0] for n in nodes if n.op_type == "QuantizeLinear"} == rounded


def test_a_product_with_one_rounded_operand_is_a_fault(
    joint_attention: Path, tmp_path: Path
) -> None:
    writer, feed = QdqWriter(joint_attention), joint_feed()
    ranges = measure_ranges(joint_attention, writer.calibrated_tensors(), [feed])
    target = tmp_path / "products.onnx"
    writer.write(target, ranges, ["scores"])
    assert lint_qdq(target) == []
    model = onnx.load(str(target))
    next(n for n in model.graph.node if n.name == "scores").input[1] = "scaled_keys"
    onnx.save(model, str(target))
    assert lint_qdq(target) == ["scores: only one of its operands is quantised",
                                "scores: the weights are not an int8 constant"]  # fmt: skip
    with pytest.raises(ExportError, match="no layer is left"):  # onnxruntime's graph has none
        writer.write(target, ranges, list(writer.products), scheme="ort-cpu")


@pytest.mark.parametrize("method", METHODS)
def test_of_attentions_weights_the_largest_is_the_range(joint_attention: Path, method: str) -> None:
    feed = joint_feed()
    seen: list[Array] = []
    visit_tensors(joint_attention, ["attention"], [feed], lambda _, array: seen.append(array))
    assert [array.shape for array in seen] == [()]
    bounds = measure_ranges(joint_attention, ["attention"], [feed], method)["attention"]  # type: ignore[arg-type]
    assert bounds == Range(0.0, float(seen[0]))
    assert 1 / 17 < bounds.high <= 1.0


@pytest.mark.parametrize(("axis", "sizes"), [(2, False), (-1, False), (2, True)])
def test_cut_columns_are_two_products_with_the_same_values(
    tmp_path: Path, axis: int, sizes: bool
) -> None:
    source = write_gated(tmp_path / "model.onnx", axis=axis, sizes=sizes)
    model = onnx.load(str(source))
    assert split_columns(model, source) == ["linear"]
    assert "Split" not in {node.op_type for node in model.graph.node}
    assert split_columns(model, source) == []
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(tmp_path / "cut.onnx"))
    feed = {"x": np.random.default_rng(1).standard_normal((3, 6, 8)).astype(np.float32)}
    expected = OrtGraph(source).run(feed)
    assert np.allclose(OrtGraph(tmp_path / "cut.onnx").run(feed), expected, atol=1e-5)
    writer = QdqWriter(source)
    assert {"linear_part0", "linear_part1"} <= set(writer.nodes)
    target = tmp_path / "int8.onnx"
    ranges = measure_ranges(source, writer.calibrated_tensors(), [feed])
    writer.write(target, ranges, list(writer.nodes))
    assert lint_qdq(target) == []
    assert 1e-4 < _error(source, target, feed, "onnxruntime") < 0.03


@pytest.mark.parametrize("what", [{"axis": 1}, {"read_twice": True}])
def test_other_cuts_stay(tmp_path: Path, what: dict[str, Any]) -> None:
    source = write_gated(tmp_path / "model.onnx", **what)
    model = onnx.load(str(source))
    before = model.SerializeToString(deterministic=True)
    assert split_columns(model, source) == []
    assert model.SerializeToString(deterministic=True) == before


def test_a_value_that_is_not_finite_is_refused(transformer: Path, tmp_path: Path) -> None:
    rows = random_rows(Transformer(), 8, 0)
    rows.feeds["hidden_states"][3, 0, 0] = np.nan
    with pytest.raises(ExportError, match="not finite on a calibration row"):
        quantize_graph(transformer, tmp_path / "q.onnx", Calibration(rows, tmp_path / "table.json"))
    model = onnx.load(str(transformer))
    weight = next(i for i in model.graph.initializer if len(i.dims) == 2)
    broken = np.full(list(weight.dims), np.inf, np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(broken, weight.name))
    onnx.save(model, str(tmp_path / "broken.onnx"))
    writer = QdqWriter(tmp_path / "broken.onnx")
    ranges = dict.fromkeys(writer.calibrated_tensors(), Range(-1.0, 1.0))
    with pytest.raises(ExportError, match=r"weights of .* are not finite"):
        writer.write(tmp_path / "q.onnx", ranges, list(writer.nodes))
    with pytest.raises(ExportError, match="no layer is left"):
        writer.write(tmp_path / "q.onnx", ranges, [])
