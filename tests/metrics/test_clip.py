"""CLIPScore against the paper's formula, and torchmetrics on the same weights as a HF CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from modelops.base.errors import MissingWeightsError
from modelops.metrics.clip import (
    PREFIX,
    ClipModel,
    clipscores,
    torchmetrics_clip_scores,
)

NAME = "modelops-test-clip"
CONFIG = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PROMPTS = [
    "red heart",
    "flag: Christmas Island",
    "woman astronaut: dark skin tone",
    "It's 3 o'clock",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClipModel]:
    """A small randomly initialised CLIP as a state dict, and that read back."""
    root = tmp_path_factory.mktemp("clip")
    (root / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(root / f"{NAME}.json")
    torch.manual_seed(1)
    model = open_clip.create_model(NAME)
    with torch.no_grad():  # the initialisation makes all images and texts alike
        model.token_embedding.weight.mul_(20)
        model.visual.conv1.weight.mul_(3)
    path = root / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path, ClipModel(path, NAME)


def pictures(side: int = 64) -> list[Any]:
    generator = np.random.default_rng(0)
    shapes = [(side, side), (side, side + 20), (side * 2, side), (side // 2, side // 2)]
    return [
        (generator.integers(0, 64, (*shape, 3)) + generator.integers(0, 192, 3)).astype(np.uint8)
        for shape in shapes
    ]


def test_clipscore_is_the_papers_formula_on_the_same_weights(clip: Any) -> None:
    from PIL import Image

    path, model = clip
    reference, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=str(path))
    tokenizer = open_clip.get_tokenizer(NAME)
    expected = []
    for picture, prompt in zip(pictures(), PROMPTS, strict=True):
        with torch.no_grad():
            image = reference.eval().encode_image(preprocess(Image.fromarray(picture))[None])[0]
            text = reference.encode_text(tokenizer(["A photo depicts " + prompt]))[0]
        cosine = torch.nn.functional.cosine_similarity(image, text, dim=0)
        expected.append(2.5 * max(float(cosine), 0.0))
    made = clipscores(
        model.images_to_embeddings(pictures(), batch=3),
        model.texts_to_embeddings([PREFIX + prompt for prompt in PROMPTS], batch=3),
    )
    assert made == pytest.approx(expected, abs=1e-5)
    assert min(made) == 0 and max(made) > 0.01


def test_the_two_scores_clamp_in_different_places() -> None:
    images = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    texts = np.array([[0.6, 0.8], [-1.0, 0.0]], np.float32)
    assert clipscores(images, texts) == pytest.approx([1.5, 0.0])
    assert torchmetrics_clip_scores(images, texts) == pytest.approx([60.0, -100.0])


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 96])
def test_parity_with_torchmetrics_on_a_converted_model(clip: Any, side: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.multimodal")
    path, model = clip
    hugging = _to_hugging_face(path)
    images = pictures(side)
    ours = torchmetrics_clip_scores(
        model.images_to_embeddings(images), model.texts_to_embeddings(PROMPTS)
    )
    assert ours.min() < 0 < ours.max()
    subsets = ([0], [1], [2], [3], [0, 1], [0, 1, 2, 3])
    for rows in subsets:
        theirs = functional.clip_score(
            [torch.from_numpy(images[row]).permute(2, 0, 1) for row in rows],
            [PROMPTS[row] for row in rows],
            lambda: hugging,
        )
        assert max(0.0, float(ours[rows].mean())) == pytest.approx(float(theirs), abs=1e-4), rows


def test_siglip_is_known_and_gets_its_own_preprocessing(tmp_path: Path) -> None:
    from modelops.metrics.clip import _preprocessing

    wanted = _preprocessing("ViT-B-16-SigLIP")
    assert wanted["image_mean"] == (0.5, 0.5, 0.5) and wanted["image_resize_mode"] == "squash"
    directory = tmp_path / "siglip"
    directory.mkdir()
    config = {
        "model_cfg": {**CONFIG, "init_logit_bias": -10.0},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(MissingWeightsError):  # open_clip would go on with random weights
        ClipModel(directory)
    torch.manual_seed(0)
    made = open_clip.CLIP(**config["model_cfg"])  # type: ignore[arg-type]
    save_file(
        {key: value.contiguous() for key, value in made.state_dict().items()},
        directory / "open_clip_model.safetensors",
    )
    model = ClipModel(directory)
    assert model.is_siglip
    assert model.protocol["preprocess"]["resize_mode"] == "squash"
    lengths = np.linalg.norm(model.images_to_embeddings(pictures()), axis=1)
    assert lengths == pytest.approx(np.ones(4), abs=1e-5)


def test_embeddings_do_not_depend_on_the_batch(clip: Any) -> None:
    _, model = clip
    one, all_ = (model.images_to_embeddings(iter(pictures()), batch=n) for n in (1, 32))
    np.testing.assert_allclose(one, all_, atol=1e-6)
    assert not model.is_siglip


def test_long_prompts_are_counted(clip: Any) -> None:
    _, model = clip
    assert model.cut_texts(PROMPTS) == 0
    assert model.cut_texts([*PROMPTS, "a red heart " * 40]) == 1


def test_other_weights_are_refused(clip: Any, tmp_path: Path) -> None:
    path, _ = clip
    with pytest.raises(MissingWeightsError, match="no such file"):
        ClipModel(tmp_path / "none.pt", NAME)
    with pytest.raises(MissingWeightsError, match="does not load"):
        ClipModel(path, "RN50")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(MissingWeightsError, match="not a file of tensors"):
        ClipModel(tmp_path / "text.pt", NAME)


def _to_hugging_face(path: Path) -> tuple[Any, Any]:
    """The same weights as transformers' CLIPModel, with a processor made from open_clip's words."""
    from safetensors.torch import load_file
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    state = load_file(path)
    vision, text = CONFIG["vision_cfg"], CONFIG["text_cfg"]
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64,
              "intermediate_size": 256, "hidden_act": "quick_gelu",
              "projection_dim": 48}  # fmt: skip
    config = CLIPConfig(
        text_config={**common, "vocab_size": text["vocab_size"], "eos_token_id": 49407,
                     "bos_token_id": 49406, "max_position_embeddings": 77},
        vision_config={**common, "image_size": vision["image_size"], "patch_size": 16},
        projection_dim=48,
    )  # fmt: skip
    renamed: dict[str, Any] = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    for part in ("weight", "bias"):
        renamed[f"vision_model.pre_layrnorm.{part}"] = state[f"visual.ln_pre.{part}"]
        renamed[f"vision_model.post_layernorm.{part}"] = state[f"visual.ln_post.{part}"]
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for ours, theirs in (("", "text_model"), ("visual.", "vision_model")):
        for layer in range(2):
            old, new = f"{ours}transformer.resblocks.{layer}", f"{theirs}.encoder.layers.{layer}"
            for part in ("weight", "bias"):
                for a, b in names.items():
                    renamed[f"{new}.{b}.{part}"] = state[f"{old}.{a}.{part}"]
                thirds = state[f"{old}.attn.in_proj_{part}"].chunk(3)
                for letter, third in zip("qkv", thirds, strict=True):
                    renamed[f"{new}.self_attn.{letter}_proj.{part}"] = third
    model = CLIPModel(config)
    found = model.load_state_dict(renamed, strict=False)
    assert not found.unexpected_keys
    assert all("position_ids" in key for key in found.missing_keys)
    words = open_clip.tokenizer.SimpleTokenizer()
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(k, k): v
        for k, v in words.encoder.items()
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(words.bpe_ranks))
    size = CONFIG["vision_cfg"]["image_size"]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return _Tensors(model.eval()), CLIPProcessor(image_processor=images, tokenizer=tokenizer)


class _Tensors(torch.nn.Module):
    """transformers 5 wraps the features that torchmetrics expects bare."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Any) -> Any:
        with torch.no_grad():
            return self._bare(self.model.get_image_features(pixels))

    def get_text_features(self, tokens: Any, mask: Any) -> Any:
        with torch.no_grad():
            return self._bare(self.model.get_text_features(tokens, mask))

    @staticmethod
    def _bare(found: Any) -> Any:
        return found if isinstance(found, torch.Tensor) else found.pooler_output
