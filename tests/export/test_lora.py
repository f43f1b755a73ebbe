"""A LoRA goes into a pipeline whole, at its scale, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_pipelines
from modelops.base.errors import UsageError
from modelops.cli.main import main
from modelops.export.lora import Lora, apply_lora

pytest.importorskip("peft")
UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
FLUX = "transformer.transformer_blocks.0.attn.to_q.lora_"


def pair(prefix: str, inside: int = 32, outside: int = 32) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(len(prefix))
    return {
        f"{prefix}A.weight": torch.randn(2, inside, generator=make),
        f"{prefix}B.weight": torch.randn(outside, 2, generator=make),
    }


def adapted(family: str, folder: Path, layers: list[str]) -> Path:
    """Write a LoRA of layers, named as COMPONENT:end of a layer's name."""
    pipeline = tiny_pipelines.make(family)
    tensors = {}
    for layer in layers:
        component, _, end = layer.partition(":")
        for name, module in getattr(pipeline, component).named_modules():
            if name.endswith(end):
                shape = module.out_features, module.in_features
                tensors |= pair(f"{component}.{name}.lora_", *reversed(shape))
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def image(family: str, lora: Lora | None = None) -> Any:
    pipeline = tiny_pipelines.make(family)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        apply_lora(pipeline, lora)
    made = pipeline(
        ["red heart"], num_inference_steps=1, height=32, width=32, output_type="np",
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    return made.images[0]


def shift(first: Any, second: Any) -> float:
    return float(np.abs(first - second).max())


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("sd", ["unet:to_q", "text_encoder:q_proj"]),
        ("sd", ["text_encoder:q_proj"]),
        ("flux", ["transformer:to_q", "text_encoder:q_proj"]),  # fuse_lora leaves it out by default
    ],
)
def test_a_scale_counts_fused_and_kept(family: str, layers: list[str], tmp_path: Path) -> None:
    path = adapted(family, tmp_path, layers)
    plain = image(family)
    made = {
        (fused, scale): image(family, Lora(path, fused=fused, scale=scale))
        for fused in (True, False)
        for scale in (0.5, 1.0)
    }
    for scale in (0.5, 1.0):
        assert shift(made[True, scale], made[False, scale]) < 1e-4
    whole, half = shift(made[False, 1.0], plain), shift(made[False, 0.5], plain)
    assert whole > 1e-3
    assert half > 1e-4 and shift(made[False, 0.5], made[False, 1.0]) > 1e-4


def test_weights_that_fit_no_layer_are_refused(tmp_path: Path) -> None:
    whole = load_file(adapted("sd", tmp_path, ["unet:to_q"]))
    half = {k.replace("unet.", "unet.other.") if i % 2 else k: v for i, (k, v) in
            enumerate(sorted(whole.items()))}  # fmt: skip
    text = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj.lora_"
    text_encoder = {**pair(text.format(0)), **pair(text.format(9))}
    cases = {
        "another family": (pair(FLUX), "2 of 2 weights fit no layer", FLUX + "A.weight"),
        "more than its own": ({**whole, **pair(FLUX)}, f"2 of {len(whole) + 2} weights", FLUX),
        "half": (half, "weights fit no layer", "unet.other."),
        "text encoder": (text_encoder, "2 of 4 weights", "layers.9"),
        "another width": (pair(UNET, 48, 32), "not a LoRA of this checkpoint", "48"),
        "unknown kind": (
            {**whole, UNET.replace("lora_", "hada_w1"): torch.ones(2, 2)}, "", "lora.safetensors",
        ),
        "DoRA": (
            {**whole, UNET.replace("lora_", "dora_scale"): torch.ones(32)}, "weights fit", "dora",
        ),
        "one half of a layer": (
            {k: v for k, v in whole.items() if not k.startswith(UNET + "B")}, "lacks 1", "lora_B",
        ),
        "nothing": ({"a": torch.ones(2)}, "", "lora.safetensors"),
    }  # fmt: skip
    for name, (tensors, said, named) in cases.items():
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(UsageError) as failure:
            apply_lora(tiny_pipelines.make("sd"), Lora(tmp_path / "lora.safetensors"))
        assert said in failure.value.message and named in failure.value.message, name
        assert "\n" not in failure.value.message, name


def test_kohyas_names_are_a_lora_too(tmp_path: Path) -> None:
    """They are renamed on the way in; alphas are no weights."""
    tensors = {}
    for name in ("q", "v"):
        key = f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_{name}"
        tensors |= {
            f"{key}.lora_down.weight": torch.randn(2, 32),
            f"{key}.lora_up.weight": torch.randn(32, 2),
            f"{key}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert shift(image("sd", Lora(tmp_path)), image("sd")) > 1e-3


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [((4, 2, 2), (1, 2, 2)), ((2, 2, 2), (1, None, None)), ((8, 2, 4), (None, None, None))],
)
@pytest.mark.parametrize("fused", [True, False])
def test_every_layer_has_its_own_alpha(
    ranks: tuple[int, ...], alphas: tuple[float | None, ...], fused: bool, tmp_path: Path
) -> None:
    tensors, expected = {}, {}
    for name, rank, alpha in zip("qkv", ranks, alphas, strict=True):
        layer = f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{name}"
        key = f"lora_unet_{layer.replace('.', '_')}"
        down, up = torch.randn(rank, 32), torch.randn(32, rank)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        expected[layer] = up @ down * ((rank if alpha is None else alpha) / rank)
    save_file(tensors, tmp_path / "kohya.safetensors")
    pipeline, plain = tiny_pipelines.make("sd"), tiny_pipelines.make("sd")
    apply_lora(pipeline, Lora(tmp_path, fused=fused, scale=0.5))
    rows = torch.randn(3, 32)
    for layer, change in expected.items():
        before, after = (p.unet.get_submodule(layer)(rows) for p in (plain, pipeline))
        assert torch.allclose(after - before, 0.5 * rows @ change.T, atol=1e-4)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipelines.make("sd")
    torch.save(pair(UNET), tmp_path / "lora.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, said in (("lora.bin", "pickles"), ("broken.safetensors", "not a LoRA"),
                       ("none", "no such file")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            apply_lora(pipeline, Lora(tmp_path / name))
    (tmp_path / "broken.safetensors").unlink()
    with pytest.raises(UsageError, match="0 files"):
        apply_lora(pipeline, Lora(tmp_path))
    for scale in (0.0, float("nan")):
        with pytest.raises(UsageError, match="scale"):
            Lora(tmp_path, scale=scale)


def test_options_without_a_lora_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", "sd", "--to", "onnx", "--out", str(tmp_path / "out"), "--lora-scale", "0.5"]
    assert main(line) == 2
    assert "give --lora too" in capsys.readouterr().err


def test_a_second_lora_is_not_dropped_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        save_file({}, tmp_path / f"{name}.safetensors")
    line = ["export", "sd", "--to", "onnx", "--out", str(tmp_path / "out")]
    line += ["--lora", str(tmp_path / "one.safetensors")]
    line += ["--lora", str(tmp_path / "two.safetensors")]
    assert main(line) == 2
    assert "2 were given, and one is taken" in capsys.readouterr().err
