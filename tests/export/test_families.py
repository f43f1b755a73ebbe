"""Pipelines of every family export, run and make the same images; nothing knows them by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import tiny_pipelines
from families import PROMPTS, exported, saved
from modelops.base.errors import ExportError, UsageError
from modelops.export.artifact.directory import GRAPH, read_artifact
from modelops.export.artifact.open import open_artifact
from modelops.export.components import Component, find_components
from modelops.export.exporting import Stages
from modelops.export.lora import Lora
from modelops.export.source import load_source
from modelops.export.to_int8 import Int8Options, export_int8
from modelops.models.pipelines.signatures import Fields, Signature, rebuild, template_of
from modelops.models.request import ImageRequest
from modelops.models.sources import open_checkpoint

FolderOf = Callable[[str], Path]

FAMILIES = {
    "sd": {"unet", "text_encoder", "vae_encoder", "vae_decoder"},
    "sdxl": {"unet", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"},
    "sd3": {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae_encoder",
            "vae_decoder"},
    "flux": {"transformer", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"},
    "pixart": {"transformer", "text_encoder", "vae_encoder", "vae_decoder"},
    "sana": {"transformer", "text_encoder", "vae_encoder", "vae_decoder"},
    "prx": {"transformer", "text_encoder", "vae_encoder", "vae_decoder"},
    "prx_pixel": {"transformer", "text_encoder"},
    "ddpm": {"unet"},
    "controlnet": {"unet", "controlnet", "text_encoder", "vae_encoder", "vae_decoder"},
}  # fmt: skip


def check_pictures_of(family: str, checkpoint: Path, artifact: Path) -> None:
    # One wants an image, which no request carries; the others draw at a size of their own list and
    # scale: their images are compared at export alone, where that is turned off.
    if family in ("controlnet", "pixart", "sana", "prx", "prx_pixel"):
        return
    size = {} if family == "ddpm" else {"height": 32, "width": 32}
    requests = [ImageRequest(prompt=t, seed=s, steps=3, **size) for s, t in enumerate(PROMPTS)]
    expected = open_checkpoint(checkpoint, batch_size=2).generate(requests)
    images = open_artifact(artifact, runtime="onnxruntime", batch_size=2).generate(requests)
    for image, reference in zip(images, expected, strict=True):
        assert np.abs(image.astype(int) - reference.astype(int)).max() <= 1
        assert reference.std() > 1  # not of one colour


@pytest.mark.parametrize("family", families.ALL)
def test_a_family_exports_and_matches(family: str, family_folder: FolderOf) -> None:
    folder = family_folder(family)
    begun = json.loads((folder / "stages.json").read_text())
    assert [(number, total) for _, number, total in begun] == [(n, 5) for n in range(1, 6)]
    record = read_artifact(folder / "onnx")
    assert {item.name for item in record.components} == FAMILIES[family]
    assert all(check.passed for check in record.parity)
    relative = [c.value for c in record.parity if c.measure == "max_relative_error"]
    assert max(relative) <= 1e-4
    for item in record.components:
        assert any(axis.endswith("=batch") for axis in item.dynamic_axes), item
    assert record.pipeline == type(tiny_pipelines.make(family)).__name__
    check_pictures_of(family, folder / family, folder / "onnx")


QUANTISED = [one for one in families.ALL if one.values[0] in ("sdxl", "sd3", "sana", "prx_pixel")]


@pytest.mark.parametrize("family", QUANTISED)
def test_a_family_is_quantised(family: str, family_folder: FolderOf, tmp_path: Path) -> None:
    folder = family_folder(family)
    options = Int8Options(steps=4, rows=16, search_seconds=3, speed_rounds=3)
    begun: list[tuple[str, int, int]] = []
    record = export_int8(
        folder / "onnx", folder / family, tmp_path / "int8", prompts=PROMPTS, options=options,
        allow=True,  # so small a network is not faster
        on_stage=lambda *stage: begun.append(stage),
    )  # fmt: skip
    assert [(number, total) for _, number, total in begun] == [(n, 8) for n in range(1, 9)]
    assert all(check.passed for check in record.parity)
    assert record.calibration["error"] <= record.calibration["search"]["budget"]
    served = record.execution[record.runtime]
    assert served["int8_layers"] > 0
    denoiser = next(item for item in record.components if item.role == "denoiser")
    assert denoiser.quantized_nodes > 5
    assert (tmp_path / "int8" / "sensitivity.png").is_file()


def test_a_count_is_of_stages_where_nobody_asks_for_their_names() -> None:
    told: list[tuple[object, ...]] = []

    def tell(*what: object) -> None:
        told.append(what)

    def run(stages: Stages) -> list[tuple[object, ...]]:
        told.clear()
        stages.begin("one")
        stages.count(1, 7)
        stages.rename("one, still")
        stages.begin("two")
        stages.end()
        return list(told)

    assert run(Stages(2, on_stage=None, on_progress=None)) == []
    assert run(Stages(2, on_stage=None, on_progress=tell)) == [(0, 2), (1, 2), (2, 2)]
    assert run(Stages(2, on_stage=tell, on_progress=tell)) == [
        ("one", 1, 2), (1, 7), ("one, still", 1, 2), ("two", 2, 2),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.xdist_group("sd")
def test_height_and_width_vary_where_the_network_lets_them(family_folder: FolderOf) -> None:
    checkpoint, artifact = family_folder("sd") / "sd", family_folder("sd") / "onnx"
    record = read_artifact(artifact)
    unet = next(item for item in record.components if item.name == "unet")
    assert {"sample[2]=height", "sample[3]=width"} <= set(unet.dynamic_axes)
    request = [ImageRequest(prompt="dog", seed=3, steps=2, height=48, width=40)]
    image = open_artifact(artifact, runtime="onnxruntime").generate(request)[0]
    expected = open_checkpoint(checkpoint).generate(request)[0]
    assert image.shape == (48, 40, 3)
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.xdist_group("sd")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_keeps_the_pictures(
    family_folder: FolderOf, tmp_path: Path, precision: str
) -> None:
    if precision == "bfloat16":
        pytest.importorskip("openvino")
    folder = family_folder("sd")
    record = exported("sd", folder / "sd", tmp_path / "half", precision=precision)
    assert record.precision == precision
    assert set(record.conversion) == FAMILIES["sd"]
    wide = {c.name: c.bytes for c in read_artifact(folder / "onnx").components}
    for item in record.components:
        assert item.bytes < 0.8 * wide[item.name], item.name
    assert not list((tmp_path / "half").glob(".*"))
    assert open_artifact(tmp_path / "half").info.precision == precision


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_a_lora_is_exported_fused_or_kept(tmp_path: Path, fused: bool) -> None:
    peft = pytest.importorskip("peft")
    checkpoint = saved("sd", tmp_path)
    pipeline = tiny_pipelines.make("sd")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    pipeline.unet.add_adapter(config)
    for name, value in pipeline.unet.named_parameters():
        if "lora_B" in name:  # zero at first: no change at all
            torch.nn.init.normal_(value, std=0.3)
    layers = peft.utils.get_peft_model_state_dict(pipeline.unet)
    type(pipeline).save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    lora = Lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors", fused=fused)
    record = exported("sd", checkpoint, tmp_path / "onnx", lora=lora)
    assert all(check.passed for check in record.parity)
    assert record.lora == {"fused": fused, "scale": 1.0}
    request = [ImageRequest(prompt="dog", seed=1, steps=3, height=32, width=32)]
    plain = open_checkpoint(checkpoint).generate(request)[0].astype(int)
    image = open_artifact(tmp_path / "onnx", runtime="onnxruntime").generate(request)[0]
    assert np.abs(image.astype(int) - plain).max() > 10
    nodes = onnx.load(str(tmp_path / "onnx/unet" / GRAPH)).graph.node
    places = [note.value for node in nodes for note in node.metadata_props]
    assert any("lora_A" in place for place in places) != fused


def components_of(family: str) -> dict[str, Component]:
    pipeline = tiny_pipelines.make(family)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return {item.name: item for item in find_components(pipeline, size=(32, 32))}


def test_networks_are_described_by_what_they_are_called_with() -> None:
    found = components_of("sdxl")
    unet = found["unet"]
    assert unet.role == "denoiser"
    assert list(unet.example) == [
        "sample", "timestep", "encoder_hidden_states", "added_cond_kwargs.text_embeds",
        "added_cond_kwargs.time_ids",
    ]  # fmt: skip
    assert unet.example["timestep"][1] == {0: "batch"}
    assert unet.example["timestep"][0].shape == unet.example["sample"][0].shape[:1]
    assert unet.example["sample"][1] == {0: "batch", 2: "height", 3: "width"}
    assert unet.outputs == {"output.0": {0: "batch", 2: "height", 3: "width"}}
    assert found["text_encoder_2"].signature.integers == ["input_ids"]
    assert "output.text_embeds" in found["text_encoder_2"].outputs


def test_rows_that_are_no_rows_are_told_apart() -> None:
    transformer = components_of("flux")["transformer"]
    assert set(transformer.example) - set(transformer.rows_in) == {"txt_ids", "img_ids"}
    assert transformer.example["img_ids"][1] == {0: "height_width"}


def test_a_call_goes_through_its_signature_and_back() -> None:
    signature = Signature(
        method="forward",
        parameters=["sample", "timestep", "extra", "return_dict"],
        arguments={
            "sample": {"tensor": "sample"},
            "timestep": {"tensor": "timestep"},
            "extra": {"dict": {"ids": {"list": [{"tensor": "extra.ids.0"}]}}},
            "return_dict": {"value": False},
        },
        output={"tuple": [{"tensor": "output.0"}]},
        inputs=["sample", "timestep", "extra.ids.0"],
        outputs=["output.0"],
        integers=["extra.ids.0"],
        batch=["sample", "timestep", "extra.ids.0"],
    )
    sample, ids = torch.zeros(3, 2, dtype=torch.float16), torch.ones(3, dtype=torch.int32)
    flat = signature.flatten(
        {"sample": sample, "timestep": torch.tensor(7), "extra": {"ids": [ids]}}
    )
    assert {name: (t.dtype, tuple(t.shape)) for name, t in flat.items()} == {
        "sample": (torch.float32, (3, 2)),
        "timestep": (torch.float32, (3,)),
        "extra.ids.0": (torch.int64, (3,)),
    }
    assert flat["timestep"].tolist() == [7.0, 7.0, 7.0]
    fields = signature.restore([sample], return_dict=True)
    assert isinstance(fields, Fields)
    assert fields.sample is sample
    assert fields[0] is sample
    assert signature.restore([sample], return_dict=False) == (sample,)
    with pytest.raises(ExportError, match=r"needs 1 values as extra\.ids"):
        signature.flatten({"sample": sample, "timestep": torch.tensor(7)})
    with pytest.raises(ExportError, match="takes no mask"):
        signature.flatten({"sample": sample, "timestep": 7, "extra": {"ids": [ids]}, "mask": ids})


def test_a_tiny_summand_is_not_taken_for_zero(tmp_path: Path) -> None:
    from modelops.export.onnx.writer import write_graph

    class Divides(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x / (x + 1e-15) * 1.0 + 0.0)

    path = tmp_path / "divides" / GRAPH
    example = {"x": (torch.ones(2, 3), {0: "batch"})}
    write_graph(Divides(), example, path, opset=20, outputs={"y": {0: "batch"}})
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds == ["Add", "Div", "Relu"]  # and what changes nothing is gone


def test_a_squeeze_of_nothing_is_left_out(tmp_path: Path) -> None:
    from modelops.export.onnx.writer import write_graph
    from modelops.export.runtimes.onnxruntime import OrtGraph

    class Squeezes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.squeeze(1) + 1

    path = tmp_path / "squeezes" / GRAPH
    example = {"x": (torch.ones(2, 3), {0: "batch"})}
    write_graph(Squeezes(), example, path, opset=20, outputs={"y": {0: "batch"}})
    assert OrtGraph(path).run({"x": np.zeros((2, 3), np.float32)}).shape == (2, 3)


def test_a_pipeline_that_wants_what_cannot_be_made_up_is_refused() -> None:
    class Wants(type(tiny_pipelines.make("ddpm"))):  # type: ignore[misc]
        def __call__(self, depth_map: Any, **kwargs: Any) -> Any:
            raise AssertionError

    plain = tiny_pipelines.make("ddpm")
    with pytest.raises(UsageError, match="wants depth_map"):
        find_components(Wants(unet=plain.unet, scheduler=plain.scheduler))


def test_a_size_that_the_pipeline_does_not_take_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"33 x 33 pixels: .*divisible by 8"):
        find_components(tiny_pipelines.make("sd"), size=(33, 33))
    with pytest.raises(UsageError, match="one size only"):
        load_source(saved("ddpm", tmp_path), size=(24, 24))


def test_a_pipeline_whose_parts_do_not_fit_is_one_line() -> None:
    pipeline = tiny_pipelines.make("sd")
    pipeline.unet = tiny_pipelines.condition_unet(cross_attention_dim=24)
    with pytest.raises(UsageError, match=r"StableDiffusionPipeline cannot be called: .*shapes"):
        find_components(pipeline, size=(32, 32))


def test_a_checkpoint_that_lacks_one_weight_says_so(tmp_path: Path) -> None:
    checkpoint = saved("ddpm", tmp_path)
    (path,) = (checkpoint / "unet").glob("*.safetensors")
    weights = load_file(path)
    weights.pop("conv_out.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"ddpm/unet: its files lack conv_out\.weight"):
        load_source(checkpoint)


def test_a_value_under_two_names_leaves_a_graph_once() -> None:
    first, last = torch.ones(2, 3), torch.zeros(2, 3)
    tensors: dict[str, torch.Tensor] = {}
    answer = {"last_hidden_state": last, "hidden_states": (first, last)}
    template = template_of(answer, "output", tensors, once=True)
    assert list(tensors) == ["output.last_hidden_state", "output.hidden_states.0"]
    back = rebuild(template, tensors)
    assert back["hidden_states"][1] is back["last_hidden_state"] is last
    twice: dict[str, torch.Tensor] = {}  # two inputs that are alike now need not be so later
    template_of({"a": last, "b": last}, "input", twice)
    assert list(twice) == ["input.a", "input.b"]


def test_a_checkpoint_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    checkpoint = saved("ddpm", tmp_path)
    index = checkpoint / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "NoSuchPipeline"))
    with pytest.raises((ExportError, UsageError), match="cannot be loaded"):
        load_source(checkpoint)
