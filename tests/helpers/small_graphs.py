"""Small denoisers exported with our writer: named like diffusers' parts, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from modelops.base.seeding import numpy_generator, torch_generator
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs.graph import Array
from modelops.export.onnx.writer import write_graph

WIDTH, TOKENS = 32, 6


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.to_q(x) @ self.to_k(x).transpose(1, 2) / WIDTH**0.5, dim=-1)
        result: torch.Tensor = self.to_out[0](weights @ self.to_v(x))
        return result


class _Block(nn.Module):
    """An adaptive norm before attention and an affine one before the feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.adaln = nn.Linear(WIDTH, 2 * WIDTH)
        self.attn = _Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.adaln(condition)[:, None].chunk(2, dim=2)
        x = x + self.attn(self.norm1(x) * (1 + scale) + shift)
        result: torch.Tensor = x + self.ff(self.norm2(x))
        return result


class Transformer(nn.Module):
    """hidden_states [N, 6, 8] at timestep [N] to [N, 6, 8]."""

    def __init__(self, blocks: int = 2, *, outliers: float = 0.0) -> None:
        super().__init__()
        self.outliers = outliers
        self.x_embedder = nn.Linear(8, WIDTH)
        self.time_embedding = nn.Linear(1, WIDTH)
        self.blocks = [_Block() for _ in range(blocks)]
        self.transformer_blocks = nn.ModuleList(self.blocks)
        self.proj_out = nn.Linear(WIDTH, 8)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.bias.zero_()
            for block in self.blocks:
                block.adaln.bias[:2] += outliers
                block.norm2.weight[:2] += outliers

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(hidden_states)
        condition = self.time_embedding(timestep[:, None] / 1000)
        for block in self.transformer_blocks:
            x = block(x, condition)
        result: torch.Tensor = self.proj_out(x)
        return result


