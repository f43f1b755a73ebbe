"""LiT-style image-text alignment model (Zhai et al., 2022), an ordinary open_clip checkpoint.

open_clip's CustomTextCLIP with a timm EfficientNet-Lite0 image tower and a Hugging Face MiniLM text
tower, both frozen as their packages ship them; only open_clip's own projection heads are fitted.
The directory holds `open_clip_config.json`, `open_clip_model.safetensors`, and the text tower's
`config.json` and tokenizer. open_clip loads it offline, with modelops not installed, by

    model, preprocess = open_clip.create_model_from_pretrained(
        "local-dir:models/lit", text_cfg={**text_cfg, "hf_model_name": "models/lit"})

with `text_cfg` from its `open_clip_config.json`; where the hub (or its cache) can be reached the
`text_cfg` argument is not needed, because the config names the tower by its hub id.

Two definitions differ from open_clip's own transforms: images are resized in float without rounding
to bytes (`Lite0`), so that the features of every other metric are shared; and a trained rival such
as CLIP is far better at this. Held-out retrieval rates belong beside every score.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from modelops.base.errors import IntegrityError, MissingWeightsError, UsageError
from modelops.base.files import read_json, sha256_file
from modelops.base.seeding import derive_seed
from modelops.models.encoders import (
    LITE0_SIZE,
    MINILM_DIM,
    encode_by_length,
    load_lite0_body,
    load_text_encoder,
    minilm_directory,
)
from modelops.models.pretrained import no_code_offered

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
              "special_tokens_map.json")  # fmt: skip
FILES = (*TEXT_FILES, WEIGHTS, CONFIG)
CONTEXT_LENGTH = 32
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """Settings of the heads and of their fit.

    Attributes:
        embed_dim: width of the shared space.
        image_head, text_head: open_clip's projections, "linear" or "mlp".
        dropout: on the tower features, while fitting.
        temperature: fixed, of the contrastive loss.
        epochs, batch_size, learning_rate, weight_decay: AdamW with a cosine schedule.
    """

    embed_dim: int = 256
    image_head: str = "linear"
    text_head: str = "linear"
    dropout: float = 0.3
    temperature: float = 0.07
    epochs: int = 40
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.1


CANDIDATES = (
    HeadSettings(),
    HeadSettings(image_head="mlp", text_head="mlp"),
)


@dataclass(frozen=True, slots=True)
class TowerFeatures:
    """Frozen tower outputs of N image-caption pairs."""

    images: Floats  # [N, 1280]
    texts: Floats  # [N, 384], mean-pooled, not normalised


class LitModel:
    """An open_clip model with its tokenizer; embeddings have unit length, float32.

    Attributes:
        sha256: digest of the weights file.
    """

    def __init__(self, model: Any, tokenizer: Any, sha256: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.sha256 = sha256

    @property
    def embed_dim(self) -> int:
        return int(self.model.text.output_dim)

    @torch.no_grad()
    def features_to_embeddings(self, features: Floats) -> Floats:
        """Lite0 features [N, 1280] to image embeddings [N, E]; the tower need not run again."""
        return _embed(self.model.visual.head, features)

    @torch.no_grad()
    def images_to_embeddings(
        self, images: Sequence[npt.NDArray[np.uint8]], *, batch_size: int = 64
    ) -> Floats:
        """Images [H, W, 3] uint8 RGB, of any sizes, to embeddings [N, E]."""
        found = []
        for start in range(0, len(images), batch_size):
            batch = torch.cat([_pixels(image) for image in images[start : start + batch_size]])
            found.append(self.model.encode_image(batch, normalize=True).numpy())
        return np.concatenate(found) if found else np.zeros((0, self.embed_dim), np.float32)

    @torch.no_grad()
    def texts_to_embeddings(self, texts: Sequence[str], *, batch_size: int = 256) -> Floats:
        """Texts to embeddings [N, E]."""
        found = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size]))
            found.append(self.model.encode_text(tokens, normalize=True).numpy())
        return np.concatenate(found) if found else np.zeros((0, self.embed_dim), np.float32)


def texts_to_tower_features(texts: Sequence[str]) -> Floats:
    """Texts to what the text tower gives its head: mean-pooled hidden states [N, 384]."""
    tokenizer, model = load_text_encoder()
    found = np.zeros((len(texts), MINILM_DIM), np.float32)
    plain = [" ".join(text.split()) for text in texts]
    for rows, hidden in encode_by_length(plain, tokenizer, model, max_tokens=CONTEXT_LENGTH):
        found[rows] = hidden.mean(1).numpy()
    return found


def fit_heads(
    train: TowerFeatures,
    settings: HeadSettings,
    *,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Fit (image head, text head) by the symmetric contrastive loss on cached tower features.

    Raises:
        UsageError: fewer than two pairs.
    """
    n = len(train.images)
    if n < 2:
        raise UsageError(f"{n} training pairs are too few to fit an alignment model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lit-heads"))
        image_head, text_head = _make_heads(settings)
        return _train_heads(image_head, text_head, train, settings, on_progress)


