"""TensorRT as far as it goes without its libraries: profiles, fingerprints, checks, its own types.

Nothing here builds or runs an engine; bench/gpu.sh does, where there is a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import modelops.export.tensorrt as package
from modelops.base.errors import ExportError, IntegrityError, MissingExtraError, UsageError
from modelops.base.files import sha256_bytes, write_json
from modelops.export.graphs.axes import GraphAxes, read_axes
from modelops.export.graphs.inspection import is_int8_graph, layer_precisions
from modelops.export.tensorrt.build import (
    build_engine,
    cache_path,
    check_build,
    ensure_engine,
    parser_error_line,
)
from modelops.export.tensorrt.fingerprint import (
    EngineFingerprint,
    EngineFlags,
    EngineMachine,
    fingerprint_differences,
    fingerprint_path,
    graph_digests,
    read_fingerprint,
    read_verified_plan,
)
from modelops.export.tensorrt.library import has_tensorrt, require_tensorrt, version_numbers
from modelops.export.tensorrt.profiles import (
    OptimizationProfile,
    choose_profile,
    limits_of_shapes,
    make_profile,
    parse_limits,
    parse_profiles,
)

AXES = GraphAxes(
    inputs={"sample": ("batch", 4, "height", "width"), "timestep": ("batch",), "scale": (1,)},
    outputs={},
    multiples={"height": 2},
)
MACHINE = EngineMachine(
    tensorrt="10.13.0.35", cuda="13.0", driver="580.159.03", compute_capability="9.0",
    gpu="NVIDIA H200", platform="Linux x86_64",
)  # fmt: skip


def test_a_profile_covers_every_input() -> None:
    (profile,) = parse_profiles(AXES, ["batch=1:2:8, height=16:32:64,width=32"])
    sample = profile.inputs["sample"]
    assert sample.minimum == (1, 4, 16, 32)
    assert sample.optimum == (2, 4, 32, 32)
    assert sample.maximum == (8, 4, 64, 32)
    assert profile.inputs["timestep"].maximum == (8,)
    assert profile.inputs["scale"].minimum == profile.inputs["scale"].maximum == (1,)
    again = OptimizationProfile.model_validate_json(profile.model_dump_json())
    assert again == profile


def test_one_input_may_have_limits_of_its_own() -> None:
    limits = parse_limits("batch=1:2:8,timestep.batch=1,height=16,width=16")
    profile = make_profile(AXES, limits)
    assert profile.inputs["timestep"].maximum == (1,)
    assert profile.inputs["sample"].maximum[0] == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty profile"),
        ("batch", "is no axis of a profile"),
        ("batch=1:8", "is no axis of a profile"),
        ("batch=8:4:1,height=16,width=16", "MIN <= OPT <= MAX"),
        ("batch=0:1:2,height=16,width=16", "MIN <= OPT <= MAX"),
        ("batch=1,batch=2", "batch is there twice"),
        ("batch=1:2:4", "says nothing of the dynamic axes height, width"),
        ("batch=1,height=16,width=16,tokens=77", "has no dynamic axis tokens"),
        ("batch=1,height=15,width=16", "takes multiples of 2"),
        ("batch=1:1:9999,height=9998,width=9999", "more than TensorRT's"),
    ],
)
def test_bad_profiles_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_profiles(AXES, [text])
    assert "\n" not in str(caught.value)


def test_a_graph_without_dynamic_axes_needs_no_profile() -> None:
    fixed = GraphAxes(inputs={"x": (2, 3)}, outputs={})
    (profile,) = parse_profiles(fixed, [])
    assert profile.inputs["x"].minimum == profile.inputs["x"].maximum == (2, 3)
    with pytest.raises(UsageError, match="says nothing of the dynamic axes"):
        parse_profiles(AXES, [])
    with pytest.raises(ExportError, match="no name"):
        make_profile(GraphAxes(inputs={"x": ("", 3)}, outputs={}), {})


@given(
    limits=st.tuples(*[st.lists(st.integers(1, 40), min_size=3, max_size=3).map(sorted)] * 3),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
)
def test_a_shape_fits_exactly_if_every_axis_is_within_its_limits(
    limits: tuple[list[int], ...], sizes: tuple[int, int, int]
) -> None:
    axes = GraphAxes(inputs={"x": ("a", "b", 7, "c")}, outputs={})
    profile = make_profile(
        axes, {name: (v[0], v[1], v[2]) for name, v in zip("abc", limits, strict=True)}
    )
    shape = (sizes[0], sizes[1], 7, sizes[2])
    within = all(v[0] <= size <= v[2] for v, size in zip(limits, sizes, strict=True))
    assert profile.holds({"x": shape}) == within


def test_the_profile_with_the_nearest_usual_shape_is_taken() -> None:
    profiles = parse_profiles(
        AXES, ["batch=1:8:16,height=16,width=16", "batch=1:1:4,height=16,width=16"]
    )

    def shapes(batch: int) -> dict[str, tuple[int, ...]]:
        return {"sample": (batch, 4, 16, 16), "timestep": (batch,), "scale": (1,)}

    assert [choose_profile(profiles, shapes(batch)) for batch in (1, 2, 4, 16)] == [1, 1, 0, 0]
    with pytest.raises(ExportError, match=r"e: input sample is 32x4x16x16.*1x4x16x16 to 16x4x16x1"):
        choose_profile(profiles, shapes(32), path="e")
    with pytest.raises(ExportError, match="needs the inputs sample, scale, timestep, not sample"):
        choose_profile(profiles, {"sample": (1, 4, 16, 16)})
    with pytest.raises(ExportError, match="has 1 axes"):
        choose_profile(profiles, shapes(1) | {"timestep": (1, 1)})


def test_limits_from_an_example() -> None:
    shapes = {"sample": (2, 4, 16, 32), "timestep": (2,), "scale": (1,)}
    limits = limits_of_shapes(AXES, shapes)
    assert limits == {
        "sample.batch": (2, 2, 2), "sample.height": (16, 16, 16), "sample.width": (32, 32, 32),
        "timestep.batch": (2, 2, 2),
    }  # fmt: skip
    assert make_profile(AXES, limits).holds(shapes)
    # Two inputs may call an axis alike and have other sizes along it.
    other = limits_of_shapes(AXES, shapes | {"timestep": (3,)})
    assert (other["sample.batch"], other["timestep.batch"]) == ((2, 2, 2), (3, 3, 3))
    with pytest.raises(UsageError, match="input sample has the axes"):
        limits_of_shapes(AXES, {**shapes, "sample": (2, 4)})


# ------------------------------------------------------------------------------- fingerprints


def save_graph(folder: Path, *, external: bool = False, axis: str | int = "batch") -> Path:
    """A graph x [batch, 4] -> x + w, its weight w perhaps in model.onnx.data."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [axis, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [axis, 4])],
        [helper.make_tensor("w", TensorProto.FLOAT, [4], b"\0" * 16, raw=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save(
        model, str(path), save_as_external_data=external, location="model.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    return path


def save_engine(folder: Path, graph: Path, **changes: Any) -> Path:
    """What a build would leave: any bytes, with a fingerprint that is true of them."""
    plan = folder / "engine.plan"
    plan.write_bytes(b"not a program")
    digest, weights = graph_digests(graph)
    values: dict[str, Any] = {
        "onnx_sha256": digest,
        "weights_sha256": weights,
        "plan_sha256": sha256_bytes(b"not a program"),
        "machine": MACHINE,
        "profiles": parse_profiles(read_axes(graph), ["batch=1:2:4"]),
        "flags": EngineFlags(),
    }
    EngineFingerprint(**(values | changes)).write(fingerprint_path(plan))
    return plan


def test_an_engine_of_this_machine_and_graph_is_read(tmp_path: Path) -> None:
    graph = save_graph(tmp_path)
    plan = save_engine(tmp_path, graph)
    profiles = parse_profiles(read_axes(graph), ["batch=1:2:4"])
    data, built = read_verified_plan(
        plan, MACHINE, onnx_path=graph, profiles=profiles, flags=EngineFlags()
    )
    assert data == b"not a program"
    assert built.profiles == profiles
    assert read_verified_plan(plan, MACHINE)[0] == data


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("gpu", "NVIDIA A10", "the GPU is NVIDIA H200 there and NVIDIA A10 here"),
        ("compute_capability", "8.6", "its compute capability is 9.0 there and 8.6 here"),
        ("driver", "595.10", "the driver is 580.159.03 there and 595.10 here"),
        ("cuda", "12.8", "CUDA is 13.0 there and 12.8 here"),
        ("tensorrt", "11.4.0.106", "TensorRT is 10.13.0.35 there and 11.4.0.106 here"),
        ("platform", "Linux aarch64", "the platform is Linux x86_64 there and Linux aarch64 here"),
    ],
)
def test_an_engine_from_another_machine_is_refused(
    tmp_path: Path, field: str, value: str, words: str
) -> None:
    plan = save_engine(tmp_path, save_graph(tmp_path))
    here = MACHINE.model_copy(update={field: value})
    with pytest.raises(ExportError, match=re.escape(words)) as caught:
        read_verified_plan(plan, here)
    assert "--rebuild" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_version_compatible_engine_runs_in_a_newer_tensorrt_only(tmp_path: Path) -> None:
    graph = save_graph(tmp_path)
    plan = save_engine(tmp_path, graph, flags=EngineFlags(version_compatible=True))
    newer, older = (MACHINE.model_copy(update={"tensorrt": v}) for v in ("10.14.1", "10.9.0"))
    assert read_verified_plan(plan, newer)
    with pytest.raises(ExportError, match=r"TensorRT is 10\.13"):
        read_verified_plan(plan, older)


def test_another_graph_profile_or_flag_is_named(tmp_path: Path) -> None:
    graph = save_graph(tmp_path)
    built = read_fingerprint(save_engine(tmp_path, graph))
    assert fingerprint_differences(built, MACHINE, onnx_path=graph, flags=built.flags) == []
    other = parse_profiles(read_axes(graph), ["batch=1:2:8"])
    flags = EngineFlags(refit=True, optimization_level=5)
    with graph.open("ab") as handle:
        handle.write(b"\x72\x00")  # an empty metadata entry: the same graph in other bytes
    found = fingerprint_differences(built, MACHINE, onnx_path=graph, profiles=other, flags=flags)
    assert found[0].startswith("the graph was ")
    assert found[1:] == [
        "other optimization profiles were asked for",
        "optimization_level was 3 and 5 is asked for",
        "refit was False and True is asked for",
    ]


def test_weights_beside_the_graph_count(tmp_path: Path) -> None:
    graph = save_graph(tmp_path, external=True)
    plan = save_engine(tmp_path, graph)
    assert read_verified_plan(plan, MACHINE, onnx_path=graph)
    data = graph.with_name("model.onnx.data")
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    with pytest.raises(ExportError, match=r"other weights in model\.onnx\.data"):
        read_verified_plan(plan, MACHINE, onnx_path=graph)


def test_an_engine_that_differs_by_one_bit_is_never_read(tmp_path: Path) -> None:
    plan = save_engine(tmp_path, save_graph(tmp_path))
    plan.write_bytes(b"not a prograM")
    with pytest.raises(IntegrityError, match="differs from its digest"):
        read_verified_plan(plan, MACHINE)


def test_an_unfinished_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such engine"):
        read_fingerprint(tmp_path / "engine.plan")
    plan = save_engine(tmp_path, save_graph(tmp_path))
    fingerprint_path(plan).unlink()
    with pytest.raises(UsageError, match=r"no engine\.json beside it"):
        read_fingerprint(plan)
    write_json(fingerprint_path(plan), {"onnx_sha256": "0"})
    with pytest.raises(IntegrityError, match="not an engine's fingerprint: plan_sha256"):
        read_fingerprint(plan)


def test_a_fingerprint_of_the_future_is_refused(tmp_path: Path) -> None:
    plan = save_engine(tmp_path, save_graph(tmp_path), schema_version=99)
    with pytest.raises(IntegrityError, match="schema_version 99 is newer"):
        read_fingerprint(plan)


# -------------------------------------------------------------------------------------- building


def test_what_is_wrong_before_tensorrt_is_asked(tmp_path: Path) -> None:
    graph = save_graph(tmp_path)
    profiles = parse_profiles(read_axes(graph), ["batch=1:2:4"])
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    other = save_graph(fixed, axis=3)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\x07\x07")
    flags, plan = EngineFlags(), tmp_path / "engine.plan"
    check_build(graph, plan, profiles, flags)
    for arguments, error, words in (
        ((graph, tmp_path / "engine.trt", profiles, flags), UsageError, "ends in .plan"),
        ((graph, plan, [], flags), UsageError, "no optimization profile"),
        ((tmp_path / "no.onnx", plan, profiles, flags), UsageError, "no such graph"),
        ((damaged, plan, profiles, flags), ExportError, "not an ONNX graph"),
        ((other, plan, profiles, flags), UsageError, "profile 0 gives x"),
        ((graph, plan, profiles, EngineFlags(optimization_level=6)), UsageError, "0 to 5"),
        ((graph, plan, profiles, EngineFlags(workspace_bytes=5)), UsageError, "below 1 MiB"),
    ):
        with pytest.raises(error, match=words):
            check_build(*arguments)
    nameless = OptimizationProfile(inputs={"z": profiles[0].inputs["x"]})
    with pytest.raises(UsageError, match="profile 0 has the inputs z, the graph x"):
        check_build(graph, plan, [nameless], flags)


@pytest.mark.skipif(has_tensorrt(), reason="TensorRT is installed")
def test_without_tensorrt_the_pip_command_is_named(tmp_path: Path) -> None:
    graph = save_graph(tmp_path)
    profiles = parse_profiles(read_axes(graph), ["batch=1:2:4"])
    plan = save_engine(tmp_path, graph)
    from modelops.export.runtimes.tensorrt import TensorRtGraph

    for call in (
        require_tensorrt,
        lambda: build_engine(graph, tmp_path / "new.plan", profiles),
        lambda: ensure_engine(graph, plan, profiles),
        lambda: TensorRtGraph(plan),
    ):
        with pytest.raises(MissingExtraError, match="not installed") as caught:
            call()
        assert caught.value.hint == 'pip install "modelops[gpu]"'
    assert not (tmp_path / "new.plan").exists()


def test_timings_are_kept_apart_by_machine(tmp_path: Path) -> None:
    other = MACHINE.model_copy(update={"driver": "595.10"})
    assert cache_path(tmp_path, MACHINE) == cache_path(tmp_path, MACHINE)
    assert cache_path(tmp_path, MACHINE) != cache_path(tmp_path, other)


class ParserError:
    """What TensorRT's parser reports; it cannot be made without TensorRT."""

    def __init__(self, name: str, operator: str, reason: str) -> None:
        self.desc = lambda: reason
        self.node_name = lambda: name
        self.node_operator = lambda: operator


def test_one_line_for_an_error_of_the_parser() -> None:
    found = parser_error_line(ParserError("node_3", "NonZero", "no importer\n  for it"))
    assert found == "node_3 (NonZero): no importer for it"
    assert parser_error_line(ParserError("", "", "bad file")) == "the graph: bad file"


# ------------------------------------------------------------------------------------ inspection


def layer(kind: str, **entries: Any) -> dict[str, Any]:
    return {"Name": "l", "LayerType": kind, **entries}


INT8_IN = [{"Name": "x", "Format/Datatype": "Int8 NC/32HW32"}]
INT8_IN_11 = [{"Name": "x", "Format": "kLINEAR", "DataType": "Int8"}]  # TensorRT 11's two fields
FLOAT_IN = [{"Name": "x", "Format/Datatype": "Row major linear FP32"}]


@pytest.mark.parametrize(
    ("entry", "counted"),
    [
        (layer("CaskConvolution", Inputs=INT8_IN, Weights={"Type": "Int8", "Count": 9}), "int8"),
        (layer("CaskConvolution", Inputs=INT8_IN, Weights={"Type": "Float"}), "float"),
        (layer("CaskConvolution", Inputs=FLOAT_IN, Weights={"Type": "Half"}), "float"),
        (layer("gemm", Inputs=INT8_IN, TacticName="sm80_xmma_gemm_i8i8_i8i32_f32_tn"), "int8"),
        (layer("gemm", Inputs=INT8_IN, TacticName="sm80_xmma_gemm_f16f16_f16f32_f32"), "float"),
        (layer("gemm", TacticName="sm80_xmma_gemm_interleaved_i8f32_i8i32_f32_n"), "int8"),
        (layer("kgen", Inputs=INT8_IN, TacticName="__myl_MulAdd"), None),
        (layer("Reformat", Inputs=FLOAT_IN, Outputs=INT8_IN), None),
        (layer("PointWiseV2", Inputs=INT8_IN), None),
        (layer("MatrixMultiply", Inputs=INT8_IN), "int8"),
        (layer("MatrixMultiply", Inputs=INT8_IN_11), "int8"),
        (layer("MatrixMultiply", Inputs=[{**INT8_IN_11[0], "DataType": "Float"}]), "float"),
    ],
)
def test_only_products_in_integers_count_as_int8(entry: dict[str, Any], counted: str) -> None:
    found = layer_precisions({"Layers": [entry, "a layer as text"], "Bindings": []})
    expected = {f"{entry['LayerType']} {counted}": 1} if counted else {}
    assert found["layers"] == expected
    assert found["int8_layers"] == (counted == "int8")
    assert found["layers_total"] == len(expected)


def test_int8_graphs_are_told_apart(int8_artifact: Path, onnx_artifact: Path) -> None:
    assert any(is_int8_graph(path) for path in int8_artifact.rglob("model.onnx"))
    assert not any(is_int8_graph(path) for path in onnx_artifact.rglob("model.onnx"))


@pytest.mark.parametrize("artifact", ["onnx_artifact", "int8_artifact"])
def test_trtcheck_finds_no_blocker(artifact: str, request: pytest.FixtureRequest) -> None:
    """trtcheck's matrix ends at TensorRT 10.3; its warnings on INT64 are of TensorRT before 10."""
    trtcheck = pytest.importorskip("trtcheck")
    paths = sorted(request.getfixturevalue(artifact).rglob("model.onnx"))
    assert len(paths) >= 2
    for path in paths:
        report = trtcheck.analyze(path, config=trtcheck.AnalyzerConfig(target_trt="10.3"))
        assert [i for i in report.issues if i.severity == trtcheck.Severity.CRITICAL] == []
        # Operators that its matrix leaves out; onnx-tensorrt's own list has all four.
        unknown = {i.operator for i in report.issues if i.rule_id == "TRT-OP-UNCLASSIFIED"}
        assert unknown <= {"Cos", "Sin", "Max", "IsNaN"}, path


# ----------------------------------------------------------------------------- TensorRT's own API


def sources() -> list[Path]:
    own = sorted(Path(str(package.__file__)).parent.glob("*.py"))
    return [*own, Path(str(package.__file__)).parents[1] / "runtimes" / "tensorrt.py"]


REMOVED_IN_11 = {
    "EXPLICIT_BATCH", "FP16", "FP8", "OBEY_PRECISION_CONSTRAINTS", "STRICT_TYPES",
    "PREFER_PRECISION_CONSTRAINTS", "int8_calibrator", "set_calibration_profile",
    "execute_async_v2", "enqueue_v2", "max_batch_size", "max_workspace_size", "build_engine",
    "build_cuda_engine", "get_binding_shape", "set_binding_shape", "num_bindings",
    "platform_has_fast_fp16", "platform_has_fast_int8", "device_memory_size", "dynamic_range",
    "create_execution_context_without_device_memory", "set_output_type",
}  # fmt: skip


def test_nothing_that_tensorrt_11_removed_is_used() -> None:
    used = {
        node.attr
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert {"execute_async_v3", "build_serialized_network", "parse_from_file"} <= used
    assert used & REMOVED_IN_11 == set()


def test_the_default_path_imports_no_tensorrt() -> None:
    code = (
        "import sys, modelops.export.runtimes.onnxruntime, modelops.export.runtimes.tensorrt, "
        "modelops.export.tensorrt.build; "
        "assert not {'tensorrt', 'torch', 'onnxruntime', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def stub_path() -> Path | None:
    found = importlib.util.find_spec("tensorrt_bindings")
    places = [Path(p) / "tensorrt.pyi" for p in (found and found.submodule_search_locations) or []]
    return next((path for path in places if path.is_file()), None)


@pytest.mark.skipif(stub_path() is None, reason="needs tensorrt-stubs")
def test_the_calls_agree_with_tensorrts_types(tmp_path: Path) -> None:
    """mypy against tensorrt-stubs, which are not valid Python in five lines as published."""
    pytest.importorskip("mypy")
    stub = stub_path()
    assert stub is not None
    text = stub.read_text()
    text = re.sub(r"\bin: list\[", "in_: list[", text)
    text = re.sub(r"channel_axis: int\) -> IScaleLayer", "channel_axis: int = 0) -> IScale", text)
    for name, content in (("tensorrt_bindings/tensorrt", text), ("tensorrt_bindings/__init__", "")):
        target = tmp_path / f"{name}.pyi"
        target.parent.mkdir(exist_ok=True)
        target.write_text(content)
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").write_text(
        "from tensorrt_bindings.tensorrt import *\n__version__: str\n"
    )
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nfollow_imports = skip\ndisallow_untyped_defs = True\n"
        f"mypy_path = {tmp_path}\ncache_dir = {tmp_path / 'cache'}\n"
        "[mypy-tensorrt.*,tensorrt_bindings.*]\nfollow_imports = normal\nignore_errors = True\n"
    )
    files = [str(path) for path in sources() if path.name in ("build.py", "engine.py")]
    probe = tmp_path / "probe.py"  # that the types are seen at all
    probe.write_text("import tensorrt as trt\nwrong: int = trt.Builder\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), *files, str(probe)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert "probe.py:2" in errors[0]
    assert "Builder" in errors[0]


def test_versions_are_compared_as_numbers() -> None:
    assert version_numbers("10.13.0.35") == (10, 13, 0, 35)
    assert version_numbers("10.9") < version_numbers("10.13")
    assert version_numbers("11.0.0rc1") == (11, 0)
    assert version_numbers("") == ()
