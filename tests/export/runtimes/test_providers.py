"""onnxruntime's providers: what is taken, what is refused, and torch's memory bound to a graph."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from modelops.base.errors import ExportError, MissingExtraError, UsageError
from modelops.export.graphs.axes import read_axes
from modelops.export.runtimes.onnxruntime import OrtGraph, tensorrt_options
from modelops.export.tensorrt.profiles import parse_profiles


def save_graph(path: Path, kind: int = TensorProto.FLOAT) -> Path:
    """sample [batch, 3, height, width] and timestep [batch] to a sum, and to one twice as high."""
    rows = ["batch", 3, "height", "width"]
    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["t"]),
        helper.make_node("Mul", ["sample", "t"], ["scaled"]),
        helper.make_node("Sqrt", ["scaled"], ["first"]),
        helper.make_node("Concat", ["sample", "scaled"], ["second"], axis=2),
    ]
    graph = helper.make_graph(
        nodes, "graph",
        [
            helper.make_tensor_value_info("sample", kind, rows),
            helper.make_tensor_value_info("timestep", kind, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("first", kind, rows),
            helper.make_tensor_value_info("second", kind, ["batch", 3, "twice_height", "width"]),
        ],
        [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def graph_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_graph(tmp_path_factory.mktemp("graphs") / "model.onnx")


def feed_of(rows: int, height: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "sample": torch.rand(rows, 3, height, 5, generator=generator).to(dtype),
        "timestep": torch.rand(rows, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bound_memory_gives_the_same_bits_as_arrays(tmp_path: Path, dtype: torch.dtype) -> None:
    kind = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    graph = OrtGraph(save_graph(tmp_path / "model.onnx", kind), threads=1, provider="cpu")
    for rows, height in ((1, 6), (4, 2), (1, 6), (3, 9)):  # seen and new shapes take turns
        feed = feed_of(rows, height, dtype)
        expected = graph.run_all({name: value.numpy() for name, value in feed.items()})
        outputs = graph.run_device(feed)
        assert [tuple(o.shape) for o in outputs] == [(rows, 3, height, 5), (rows, 3, 2 * height, 5)]
        for output, array in zip(outputs, expected, strict=True):
            assert output.dtype == dtype
            assert torch.equal(output, torch.from_numpy(array))


def test_a_result_outlives_the_next_call(graph_path: Path) -> None:
    graph = OrtGraph(graph_path, threads=1)
    first, second = feed_of(2), {name: value + 1 for name, value in feed_of(2).items()}
    kept = graph.run_device(first)[0]
    copy = kept.clone()
    graph.run_device(second)
    assert torch.equal(kept, copy)
    torch.testing.assert_close(
        copy, (first["sample"] * first["timestep"][:, None, None, None]).sqrt()
    )


def test_a_view_that_is_not_contiguous_is_read_as_what_it_shows(graph_path: Path) -> None:
    graph = OrtGraph(graph_path, threads=1)
    feed = feed_of(2)
    turned = feed | {"sample": feed["sample"].permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)}
    assert not turned["sample"].is_contiguous()
    for one, other in zip(graph.run_device(feed), graph.run_device(turned), strict=True):
        assert torch.equal(one, other)


def test_the_graphs_of_an_artifact_give_the_same_bits(onnx_artifact: Path) -> None:
    generator = np.random.default_rng(0)
    sizes = {"batch": 2, "height": 16, "width": 16}
    for path in sorted(onnx_artifact.rglob("model.onnx")):
        graph = OrtGraph(path, threads=1)
        feed = {}
        for item in graph.session.get_inputs():
            shape = [dim if isinstance(dim, int) else sizes.get(dim, 4) for dim in item.shape]
            whole = "int" in item.type
            feed[item.name] = (
                generator.integers(0, 2, shape, dtype=np.int64)
                if whole
                else generator.standard_normal(shape, dtype=np.float32)
            )
        expected = graph.run_all(feed)
        outputs = graph.run_device({name: torch.from_numpy(v) for name, v in feed.items()})
        for output, array in zip(outputs, expected, strict=True):
            assert np.array_equal(output.numpy(), array)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": None}, "needs the inputs sample, timestep"),
        ({"more": torch.zeros(1)}, "needs the inputs sample, timestep"),
        ({"timestep": torch.zeros(2, dtype=torch.float64)}, "is torch.float64, not torch.float32"),
        ({"timestep": torch.zeros(2, 1)}, r"has 1 axes, not the shape \(2, 1\)"),
        ({"sample": torch.zeros(2, 4, 6, 5)}, "cannot run the graph"),
        ({"sample": torch.zeros(2, 3, 6, 5, device="meta")}, "is on meta, not on cpu"),
    ],
)
def test_bad_tensors_are_refused(graph_path: Path, change: dict[str, Any], words: str) -> None:
    feed = {name: value for name, value in (feed_of(2) | change).items() if value is not None}
    with pytest.raises(ExportError, match=words):
        OrtGraph(graph_path, threads=1).run_device(feed)


def test_no_provider_is_named_that_is_not_there(graph_path: Path) -> None:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for name, full in (("cuda", "CUDA"), ("tensorrt", "Tensorrt")):
        if f"{full}ExecutionProvider" in available:
            continue
        with pytest.raises(MissingExtraError, match=f"no {name} provider") as caught:
            OrtGraph(graph_path, provider=name)
        assert caught.value.hint == "pip install --force-reinstall --no-deps onnxruntime-gpu"


def test_a_provider_that_does_not_load_is_no_silent_fallback(
    graph_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu without its libraries lists CUDA, warns, and then runs on the CPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA may really be here")
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        assert OrtGraph(graph_path).device == "cpu"
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(ExportError, match="cuda was asked for and onnxruntime fell back to CPU"),
    ):
        OrtGraph(graph_path, provider="cuda")


@pytest.mark.parametrize(
    "options",
    [
        {"provider": "rocm"},
        {"device_id": -1},
        {"provider": "cpu", "cache_dir": Path()},
        {"cache_dir": Path()},
    ],
)
def test_wrong_options_are_a_usage_error(graph_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OrtGraph(graph_path, **options)


def test_what_the_tensorrt_provider_is_told(graph_path: Path, tmp_path: Path) -> None:
    profiles = parse_profiles(
        read_axes(graph_path), ["batch=1:2:4,height=8:8:16,width=5", "batch=8,height=8,width=5"]
    )
    assert tensorrt_options(graph_path, tmp_path, profiles) == {
        "trt_fp16_enable": "False",
        "trt_int8_enable": "False",
        "trt_engine_cache_enable": "True",
        "trt_timing_cache_enable": "True",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_path": str(tmp_path),
        "trt_profile_min_shapes": "sample:1x3x8x5,timestep:1,sample:8x3x8x5,timestep:8",
        "trt_profile_opt_shapes": "sample:2x3x8x5,timestep:2,sample:8x3x8x5,timestep:8",
        "trt_profile_max_shapes": "sample:4x3x16x5,timestep:4,sample:8x3x8x5,timestep:8",
    }
    assert tensorrt_options(graph_path)["trt_engine_cache_enable"] == "False"


def test_int8_is_on_for_int8_graphs(int8_artifact: Path) -> None:
    told = {tensorrt_options(p)["trt_int8_enable"] for p in int8_artifact.rglob("model.onnx")}
    assert "True" in told


def bench_gpu() -> Any:
    path = Path(__file__).parents[3] / "bench" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_gpu_bench_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main = bench_gpu().main
    assert main([]) == 0
    assert main(["--require", "gpu"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines
        == ["bench/gpu: no NVIDIA GPU here (or a torch without CUDA): nothing was measured"] * 2
    )
    for wrong in (["--rounds", "0"], ["--int8", "model.onnx"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


@pytest.mark.slow
def test_the_gpu_bench_tried_out_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--network", "tiny", "--no-compile", "--rounds", "1"]
    assert bench_gpu().main([*options, "--batches", "1", "3", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["results"]) == {"1", "3"}
    assert record["skipped"] == {}
    for rows in record["results"].values():
        assert rows["onnxruntime cpu fp32"]["relative_error"] < 1e-5
        assert 0 < rows["onnxruntime cpu int8"]["relative_error"] < 0.5
    assert record["artifacts"]["onnx"]["runtime"] == "onnxruntime-cpu"
    assert all(check["passed"] for check in record["artifacts"]["onnx"]["parity"])


def test_what_fails_in_the_gpu_bench_is_left_out_and_named() -> None:
    bench = bench_gpu()

    def eager(feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [feed["x"] * 2.0]

    def no_compiler(feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("\n  Failed to find C compiler\nand a page of report")

    def far_off(feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [feed["x"] * 2.1]

    runs = {
        "torch eager fp32": eager, "torch.compile fp32": no_compiler, "TensorRT fp16": far_off,
        "TensorRT int8": far_off,
    }  # fmt: skip
    skipped: dict[str, str] = {}
    options = bench.parse(["--device", "cpu", "--rounds", "1"])
    results, failures = bench.time_runs(runs, {2: {"x": torch.ones(2, 3)}}, options, skipped)
    assert set(results["2"]) == {"torch eager fp32", "TensorRT fp16", "TensorRT int8"}
    assert skipped == {"torch.compile fp32 from batch 2 on": "Failed to find C compiler"}
    assert len(failures) == 1  # INT8's error is reported, and judged where it is calibrated
    assert failures[0].startswith("TensorRT fp16, batch 2")