def _train_heads(
    image_head: torch.nn.Module,
    text_head: torch.nn.Module,
    train: TowerFeatures,
    settings: HeadSettings,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    images, texts = torch.from_numpy(train.images), torch.from_numpy(train.texts)
    parameters = [*image_head.parameters(), *text_head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches = max(1, len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    for epoch in range(settings.epochs):
        for rows in torch.randperm(len(images)).tensor_split(batches):
            x = F.dropout(images[rows], settings.dropout)
            y = F.dropout(texts[rows], settings.dropout)
            a = F.normalize(image_head(x), dim=-1)
            b = F.normalize(text_head(y), dim=-1)
            logits = a @ b.T / settings.temperature
            target = torch.arange(len(rows))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if on_progress:
            on_progress(epoch + 1, settings.epochs)
    return image_head.eval(), text_head.eval()


def retrieval_ranks(
    image_head: torch.nn.Module,
    text_head: torch.nn.Module,
    pairs: TowerFeatures,
) -> npt.NDArray[np.int64]:
    """Rank of each image's own caption among all N captions of the pairs, 0 being the best.

    Captions that are equal have equal embeddings; ties with the own caption do not count.
    """
    similarity = _embed(image_head, pairs.images) @ _embed(text_head, pairs.texts).T
    own = np.diagonal(similarity)[:, None]
    return np.asarray((similarity > own + 1e-6).sum(axis=1), np.int64)


def save_lit(
    directory: Path,
    image_head: torch.nn.Module,
    text_head: torch.nn.Module,
    settings: HeadSettings,
) -> None:
    """Write an open_clip checkpoint into an existing, empty directory."""
    from safetensors.torch import save

    config = _model_config(settings, HUB_ID)
    source = minilm_directory()
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    model = _build_model({**config, "text_cfg": {**config["text_cfg"],
                                                 "hf_model_name": str(directory)}})  # fmt: skip
    model.visual.trunk.load_state_dict(_trunk_state(load_lite0_body()))
    model.text.transformer.load_state_dict(_text_state(model), strict=True)
    model.visual.head.load_state_dict(image_head.state_dict())
    model.text.proj.load_state_dict(text_head.state_dict())
    with torch.no_grad():
        model.logit_scale.fill_(float(np.log(1.0 / settings.temperature)))
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    (directory / WEIGHTS).write_bytes(save(state))
    preprocess = {
        "size": [LITE0_SIZE, LITE0_SIZE], "mode": "RGB",
        "mean": [127 / 255] * 3, "std": [128 / 255] * 3,
        "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0,
    }  # fmt: skip
    document = {"model_cfg": config, "preprocess_cfg": preprocess}
    (directory / CONFIG).write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def load_lit(directory: str | Path) -> LitModel:
    """Load a checkpoint directory that `save_lit` wrote, through open_clip, offline.

    Raises:
        MissingWeightsError: the directory or one of its files is not there.
        IntegrityError: the weights do not fit the config.
    """
    import open_clip
    from safetensors import SafetensorError

    root = Path(directory)
    for name in (CONFIG, WEIGHTS, "config.json"):
        if not (root / name).is_file():
            raise MissingWeightsError(
                f"{root / name}: not found", hint="fit an alignment model, or leave out --lit"
            )
    document = read_json(root / CONFIG)
    try:
        text_cfg = {**document["model_cfg"]["text_cfg"], "hf_model_name": str(root)}
        with no_code_offered():
            model = open_clip.create_model(f"local-dir:{root}", text_cfg={
                **text_cfg, "hf_model_pretrained": False,
            })  # fmt: skip
            tokenizer = open_clip.get_tokenizer(f"local-dir:{root}")
    except (KeyError, RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(f"{root}: open_clip cannot load it: {reason}") from error
    return LitModel(model, tokenizer, sha256_file(root / WEIGHTS))


def settings_as_dict(settings: HeadSettings) -> dict[str, Any]:
    """The settings as plain values, for a record."""
    return asdict(settings)


def _model_config(settings: HeadSettings, text_tower: str) -> dict[str, Any]:
    return {
        "embed_dim": settings.embed_dim,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": settings.image_head,
            "timm_proj_bias": False,
            "image_size": LITE0_SIZE,
        },
        "text_cfg": {
            "hf_model_name": text_tower,
            "hf_tokenizer_name": HUB_ID,
            "hf_model_pretrained": False,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": settings.text_head,
            "context_length": CONTEXT_LENGTH,
        },
    }


def _build_model(config: dict[str, Any]) -> Any:
    from open_clip.model import CustomTextCLIP

    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    return CustomTextCLIP(**arguments).eval()


def _make_heads(settings: HeadSettings) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The two projection heads exactly as open_clip builds them, without their towers."""
    from collections import OrderedDict

    from timm.layers import Mlp

    width = settings.embed_dim
    layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
    if settings.image_head == "mlp":
        layers["mlp"] = Mlp(1280, 2 * width, width, drop=(0.0, 0.0), bias=(True, False))
    elif settings.image_head == "linear":
        layers["drop"] = torch.nn.Dropout(0.0)
        layers["proj"] = torch.nn.Linear(1280, width, bias=False)
    else:
        raise UsageError(f"image_head {settings.image_head!r}: use linear or mlp")
    if settings.text_head == "mlp":
        hidden = (384 + width) // 2
        text: torch.nn.Module = torch.nn.Sequential(
            torch.nn.Linear(384, hidden, bias=False),
            torch.nn.GELU(),
            torch.nn.Linear(hidden, width, bias=False),
        )
    elif settings.text_head == "linear":
        text = torch.nn.Linear(384, width, bias=False)
    else:
        raise UsageError(f"text_head {settings.text_head!r}: use linear or mlp")
    return torch.nn.Sequential(layers), text


def _trunk_state(body: Any) -> dict[str, torch.Tensor]:
    """Lite0's weights without its classifier, which open_clip's tower does not have."""
    state: dict[str, torch.Tensor] = body.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("classifier.")}


def _text_state(model: Any) -> dict[str, torch.Tensor]:
    """MiniLM's weights under the names of open_clip's text tower, which has no pooler layer."""
    _, encoder = load_text_encoder()
    wanted = model.text.transformer.state_dict()
    return {name: value for name, value in encoder.state_dict().items() if name in wanted}


def _pixels(image: npt.NDArray[np.uint8]) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    size = (LITE0_SIZE, LITE0_SIZE)
    resized = F.interpolate(tensor, size, mode="bicubic", antialias=True)
    return (resized.clamp(0, 255) - 127.0) / 128.0


@torch.no_grad()
def _embed(head: torch.nn.Module, features: Floats) -> Floats:
    embedded: Floats = F.normalize(head(torch.from_numpy(features)), dim=-1).numpy()
    return embedded
