"""Three denoisers to measure on: the pilot's, a UNet of 60 M and a transformer of 60 M parameters.

The two large ones have random weights of unit gain, so that what flows through them stays of order
one and their output varies with every input. Random weights have none of the outliers of trained
ones: speeds carry over, errors of INT8 only from one method to another on the same network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelops.base.seeding import image_seed, numpy_generator, torch_generator
from modelops.export.calibration import DEFAULT_PROMPTS, TrajectoryRows
from modelops.export.onnx.writer import write_graph
from modelops.models.pipelines.signatures import Example
from modelops.models.sources import load_checkpoint

Array = Any
NAMES = ("pilot", "unet", "transformer")
_IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Denoiser:
    """A network and what it is fed with.

    Attributes:
        name: one of NAMES.
        about: a line on the network.
        module: takes the example's tensors as positions; returns the prediction [N, C, h, w].
        example: input name to (tensor, names of its dynamic axes).
        make_rows: (rows, seed) to rows of inputs over all noise levels.
        trained: whether the weights are.
    """

    name: str
    about: str
    module: nn.Module
    example: Example
    make_rows: Callable[[int, int], TrajectoryRows]
    trained: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of the float32 weights."""
        return 4 * sum(parameter.numel() for parameter in self.module.parameters())

    def torch(self, feed: dict[str, Array]) -> Array:
        """The reference: eager torch on a feed, float32 [N, C, h, w]."""
        with torch.inference_mode():
            prediction = self.module(*(torch.from_numpy(feed[name]) for name in self.example))
        return prediction.float().numpy()

    def compiled(self) -> Callable[[dict[str, Array]], Array]:
        """The same under torch.compile with static shapes, which compiles when it is first called
        with a batch size."""
        program = torch.compile(self.module, dynamic=False)

        def run(feed: dict[str, Array]) -> Array:
            with torch.inference_mode():
                return program(*(torch.from_numpy(feed[name]) for name in self.example)).numpy()

        return run

    def write_onnx(self, path: Path) -> Path:
        """The fp32 graph."""
        axes = next(iter(self.example.values()))[1]
        write_graph(self.module, self.example, path, opset=20, outputs={"prediction": axes})
        return path


def make_denoiser(name: str, checkpoint: Path | None = None) -> Denoiser:
    """A denoiser by name; `checkpoint` gives the pilot its trained weights."""
    makers = {"pilot": lambda: _pilot(checkpoint), "unet": _unet, "transformer": _transformer}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is no layer's weight, a table of shifts say, is drawn from here
        return makers[name]()


class _UNet(nn.Module):
    """Inputs as positions; the pilot's text is pooled, the large one's a sequence."""

    def __init__(self, unet: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.unet, self.pooled = unet, pooled

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        tokens = None if self.pooled else text
        labels = text if self.pooled else None
        prediction: torch.Tensor = self.unet(
            sample, timestep, tokens, class_labels=labels, return_dict=False
        )[0]
        return prediction


class _Transformer(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.transformer(
            sample, encoder_hidden_states=text, timestep=timestep, return_dict=False,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )[0]  # fmt: skip
        return prediction


def _pilot(checkpoint: Path | None) -> Denoiser:
    from modelops.models.networks import make_unet

    if checkpoint is None:
        unet = make_unet(resolution=32, patch_size=2, channels=64, attention_levels=())
        _redraw(unet, seed=0)
        shape, text = (12, 16, 16), (384,)
        make_rows = _synthetic_rows(shape, text)
    else:
        pipeline = load_checkpoint(checkpoint)
        unet = pipeline.unet
        size = int(unet.config["sample_size"])
        shape = (int(unet.config["in_channels"]), size, size)
        text = (int(unet.config["projection_class_embeddings_input_dim"]),)

        def make_rows(rows: int, seed: int) -> TrajectoryRows:
            return _caught_rows(pipeline, rows, seed)

    module = _UNet(unet, pooled=True).eval().requires_grad_(False)
    about = "the pilot's UNet" + (", trained" if checkpoint else ", random weights")
    return Denoiser(
        "pilot", about, module, _example(shape, text, _IMAGE_AXES), make_rows, bool(checkpoint)
    )


def _unet() -> Denoiser:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(96, 192, 384),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2, attention_head_dim=6, cross_attention_dim=768,
    )  # fmt: skip
    _redraw(unet, seed=1)
    module = _UNet(unet, pooled=False).eval().requires_grad_(False)
    return Denoiser(
        "unet", "UNet2DConditionModel at 4 x 64 x 64, text 77 x 768, random weights", module,
        _example((4, 64, 64), (77, 768), _IMAGE_AXES), _synthetic_rows((4, 64, 64), (77, 768)),
    )  # fmt: skip


def _transformer() -> Denoiser:
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=64, in_channels=4, out_channels=4, patch_size=2, num_layers=13,
        num_attention_heads=8, attention_head_dim=64, cross_attention_dim=512,
        caption_channels=768, use_additional_conditions=False,
    )  # fmt: skip
    _redraw(transformer, seed=2)
    module = _Transformer(transformer).eval().requires_grad_(False)
    return Denoiser(
        "transformer", "PixArt at 4 x 64 x 64, patch 2, text 77 x 768, random weights", module,
        _example((4, 64, 64), (77, 768), {0: "batch"}), _synthetic_rows((4, 64, 64), (77, 768)),
    )  # fmt: skip


