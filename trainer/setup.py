"""Setup of a run before the training: its images, captions and networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelops.base.seeding import derive_seed
from modelops.models.encoders import load_text_encoder
from modelops.models.networks import make_unet
from modelops.records.train import CaptionLengths
from modelops.training.config import TrainConfig

from .batches import Batch, TrainingBatches, fixed_batch
from .early import spread
from .grids import grid_prompts
from .pictures import Pictures, load_pictures
from .texts import TextTable, measure_captions


@dataclass(frozen=True, slots=True)
class Material:
    """Data that a run is trained and judged on.

    Attributes:
        pictures: the splits.
        batches: of the training split.
        probe, held_out: fixed batches of the training and the validation split; the second is None
            without one.
        prompts: of the sample grids.
        tokenizer, text_encoder: frozen.
        text_dim: width of a caption's embedding.
        encoder_sha256: digest of the text encoder's weights and vocabulary.
        captions: their lengths.
    """

    pictures: Pictures
    batches: TrainingBatches
    probe: Batch
    held_out: Batch | None
    prompts: list[str]
    tokenizer: Any
    text_encoder: Any
    text_dim: int
    encoder_sha256: str
    captions: CaptionLengths


def load_material(
    config: TrainConfig,
    root: Path,
    run_dir: Path,
    *,
    effective_batch: int,
    main_process_first: Callable[[], Any],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Material:
    """Read the images and embed their captions.

    Args:
        root: the folder that the config's paths are relative to.
        run_dir: keeps the embeddings.
        effective_batch: samples per step over all processes.
        main_process_first: a context in which the others wait for the main process.
        say: gets remarks on what is done.
        warn: gets what a person should know before the first step.

    Raises:
        UsageError: a file is missing or does not fit.
        TrainingError: no image is left to train on.
    """
    say("reading images")
    pictures = load_pictures(config, root)
    train, validation = pictures.train, pictures.validation
    if pictures.warning:
        warn(pictures.warning)
    tokenizer, text_encoder = load_text_encoder(config.model.text_encoder)
    for weight in text_encoder.parameters():  # else it is mapped to a file that others may change
        weight.data = weight.data.clone()
    captions = measure_captions(
        {
            name: text
            for split in (train, *([validation] if validation else []))
            for name, text in zip(split.ids, split.captions, strict=True)
        },
        tokenizer,
    )
    if captions.warning:
        warn(captions.warning)
    say(f"{len(train)} images to train on; embedding captions")
    with main_process_first():
        texts = TextTable(
            [*train.captions, *(validation.captions if validation else [])],
            tokenizer,
            text_encoder,
            keep_tokens=config.model.cross_attention,
            cache=run_dir / "text_embeddings.safetensors",
        )
    limit = config.training.validation_samples
    held_out = None
    if validation is not None:
        chosen = validation.subset(spread(len(validation), limit))
        held_out = fixed_batch(chosen, texts, config, "validation")
    return Material(
        pictures=pictures,
        batches=TrainingBatches(train, texts, config, effective_batch),
        probe=fixed_batch(train.subset(spread(len(train), limit)), texts, config, "probe"),
        held_out=held_out,
        prompts=grid_prompts(config, pictures),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        text_dim=texts.dim,
        encoder_sha256=texts.encoder_sha256,
        captions=captions,
    )


def make_network(config: TrainConfig, text_dim: int) -> torch.nn.Module:
    """The network of a config with its first weights, a function of the seed."""
    model = config.model
    torch.manual_seed(derive_seed(config.training.seed, "initial_weights"))
    network: Any = make_unet(
        resolution=model.resolution,
        patch_size=model.patch,
        channels=model.channels,
        multipliers=model.multipliers,
        layers_per_block=model.layers_per_block,
        attention_levels=model.attention_levels or (),
        cross_attention=model.cross_attention,
        text_dim=text_dim,
    )
    torch.nn.init.zeros_(network.conv_out.weight)  # the first prediction is 0 everywhere
    torch.nn.init.zeros_(network.conv_out.bias)
    if config.training.channels_last:
        network = network.to(memory_format=torch.channels_last)
    made: torch.nn.Module = network
    return made
