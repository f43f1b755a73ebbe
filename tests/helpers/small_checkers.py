"""A small image classifier of the real class, saved in the real format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = 32


def save_classifier(directory: Path, labels: tuple[str, ...], **config: Any) -> Path:
    """A ViTForImageClassification with random weights and its ViTImageProcessor."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=SIZE, patch_size=8, id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            initializer_range=0.5, **config,
        )
    )  # fmt: skip
    model.save_pretrained(directory)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(directory)
    return directory