class ConvNet(nn.Module):
    """sample [N, 4, 8, 8] at timestep [N] to [N, 4, 8, 8], with a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.time_embedding = nn.Linear(1, 16)
        block: Any = nn.Module()
        block.conv1, block.conv2 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.down_blocks: Any = nn.ModuleList([nn.ModuleDict({"resnets": nn.ModuleList([block])})])
        self.conv_fuse = nn.Conv2d(32, 16, 1)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(sample)
        resnet: Any = self.down_blocks[0]["resnets"][0]
        h = nn.functional.silu(
            resnet.conv1(x) + self.time_embedding(timestep[:, None] / 1000)[:, :, None, None]
        )
        h = nn.functional.silu(resnet.conv2(h))
        result: torch.Tensor = self.conv_out(
            nn.functional.silu(self.conv_fuse(torch.cat([h, x], 1)))
        )
        return result


def shared_network(network: nn.Module, factory: pytest.TempPathFactory) -> Path:
    """`export_network`, once for all tests of a session. Read only."""
    label = f"{type(network).__name__}-{getattr(network, 'outliers', 0)}"
    path = factory.getbasetemp() / "small-graphs" / label / "model.onnx"
    return path if path.exists() else export_network(network, path)


def export_network(network: nn.Module, path: Path) -> Path:
    """Write a network above as model.onnx; its matrices are drawn from seed 0, and its vectors are
    as they were made."""
    generator = torch_generator(0, "small-graphs")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    name, shape = (
        ("hidden_states", (2, TOKENS, 8)) if isinstance(network, Transformer)
        else ("sample", (2, 4, 8, 8))
    )  # fmt: skip
    example = {
        name: (torch.randn(shape, generator=generator), {0: "batch"}),
        "timestep": (torch.tensor([10.0, 900.0]), {0: "batch"}),
    }
    write_graph(network, example, path, opset=18, outputs={"out": {0: "batch"}})
    return path


def random_rows(network: nn.Module, count: int, seed: int) -> TrajectoryRows:
    """Rows of noise at `count` noise levels."""
    generator = numpy_generator(seed, "rows")
    name, shape = (
        ("hidden_states", (TOKENS, 8)) if isinstance(network, Transformer)
        else ("sample", (4, 8, 8))
    )  # fmt: skip
    sigmas = np.linspace(0.05, 1.0, count).astype(np.float32)
    noise = generator.standard_normal((count, *shape)).astype(np.float32)
    feeds = {name: noise, "timestep": sigmas * 1000}
    return TrajectoryRows(feeds, sigmas, {})


def write_joint_attention(path: Path) -> Path:
    """Keys and values of two streams, joined; positions times frequencies make a sine."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    generator = np.random.default_rng(0)
    arrays = {
        "weights": generator.standard_normal((16, 16)) / 4.0, "factor": np.array(0.5),
        "other_factor": np.array(0.5),
    }  # fmt: skip
    nodes = [
        node("MatMul", ["positions", "frequencies"], ["angles"], "angles"),
        node("Sin", ["angles"], ["sines"]),
        node("Add", ["image", "sines"], ["placed"]),
        node("MatMul", ["placed", "weights"], ["query"], "to_q"),
        node("Concat", ["placed", "text"], ["joined"], axis=1),
        node("Transpose", ["joined"], ["keys"], perm=[0, 2, 1]),
        node("Mul", ["query", "factor"], ["scaled_query"]),
        node("Mul", ["keys", "other_factor"], ["scaled_keys"]),
        node("MatMul", ["scaled_query", "scaled_keys"], ["scores"], "scores"),
        node("Softmax", ["scores"], ["attention"], axis=-1),
        node("MatMul", ["attention", "joined"], ["out"], "values"),
    ]
    shapes = {
        "image": ["batch", 12, 16], "text": ["batch", 5, 16], "positions": ["batch", 12, 1],
        "frequencies": ["batch", 1, 16],
    }  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes, "joint", [value(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()],
        [value("out", onnx.TensorProto.FLOAT, ["batch", 12, 16])],
        [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path


def joint_feed() -> dict[str, Array]:
    """Four rows for it."""
    generator = np.random.default_rng(1)
    shapes = {"image": (4, 12, 16), "text": (4, 5, 16), "positions": (4, 12, 1),
              "frequencies": (4, 1, 16)}  # fmt: skip
    return {k: generator.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def write_gated(
    path: Path, *, axis: int = 2, sizes: bool = False, read_twice: bool = False
) -> Path:
    """x [batch, 6, 8] times [8, 6] plus a bias, cut in two that are multiplied. With sizes, in
    parts of 2 and 4. Along axis 1 tokens are cut, which is no matter of columns."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    generator = np.random.default_rng(0)
    arrays = {
        "weights": generator.standard_normal((8, 6)).astype(np.float32),
        "bias": generator.standard_normal(6).astype(np.float32),
        "sizes": np.array([2, 4]),
        "tail": np.ones((4, 2), np.float32),
    }
    cut = ["whole", "sizes"] if sizes else ["whole"]
    joined = [node("MatMul", ["right", "tail"], ["narrow"], "tail")] if sizes else []
    nodes = [
        node("MatMul", ["x", "weights"], ["product"], "linear"),
        node("Add", ["product", "bias"], ["whole"], "linear_bias"),
        node("Split", cut, ["left", "right"], "cut", axis=axis,
             **({} if sizes else {"num_outputs": 2})),
        *joined,
        node("Mul", ["left", "narrow" if sizes else "right"], ["out"]),
    ]  # fmt: skip
    outputs = [value("out", onnx.TensorProto.FLOAT, ["batch", "height", "width"])]
    if read_twice:
        outputs.append(value("whole", onnx.TensorProto.FLOAT, ["batch", 6, 6]))
    graph = onnx.helper.make_graph(
        nodes, "gated", [value("x", onnx.TensorProto.FLOAT, ["batch", 6, 8])], outputs,
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path
