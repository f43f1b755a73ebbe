"""Families of two networks in a row, a prior and a decoder, and their relatives."""

from __future__ import annotations

from typing import Any

import torch

from tiny_pipelines import clip_text, make_tokenizer, t5_text
from zoo.family import Family
from zoo.unets import louder


def movq() -> Any:
    """A decoder of four levels whose norms look at the latents; they want 32 channels or more."""
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(32,) * 4, latent_channels=4, norm_num_groups=4,
        norm_type="spatial", num_vq_embeddings=16, vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    return louder(model, part="decoder.conv_out", times=3.0)


def image_unet() -> Any:
    """The decoder of Kandinsky 2.2: a picture's embedding in, noise and its variance out."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=8, cross_attention_dim=32,
        addition_embed_type="image", encoder_hid_dim=32, encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def decoder_steps() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012,
        variance_type="learned_range", clip_sample=True, clip_sample_range=2.0,
    )  # fmt: skip


def kandinsky_2_decoder() -> Any:
    """Kandinsky 2.2 without its prior: a call must be given embeddings of a picture."""
    from diffusers import KandinskyV22Pipeline

    return KandinskyV22Pipeline(unet=image_unet(), scheduler=decoder_steps(), movq=movq())


def image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=37, projection_dim=32, num_hidden_layers=2,
            num_attention_heads=4, image_size=32, patch_size=16,
        )
    )  # fmt: skip


def kandinsky_2() -> Any:
    """Kandinsky 2.2: 25 steps of the prior by default, then 100 of the decoder."""
    from diffusers import KandinskyV22CombinedPipeline, PriorTransformer, UnCLIPScheduler
    from transformers import CLIPImageProcessor

    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=32,
        num_embeddings=16,
    )  # fmt: skip
    torch.nn.init.ones_(prior.clip_std)  # both are zero at first, and then so is all it says
    torch.nn.init.normal_(prior.clip_mean, std=0.1)
    side = {"height": 32, "width": 32}
    return KandinskyV22CombinedPipeline(
        unet=image_unet(), scheduler=decoder_steps(), movq=movq(), prior_prior=prior,
        prior_image_encoder=image_encoder(), prior_text_encoder=clip_text(projection=True),
        prior_tokenizer=make_tokenizer(length=16, pad="</s>"),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True,
            clip_sample_range=10.0,
        ),
        prior_image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side),
    )  # fmt: skip


def kandinsky_3() -> Any:
    """Kandinsky 3: 128 tokens of T5, cut after the longest prompt of the call."""
    from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet

    unet = Kandinsky3UNet(
        time_embedding_dim=32, groups=2, attention_head_dim=8, layers_per_block=2,
        block_out_channels=(16, 32), cross_attention_dim=32, encoder_hid_dim=32,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="squaredcos_cap_v2",
        clip_sample=True, thresholding=False,
    )  # fmt: skip
    return Kandinsky3Pipeline(
        tokenizer=make_tokenizer(length=128), text_encoder=t5_text().eval(), unet=unet,
        scheduler=scheduler, movq=movq(),
    )  # fmt: skip


FAMILIES: tuple[Family, ...] = (
    Family("Kandinsky 2.2", kandinsky_2, size=(64, 64), other=(128, 64)),
    # what it is given stands for an image: two tensors, image_embeds and negative_image_embeds
    Family(
        "Kandinsky 2.2 (decoder)", kandinsky_2_decoder, size=(64, 64), other=(128, 64),
        kind="image", refused="wants image_embeds",
    ),
    Family("Kandinsky 3", kandinsky_3, size=(64, 64), other=(128, 64)),
)  # fmt: skip
