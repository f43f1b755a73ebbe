"""A network's role follows from its inputs: a denoiser is told the step, the others are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_pipelines
from modelops.export.components import find_components


def prior() -> Any:
    from diffusers import PriorTransformer

    return PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1,
        num_embeddings=16, additional_embeddings=4,
    )  # fmt: skip


def unclip_scheduler(**options: Any) -> Any:
    from diffusers import UnCLIPScheduler

    return UnCLIPScheduler(num_train_timesteps=100, **options)


def unclip() -> Any:
    from diffusers import UnCLIPPipeline, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    blocks: dict[str, Any] = {
        "layers_per_block": 1, "block_out_channels": (32, 64), "resnet_time_scale_shift":
        "scale_shift", "attention_head_dim": 8, "norm_num_groups": 32,
    }  # fmt: skip
    decoder = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, class_embed_type="identity",
        cross_attention_dim=32, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), **blocks,
    )  # fmt: skip
    upscaler = {
        "sample_size": 32, "in_channels": 6, "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2, **blocks,
    }  # fmt: skip
    return UnCLIPPipeline(
        prior=prior(), decoder=decoder, text_encoder=tiny_pipelines.clip_text(projection=True),
        tokenizer=tiny_pipelines.make_tokenizer(length=16),
        text_proj=UnCLIPTextProjModel(
            clip_embeddings_dim=32, time_embed_dim=128, cross_attention_dim=32,
            clip_extra_context_tokens=2,
        ),
        super_res_first=UNet2DModel(**upscaler), super_res_last=UNet2DModel(**upscaler),
        prior_scheduler=unclip_scheduler(variance_type="fixed_small_log", prediction_type="sample"),
        decoder_scheduler=unclip_scheduler(variance_type="learned_range"),
        super_res_scheduler=unclip_scheduler(variance_type="fixed_small_log"),
    )  # fmt: skip


def kandinsky() -> Any:
    from diffusers import (
        DDPMScheduler,
        KandinskyV22CombinedPipeline,
        UNet2DConditionModel,
        VQModel,
    )
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    unet = UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", cross_attention_dim=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(32, 64),
        layers_per_block=1, encoder_hid_dim=32, encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift", class_embed_type=None, attention_head_dim=8,
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2, in_channels=3,
        latent_channels=4, layers_per_block=1, norm_num_groups=8, norm_type="spatial",
        num_vq_embeddings=12, out_channels=3, up_block_types=["AttnUpDecoderBlock2D"] * 2,
        vq_embed_dim=4,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, image_size=32, projection_dim=32, intermediate_size=37,
        num_attention_heads=4, num_hidden_layers=1, patch_size=16,
    )  # fmt: skip
    return KandinskyV22CombinedPipeline(
        unet=unet, scheduler=DDPMScheduler(variance_type="learned_range"), movq=movq,
        prior_prior=prior(), prior_image_encoder=CLIPVisionModelWithProjection(vision),
        prior_text_encoder=tiny_pipelines.clip_text(projection=True),
        prior_tokenizer=tiny_pipelines.make_tokenizer(length=16),
        prior_scheduler=unclip_scheduler(
            prediction_type="sample", variance_type="fixed_small_log", clip_sample=True
        ),
        prior_image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip


@pytest.mark.slow
def test_networks_that_run_once_on_numbers_are_no_denoisers() -> None:
    torch.manual_seed(0)
    roles = {c.name: c.role for c in find_components(kandinsky(), size=(32, 32))}
    assert roles["unet"] == roles["prior_prior"] == "denoiser"
    assert roles["prior_image_encoder"] == "encoder"
    assert roles["prior_text_encoder"] == "text_encoder"


def test_a_projection_of_text_is_no_denoiser() -> None:
    torch.manual_seed(0)
    roles = {c.name: c.role for c in find_components(unclip())}
    assert roles["text_proj"] == "encoder"
    assert roles["prior"] == roles["decoder"] == roles["super_res_first"] == "denoiser"
