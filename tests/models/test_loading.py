"""Directories and hub ids are loaded whole, from what is there, or refused in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hub_cache
import tiny_pipelines
from modelops.base.errors import MissingExtraError, MissingWeightsError, ModelopsError, UsageError
from modelops.base.files import read_json, sha256_tree
from modelops.export.source import load_source
from modelops.models.encoders import load_text_encoder, minilm_directory
from modelops.models.hub import parse_hub_id
from modelops.models.pipelines.load import find_variant
from modelops.models.pretrained import no_code_offered
from modelops.models.request import ImageRequest
from modelops.models.sources import load_checkpoint, open_checkpoint

REQUEST = ImageRequest(prompt="red heart", seed=3, steps=2, guidance=3.0, height=32, width=32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loading") / "sd"
    tiny_pipelines.make("sd").save_pretrained(directory)
    return directory


@pytest.fixture
def sd(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "sd"))


@pytest.fixture
def hub(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of some/model in a cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return hub_cache.link_into_cache(sd, tmp_path / "hub")


def image(source: str | Path) -> np.ndarray:
    return open_checkpoint(source).generate([REQUEST])[0]


def test_a_snapshot_of_links_is_the_model(sd: Path, hub: Path) -> None:
    assert np.array_equal(image(hub), image(sd))
    assert load_source(hub).sha256 == sha256_tree(sd)


@pytest.mark.parametrize("revision", ["", f"@{hub_cache.REVISION}", "@main"])
def test_a_hub_id_is_said_and_its_bytes_are_recorded(
    sd: Path, hub: Path, revision: str, caplog: pytest.LogCaptureFixture
) -> None:
    info = open_checkpoint(f"some/model{revision}").info
    assert info.sha256 == sha256_tree(sd)
    assert info.details == {"revision": hub_cache.REVISION}
    assert "taken from the Hugging Face hub" in caplog.text
    assert load_source(f"some/model{revision}").sha256 == info.sha256


@pytest.mark.parametrize(
    "name",
    ["./some/model", "/some/model", "some/model/sub", "~/model", "model", "some//model", "some/",
     "some\\model", "some/model@", "some/weights.safetensors", "../model", "-x/y", "sömé/model"],
)  # fmt: skip
def test_what_is_no_hub_id_is_not_asked_for(
    name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        open_checkpoint(name)
    assert not caplog.records


def test_a_path_that_begins_with_a_folder_here_is_no_hub_id(hub: Path) -> None:
    Path("runs/pilot").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no such directory, though runs/ is here"):
        open_checkpoint("runs/pilott")
    Path("some").mkdir()
    assert parse_hub_id("some/model") == ("some/model", None)  # for the cache has it


def test_what_the_hub_does_not_give_is_one_line(hub: Path) -> None:
    for load in (open_checkpoint, load_source, load_text_encoder):
        with pytest.raises(MissingWeightsError, match="the hub did not give it"):
            load("nobody/nothing")
    (hub.parents[3] / "m.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="a file, not a directory") as caught:
        open_checkpoint("m.safetensors")
    assert "from_single_file" in str(caught.value)


def as_variant(directory: Path, variant: str, *parts: str) -> None:
    for part in parts:
        for path in (directory / part).glob("*.safetensors"):
            half = {name: value.half() for name, value in load_file(path).items()}
            path.unlink()
            save_file(half, path.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("unet",), ("text_encoder",)])
def test_weights_that_are_there_as_a_variant_alone_are_loaded_and_said(
    sd: Path, parts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    as_variant(sd, "fp16", *parts)
    source = open_checkpoint(sd)
    assert source.info.details == {"variant": "fp16"} and source.info.precision == "float32"
    assert "variant fp16" in caplog.text
    for part in ("unet", "vae", "text_encoder"):
        for path in (sd / part).glob("*.safetensors"):
            have = getattr(source.pipeline, part).state_dict()
            for name, value in load_file(path).items():
                assert torch.equal(have[name], value.float())


def test_plain_weights_come_before_a_variant(sd: Path) -> None:
    shutil.copytree(sd, sd.parent / "half")
    as_variant(sd.parent / "half", "fp16", "unet", "vae")
    for part in ("unet", "vae"):
        shutil.copy(next((sd.parent / "half" / part).glob("*.fp16.safetensors")), sd / part)
    assert find_variant(sd) is None
    assert open_checkpoint(sd).info.details == {}


def test_different_variants_alone_are_refused_by_name(sd: Path) -> None:
    as_variant(sd, "fp16", "unet")
    as_variant(sd, "bf16", "vae")
    with pytest.raises(UsageError, match=r"unet/diffusion_pytorch_model\.fp16\.safetensors, vae/"):
        open_checkpoint(sd)


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"], "fp16"),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["diffusion_pytorch_model.fp16.bin"], "fp16"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], None),
        (["model.safetensors", "model.fp16.safetensors", "model.non_ema.safetensors"], None),
        (["model.fp16.safetensors", "openvino_model.bin", "README"], "fp16"),
        (["tokenizer.json"], None),
    ],
)
def test_variants_by_the_names_of_files(
    tmp_path: Path, names: list[str], variant: str | None
) -> None:
    (tmp_path / "part").mkdir()
    for name in names:
        (tmp_path / "part" / name).write_bytes(b"")
    assert find_variant(tmp_path) == variant


def change(path: Path, edit: Callable[[dict], None]) -> None:
    content = read_json(path)
    edit(content)
    path.write_text(json.dumps(content))


def without_torchsde(directory: Path) -> None:
    change(
        directory / "model_index.json",
        lambda index: index.update(scheduler=["diffusers", "DPMSolverSDEScheduler"]),
    )


def with_bitsandbytes(directory: Path) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change(
        directory / "unet/config.json", lambda config: config.update(quantization_config=quantised)
    )


@pytest.mark.parametrize(
    ("package", "spoil"), [("torchsde", without_torchsde), ("bitsandbytes", with_bitsandbytes)]
)
def test_a_missing_package_is_named(sd: Path, package: str, spoil: Callable[[Path], None]) -> None:
    spoil(sd)
    with pytest.raises(MissingExtraError) as caught:
        open_checkpoint(sd)
    assert caught.value.message == f"{sd} needs the package {package}, which is not installed"
    assert caught.value.hint == f"pip install {package}"


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_network_without_some_of_its_weights_is_refused(sd: Path, part: str) -> None:
    path = next((sd / part).glob("*.safetensors"))
    weights = load_file(path)
    first = sorted(weights)[3]
    del weights[first]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"{part}: its files lack {first}"):
        open_checkpoint(sd)


def hostile(folder: Path, kind: str) -> None:
    """Put code into a folder that transformers would offer to run."""
    (folder / "evil.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\n")
    name = "tokenizer_config.json" if kind == "AutoTokenizer" else "config.json"
    change(
        folder / name,
        lambda config: config.update(
            auto_map={kind: ["evil.Evil"] * 2 if kind == "AutoTokenizer" else "evil.Evil"},
            tokenizer_class="Evil", model_type="evil",
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("part", "kind"), [("tokenizer", "AutoTokenizer"), ("text_encoder", "AutoModel")]
)
def test_code_of_a_directory_is_neither_run_nor_offered(
    sd: Path, part: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: sys.exit("asked on the terminal"))
    hostile(sd / part, kind)
    change(sd / "model_index.json", lambda index: index.update({part: ["transformers", kind]}))
    with pytest.raises(ModelopsError):
        load_checkpoint(sd)
    assert not (sd / part / "was_run").exists()


@pytest.mark.parametrize("kind", ["AutoTokenizer", "AutoModel"])
def test_code_of_a_text_encoder_is_neither_run_nor_offered(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: sys.exit("asked on the terminal"))
    encoder = Path(shutil.copytree(minilm_directory(), tmp_path / "encoder"))
    hostile(encoder, kind)
    with contextlib.suppress(MissingWeightsError):
        load_text_encoder(encoder)
    assert not (encoder / "was_run").exists()


def test_code_of_an_open_clip_directory_is_neither_run_nor_offered(
    sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip.tokenizer import HFTokenizer

    monkeypatch.setattr("builtins.input", lambda *_: sys.exit("asked on the terminal"))
    folder = sd / "tokenizer"
    (folder / "tokenizer.json").unlink()
    hostile(folder, "AutoTokenizer")
    with pytest.raises(ValueError, match="custom code"), no_code_offered():
        HFTokenizer(str(folder))
    assert not (folder / "was_run").exists()


def test_a_network_with_an_adapter_in_it_is_named(sd: Path) -> None:
    """The names that `save_pretrained` writes while a LoRA is live."""
    for path in (sd / "unet").glob("*.safetensors"):
        weights = load_file(path)
        old, new = "to_q.weight", "to_q.base_layer.weight"
        renamed = {key.replace(old, new): value for key, value in weights.items()}
        save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="saved with a LoRA adapter in it") as caught:
        open_checkpoint(sd)
    assert "unload_lora_weights" in str(caught.value.hint)