def _redraw(module: nn.Module, *, seed: int) -> None:
    """Weights of variance 1 / fan in, biases of 0.01: a layer keeps the scale of its input."""
    generator = torch_generator(seed, "bench-weights")
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                fan_in = part.weight[0].numel()
                part.weight.normal_(0.0, fan_in**-0.5, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0.0, 0.1, generator=generator)


def _example(shape: tuple[int, ...], text: tuple[int, ...], axes: dict[int, str]) -> Example:
    generator = torch_generator(0, "bench-example")
    return {
        "sample": (torch.randn(2, *shape, generator=generator), axes),
        "timestep": (torch.tensor([250.0, 750.0]), {0: "batch"}),
        "text": (torch.randn(2, *text, generator=generator), {0: "batch"}),
    }


def _synthetic_rows(
    shape: tuple[int, ...], text: tuple[int, ...]
) -> Callable[[int, int], TrajectoryRows]:
    """Smooth images mixed with noise as rectified flow does, at evenly spaced levels."""

    def make(rows: int, seed: int) -> TrajectoryRows:
        generator = numpy_generator(seed, "bench-rows")
        sigmas = ((np.arange(rows) + 0.5) / rows).astype(np.float32)
        coarse = generator.standard_normal((rows, shape[0], shape[1] // 8, shape[2] // 8))
        smooth = np.repeat(np.repeat(coarse, 8, axis=2), 8, axis=3)
        noise = generator.standard_normal((rows, *shape))
        level = sigmas.reshape(-1, 1, 1, 1)
        feeds = {
            "sample": ((1 - level) * smooth + level * noise).astype(np.float32),
            "timestep": sigmas * np.float32(1000),
            "text": generator.standard_normal((rows, *text)).astype(np.float32),
        }
        return TrajectoryRows(feeds=feeds, sigmas=sigmas, record={"seed": seed})

    return make


def _caught_rows(pipeline: Any, rows: int, seed: int) -> TrajectoryRows:
    """Calls of the network while the pipeline draws, in the order of their noise level."""
    caught: list[dict[str, Array]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        names = {"sample": "sample", "timestep": "timestep", "text": "class_labels"}
        caught.append({
            name: given[parameter].detach().float().numpy().copy()
            for name, parameter in names.items()
        })  # fmt: skip

    pipeline.set_progress_bar_config(disable=True)
    handle = pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline(
            list(DEFAULT_PROMPTS), num_inference_steps=16, output_type="latent",
            generator=[torch.Generator().manual_seed(image_seed(seed, t)) for t in DEFAULT_PROMPTS],
        )  # fmt: skip
    finally:
        handle.remove()
    feeds = {name: np.concatenate([call[name] for call in caught]) for name in caught[0]}
    picks = numpy_generator(seed, "bench-rows").choice(
        len(feeds["timestep"]), size=min(rows, len(feeds["timestep"])), replace=False
    )
    picks = picks[np.argsort(feeds["timestep"][picks], kind="stable")]
    feeds = {name: array[picks] for name, array in feeds.items()}
    return TrajectoryRows(feeds=feeds, sigmas=feeds["timestep"] / 1000, record={"seed": seed})
