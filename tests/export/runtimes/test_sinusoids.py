"""Timesteps and positions keep their digits where OpenVINO runs the rest in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import families
from modelops.base.seeding import torch_generator
from modelops.export.artifact.directory import GRAPH
from modelops.export.components import find_components
from modelops.export.int8.accept import openvino_execution
from modelops.export.onnx.writer import write_graph
from modelops.export.runtimes import openvino as runtime
from modelops.export.runtimes.openvino import OpenVinoGraph
from modelops.export.runtimes.precision import openvino_has_bfloat16
from modelops.export.runtimes.probe import relative_errors
from modelops.export.runtimes.sinusoids import keep_sinusoids_in_float32
from modelops.export.source import load_source
from modelops.models.pipelines.signatures import Example

pytest.importorskip("openvino")
bfloat16 = pytest.mark.skipif(not openvino_has_bfloat16(), reason="no bfloat16 in OpenVINO here")
TIMES = np.array([999.0, 687.5, 431.25, 7.625], np.float32)


class Timed(nn.Module):
    """sample [N, 16] and timestep [N] to [N, 16]; diffusers' embedding between two layers."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        self.proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0, scale=scale)
        self.embed = TimestepEmbedding(64, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(sample) + self.embed(self.proj(timestep))
        return result


class Placed(nn.Module):
    """tokens [N, 6, 16] at places [6, 2] to [N, 6, 16]: rotated as transformers do, between two
    layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("rates", 10 ** -torch.arange(0, 1, 0.25))

    def forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        angles = (places[..., None] * self.rates).flatten(1)
        cosine, sine = angles.cos(), angles.sin()
        even, odd = self.layer(tokens).chunk(2, dim=2)
        turned = torch.cat([even * cosine - odd * sine, even * sine + odd * cosine], dim=2)
        result: torch.Tensor = self.last(turned)
        return result


def written(module: nn.Module, example: Example, path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module.apply(lambda part: getattr(part, "reset_parameters", lambda: None)())
    write_graph(module.eval(), example, path, opset=20, outputs={"out": {0: "batch"}})
    return path


def error_of(module: nn.Module, path: Path, feed: dict[str, np.ndarray]) -> float:
    with torch.inference_mode():
        expected = module(*(torch.from_numpy(array) for array in feed.values())).numpy()
    return float(
        relative_errors(expected, OpenVinoGraph(path, precision="bfloat16").run(feed)).max()
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "test-sinusoids"))


def timed(scale: float, kind: type, path: Path) -> tuple[nn.Module, np.ndarray]:
    times = (TIMES / scale).astype(kind)
    example: Example = {
        "sample": (random(4, 16), {0: "batch"}),
        "timestep": (torch.from_numpy(times), {0: "batch"}),
    }
    module = Timed(scale)
    written(module, example, path)
    return module, times


@bfloat16
@pytest.mark.parametrize(
    ("scale", "kind"), [(1.0, np.float32), (1.0, np.int64), (1000.0, np.float32)]
)
def test_timesteps_keep_float32(
    scale: float, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    module, times = timed(scale, kind, path)
    feed = {"sample": random(4, 16).numpy(), "timestep": times}
    assert error_of(module, path, feed) < 0.01
    assert error_of(module, path, {name: array[:3] for name, array in feed.items()}) < 0.01
    monkeypatch.setattr(runtime, "keep_sinusoids_in_float32", lambda core, model: 0)
    assert error_of(module, path, feed) > 0.05  # what the hint alone does


@bfloat16
def test_positions_keep_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Placed()
    places = torch.tensor(
        [[0.0, 801.0], [3.0, 777.0], [513.0, 2.0], [9.0, 9.0], [1.0, 5], [601, 3]]
    )
    example: Example = {
        "tokens": (random(2, 6, 16), {0: "batch"}),
        "places": (places, {}),
    }
    path = written(module, example, tmp_path / "model.onnx")
    feed = {"tokens": random(3, 6, 16).numpy(), "places": places.numpy()}
    assert error_of(module, path, feed) < 0.01
    monkeypatch.setattr(runtime, "keep_sinusoids_in_float32", lambda core, model: 0)
    assert error_of(module, path, feed) > 0.05


def test_a_part_is_cut_out_and_put_back_without_a_change(tmp_path: Path) -> None:
    import openvino

    path = tmp_path / "model.onnx"
    _, times = timed(1000.0, np.float32, path)
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({"sample": [4, 16], "timestep": [4]})
    feed = {"sample": random(4, 16).numpy(), "timestep": times}

    def outputs() -> np.ndarray:
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result: np.ndarray = compiled(feed)[0].copy()
        return result

    before = outputs()
    assert keep_sinusoids_in_float32(core, model) >= 4
    np.testing.assert_allclose(outputs(), before, rtol=1e-5, atol=1e-5)


def test_what_has_no_angles_stays_as_it_is(tmp_path: Path) -> None:
    import openvino

    example: Example = {"x": (random(2, 16), {0: "batch"})}
    path = written(nn.Linear(16, 4), example, tmp_path / "model.onnx")
    core = openvino.Core()
    model = core.read_model(path)
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    assert keep_sinusoids_in_float32(core, model) == 0
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


@bfloat16
@pytest.mark.parametrize("family", families.ALL)
def test_a_denoiser_is_as_right_as_in_torchs_own_bfloat16(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    folder, size = family_folder(family), families.size_of(family)
    found = find_components(load_source(folder / family, size=size).pipeline, size=size)
    denoiser = next(item for item in found if item.role == "denoiser")
    tensors = [tensor for tensor, _ in denoiser.example.values()]
    with torch.inference_mode():
        expected = denoiser.flat(*tensors)[0].numpy()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = relative_errors(expected, denoiser.flat(*tensors)[0].float().numpy()).max()
    feed = {name: tensor.numpy() for name, (tensor, _) in denoiser.example.items()}
    graph = OpenVinoGraph(folder / "onnx" / denoiser.name / GRAPH, precision="bfloat16")
    assert relative_errors(expected, graph.run(feed)).max() < 2 * own


class Wave(nn.Module):
    """x [N, 4] to its sine and, beside it, the sine's product with x."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sine = (x * 700).sin()
        return sine, sine * x


@bfloat16
def test_a_sine_may_be_what_a_model_returns(tmp_path: Path) -> None:
    x = random(3, 4)
    path = tmp_path / "model.onnx"
    batch = {0: "batch"}
    write_graph(Wave(), {"x": (x, batch)}, path, opset=20, outputs={"sine": batch, "both": batch})
    sine, both = OpenVinoGraph(path, precision="bfloat16").run_all({"x": x.numpy()})
    expected, product = Wave()(x)
    np.testing.assert_allclose(sine, expected.numpy(), atol=1e-3)
    np.testing.assert_allclose(both, product.numpy(), atol=0.02)


@bfloat16
def test_a_quantised_graph_runs_what_it_ran_in_int8(
    int8_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = int8_artifact / "unet" / GRAPH
    feed = {
        "sample": random(2, 12, 16, 16).numpy(), "timestep": TIMES[:2],
        "class_labels": random(2, 64).numpy(),
    }  # fmt: skip

    def execution() -> dict[str, object]:
        return openvino_execution(OpenVinoGraph(path, precision="bfloat16"), feed)

    found = execution()
    assert found["int8_layers"]
    monkeypatch.setattr(runtime, "keep_sinusoids_in_float32", lambda core, model: 0)
    assert execution() == found
