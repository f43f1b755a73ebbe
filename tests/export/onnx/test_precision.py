"""Mixed 16-bit graphs: what is converted, what is kept, and that the images survive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from modelops.base.errors import ExportError, UsageError
from modelops.export.graphs.axes import read_axes
from modelops.export.graphs.external import data_path, load_graph
from modelops.export.graphs.graph import Array
from modelops.export.onnx.overflow import float_format, measure_ranges, weight_fault
from modelops.export.onnx.precision import convert_precision
from modelops.export.onnx.writer import write_graph
from modelops.export.pictures import check_pictures
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.precision import (
    graph_precision,
    require_supported,
    supported_precisions,
)

IMAGE = {0: "batch", 2: "height", 3: "width"}


class _Decoder(torch.nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.vae.decode(latents, return_dict=False)[0]
        return decoded


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE decoder whose first resnet reaches some 200,000 between its two convolutions, where a
    norm follows, so that its images are those of any other VAE."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        layers_per_block=1,
    ).eval()  # fmt: skip
    with torch.no_grad():
        convolution = vae.decoder.mid_block.resnets[0].conv1
        convolution.weight *= 1e5
        convolution.bias *= 1e5
    path = tmp_path_factory.mktemp("vae") / "vae_decoder" / "model.onnx"
    write_graph(
        _Decoder(vae), {"latents": (torch.randn(2, 4, 8, 8), dict(IMAGE))}, path, opset=20,
        outputs={"image": dict(IMAGE)},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def latents() -> list[dict[str, Array]]:
    generator = np.random.default_rng(0)
    return [{"latents": generator.standard_normal((2, 4, 8, 8), np.float32)} for _ in range(2)]


def _pictures(decoded: Array) -> list[Array]:
    levels = np.nan_to_num(np.clip(decoded / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    return list(levels.transpose(0, 2, 3, 1))


def test_a_vae_that_overflows_in_float16_keeps_its_pictures(
    decoder: Path, latents: list[dict[str, Array]], tmp_path: Path
) -> None:
    expected = OrtGraph(decoder).run(latents[0])
    assert np.isfinite(expected).all()

    naive = tmp_path / "naive" / "model.onnx"
    report = convert_precision(decoder, naive, "float16")
    assert (report.runs, report.largest, report.kept) == (0, None, {})
    broken = OrtGraph(naive).run(latents[0])
    assert not np.isfinite(broken).all()
    faults = check_pictures(_pictures(broken), _pictures(expected))
    assert faults == [f"image {i} is all black, its source's is not" for i in range(2)]

    mixed = tmp_path / "mixed" / "model.onnx"
    report = convert_precision(decoder, mixed, "float16", feeds=latents)
    assert report.runs == 2
    assert report.largest is not None
    assert report.largest > 65504
    assert any("makes values up to" in reason for reason in report.kept.values())
    assert len(report.kept) < report.low_nodes / 5
    fixed = OrtGraph(mixed).run(latents[0])
    assert fixed.dtype == np.float32
    assert np.abs(fixed - expected).max() < 0.01 * np.abs(expected).max()
    assert check_pictures(_pictures(fixed), _pictures(expected)) == []
    assert report.bytes_after < 0.65 * report.bytes_before  # a kept layer and the norms

    # bfloat16 has float32's range: nothing to keep, and half of the bytes
    other = convert_precision(decoder, tmp_path / "bf16" / "model.onnx", "bfloat16", feeds=latents)
    assert other.kept == {}
    assert other.bytes_after < 0.52 * other.bytes_before


def test_ranges_are_those_of_the_network(
    decoder: Path, latents: list[dict[str, Array]], tmp_path: Path
) -> None:
    model = load_graph(decoder)
    names = [n.output[0] for n in model.graph.node if n.op_type == "Conv"]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    onnx.save(model, str(tmp_path / "all.onnx"))
    whole = OrtGraph(tmp_path / "all.onnx")
    runs = [dict(zip(whole.output_names, whole.run_all(f), strict=True)) for f in latents]
    expected = {name: max(float(np.abs(run[name]).max()) for run in runs) for name in names}
    assert measure_ranges(decoder, names, iter(latents)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ExportError, match="no inputs to measure"):
        measure_ranges(decoder, names, [])
    with pytest.raises(ExportError, match="cannot be measured"):
        measure_ranges(decoder, names, [{"latents": np.zeros((1, 3, 8, 8), np.float32)}])


def _kinds(path: Path) -> dict[str, int]:
    """Element type of every value of a checked graph."""
    model = onnx.shape_inference.infer_shapes(load_graph(path), strict_mode=True)
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return kinds | {item.name: item.data_type for item in model.graph.initializer}


class _Denoiser(torch.nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> Any:
        return self.unet(sample, timestep, text, return_dict=False)[0]


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
        cross_attention_dim=24, attention_head_dim=8,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("unet") / "denoiser" / "model.onnx"
    example = {
        "sample": (torch.randn(2, 4, 8, 8), dict(IMAGE)),
        "timestep": (torch.tensor([2.0, 3.0]), {0: "batch"}),
        "text": (torch.randn(2, 5, 24), {0: "batch", 1: "tokens"}),
    }
    write_graph(_Denoiser(unet), example, path, opset=20, outputs={"velocity": dict(IMAGE)})
    return path


@pytest.mark.xdist_group("denoiser")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_denoiser_with_attention(denoiser: Path, tmp_path: Path, precision: Any) -> None:
    source = denoiser
    generator = np.random.default_rng(1)
    feed: dict[str, Array] = {
        "sample": generator.standard_normal((3, 4, 16, 8), np.float32),
        "timestep": np.array([3.0, 500.0, 999.0], np.float32),
        "text": generator.standard_normal((3, 9, 24), np.float32),
    }
    target = tmp_path / "a" / "model.onnx"
    report = convert_precision(source, target, precision, feeds=[feed])
    assert report.bytes_after < 0.51 * report.bytes_before
    assert graph_precision(read_axes(target)) == precision
    before, after = read_axes(source), read_axes(target)
    assert (before.inputs, before.outputs) == (after.inputs, after.outputs)

    model, kinds = load_graph(target), _kinds(target)
    assert all(v.type.tensor_type.elem_type != float_format(precision).onnx_type
               for v in (*model.graph.input, *model.graph.output))  # fmt: skip
    for node in model.graph.node:
        if node.op_type in ("Softmax", "Sin", "Cos", "InstanceNormalization"):
            assert kinds[node.output[0]] == onnx.TensorProto.FLOAT, node.name
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            assert kinds[node.output[0]] == float_format(precision).onnx_type, node.name
    # the sinusoid of the timestep (up to 999 radians) is never rounded before it is taken
    sine = next(n for n in model.graph.node if n.op_type == "Sin")
    angle = next(n for n in model.graph.node if sine.input[0] in n.output)
    assert all(kinds[name] == onnx.TensorProto.FLOAT for name in angle.input)

    expected = OrtGraph(source).run(feed)
    scale = np.abs(expected).max()
    if precision == "float16":
        assert np.abs(OrtGraph(target).run(feed) - expected).max() < 0.01 * scale
    if "openvino" in _runtimes():
        from modelops.export.runtimes.openvino import OpenVinoGraph

        bound = 0.01 if precision == "float16" else 0.05
        got = OpenVinoGraph(target, threads=1).run(feed)
        assert np.abs(got - expected).max() < bound * scale

    again, outside = tmp_path / "b" / "model.onnx", tmp_path / "c" / "model.onnx"
    convert_precision(source, again, precision, feeds=iter([feed]))
    assert again.read_bytes() == target.read_bytes()
    convert_precision(source, outside, precision, feeds=[feed], external_bytes=1000)
    assert data_path(outside).is_file()
    assert _equal_weights(outside, target)


def _equal_weights(first: Path, second: Path) -> bool:
    one, two = (
        {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in load_graph(p).graph.initializer}
        for p in (first, second)
    )
    return one == two


def _runtimes() -> list[str]:
    from modelops.export.graphs.graph import available_runtimes

    return list(available_runtimes())


def test_a_node_that_only_reads_too_large_a_value_is_kept(tmp_path: Path) -> None:
    class Saturating(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(torch.tanh(self.first(x)))
            return y

    module = Saturating()
    with torch.no_grad():
        module.first.weight.fill_(1000.0)
        module.first.bias.zero_()
    source, target = tmp_path / "s" / "model.onnx", tmp_path / "t" / "model.onnx"
    write_graph(
        module, {"x": (torch.randn(2, 40), {0: "batch"})}, source, opset=20,
        outputs={"y": {0: "batch"}},
    )  # fmt: skip
    feed = {"x": np.full((3, 40), 2.5, np.float32)}
    report = convert_precision(source, target, "float16", feeds=[feed])
    assert sorted(report.kept.values()) == ["makes values up to 1e+05", "reads values up to 1e+05"]
    assert report.largest == 1e5
    assert (report.low_nodes, report.bound) == (1, 16376.0)
    # within the bound nothing is kept
    small = {"x": np.full((3, 40), 0.25, np.float32)}
    assert convert_precision(source, target, "float16", feeds=[small]).kept == {}


def test_layers_are_kept_by_module_and_by_weight(tmp_path: Path) -> None:
    class Three(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (torch.nn.Linear(40, 40) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
            return y

    torch.manual_seed(0)
    module = Three()
    with torch.no_grad():
        module.first.weight[0, 0] = 1e5
        module.second.weight *= 1e-6
    source, target = tmp_path / "s" / "model.onnx", tmp_path / "t" / "model.onnx"
    write_graph(
        module, {"x": (torch.randn(2, 40), {0: "batch"})}, source, opset=20,
        outputs={"y": {0: "batch"}},
    )  # fmt: skip
    report = convert_precision(source, target, "float16")
    reasons = sorted(report.kept.values())
    assert len(reasons) == 2
    assert reasons[0] == "first.weight: a weight of 1e+05 overflows"
    assert reasons[1].startswith("second.weight: ")
    assert "become subnormal" in reasons[1]
    report = convert_precision(source, target, "bfloat16", keep_fp32=["third"])
    assert list(report.kept.values()) == ["asked for (third)"]
    kinds = {i.name: i.data_type for i in load_graph(target).graph.initializer}
    assert kinds["third.weight"] == 1
    assert kinds["first.weight/bfloat16"] == 16
    with pytest.raises(UsageError, match="'fourth'"):
        convert_precision(source, target, "float16", keep_fp32=["fourth"])
    with pytest.raises(UsageError, match="unknown precision"):
        convert_precision(source, target, "int4")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="not float32"):
        convert_precision(target, tmp_path / "u" / "model.onnx", "float16")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_what_weights_survive(name: Any) -> None:
    narrow = float_format(name)
    normal = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    assert weight_fault(0.02 * normal, narrow) is None
    assert weight_fault(np.zeros(5, np.float32), narrow) is None
    assert weight_fault(np.array([np.finfo(np.float32).min], np.float32), narrow) is not None
    assert weight_fault(np.array([np.nan], np.float32), narrow) is not None
    # a few tiny ones among normal ones are lost without harm
    assert weight_fault(np.where(normal > 1.5, normal * 1e-9, normal), narrow) is None
    assert (weight_fault(1e-6 * normal, narrow) is None) == (name == "bfloat16")
    dtype = narrow.dtype
    assert float(np.float32(narrow.largest).astype(dtype)) == narrow.largest
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.float32(narrow.largest * 1.01).astype(dtype).astype(np.float32))


def test_what_each_runtime_takes(tmp_path: Path) -> None:
    assert supported_precisions("onnxruntime") == ("float32", "float16")
    assert "bfloat16" in supported_precisions("openvino")
    with pytest.raises(UsageError, match="unknown runtime"):
        supported_precisions("abacus")
    module = torch.nn.Linear(40, 40)
    source, target = tmp_path / "s" / "model.onnx", tmp_path / "t" / "model.onnx"
    write_graph(
        module, {"x": (torch.randn(2, 40), {0: "batch"})}, source, opset=20,
        outputs={"y": {0: "batch"}},
    )  # fmt: skip
    convert_precision(source, target, "bfloat16")
    with pytest.raises(ExportError, match="onnxruntime cannot run bfloat16"):
        require_supported(target, "onnxruntime")
    with pytest.raises(ExportError):  # and that is the truth: change the table when it is not
        OrtGraph(target)
    require_supported(target, "openvino")
    model = load_graph(source)
    model.opset_import[0].version = 99
    source.write_bytes(model.SerializeToString())
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(ExportError, match="opset 99 is too new for"):
            require_supported(source, runtime)


def test_pictures_at_fault() -> None:
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (1, 16, 3))
    black, green = np.zeros_like(ramp), np.zeros_like(ramp)
    green[..., 1] = 200
    missing = ramp / np.float32(255)
    missing[0, 0, 0] = np.nan
    assert check_pictures([ramp, black], [ramp, ramp]) == [
        "image 1 is all black, its source's is not"
    ]
    assert "of one colour" in check_pictures([green], [ramp])[0]
    assert "not numbers" in check_pictures([missing], [ramp / np.float32(255)])[0]
    assert check_pictures([black, green], [black, green]) == []  # no fault of the export
    assert check_pictures([black], [green])
    with pytest.raises(ValueError, match="2 images, 1 references"):
        check_pictures([ramp, ramp], [ramp])
