"""Small diffusers pipelines with random weights, made from configs: one of each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WORDS = [
    "red",
    "green",
    "blue",
    "heart",
    "face",
    "dog",
    "cat",
    "house",
    "flag",
    "sun",
    "of",
    "a",
    "the",
    "with",
    "and",
]


def make_tokenizer(*, length: int, pad: str = "<pad>") -> Any:
    """A word-level tokenizer of the kind that loads without files from a hub."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token=pad, model_max_length=length,
    )  # fmt: skip


def clip_text(*, width: int = 32, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=width, intermediate_size=37,
        num_attention_heads=4, num_hidden_layers=3, vocab_size=64, max_position_embeddings=16,
        projection_dim=width, hidden_act="gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=width,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def gemma_text() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            head_dim=16,
            hidden_size=8,
            initializer_range=0.02,
            intermediate_size=64,
            max_position_embeddings=512,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=64,
            attn_implementation="eager",
        )
    )


def kl_vae(channels: int = 4, *, quant_conv: bool = True) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, sample_size=32, use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv, shift_factor=0.0 if not quant_conv else None,
    )  # fmt: skip


def condition_unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "in_channels": 4,
        "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32,
        "norm_num_groups": 4, "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**{**options, **changes})


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=kl_vae(), text_encoder=clip_text(), tokenizer=make_tokenizer(length=16),
        unet=condition_unet(), scheduler=ddim(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = condition_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=8 * 6 + 32, cross_attention_dim=64,
        use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=kl_vae(), text_encoder=clip_text(), text_encoder_2=clip_text(projection=True),
        tokenizer=make_tokenizer(length=16), tokenizer_2=make_tokenizer(length=16), unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            timestep_spacing="leading", steps_offset=1,
        ),
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=24,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(quant_conv=False), text_encoder=clip_text(projection=True),
        text_encoder_2=clip_text(projection=True), text_encoder_3=t5_text(),
        tokenizer=make_tokenizer(length=16), tokenizer_2=make_tokenizer(length=16),
        tokenizer_3=make_tokenizer(length=16),
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_vae(quant_conv=False), text_encoder=clip_text(), text_encoder_2=t5_text(),
        tokenizer=make_tokenizer(length=16), tokenizer_2=make_tokenizer(length=16),
    )  # fmt: skip


def pixart() -> Any:
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        transformer=transformer, vae=kl_vae(), scheduler=ddim(), text_encoder=t5_text(),
        tokenizer=make_tokenizer(length=16),
    )  # fmt: skip


def sana() -> Any:
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=8, sample_size=32,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return SanaPipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=gemma_text(), tokenizer=make_tokenizer(length=300),
    )  # fmt: skip


def prx_transformer(**changes: Any) -> Any:
    from diffusers import PRXTransformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4, "patch_size": 2, "context_in_dim": 8, "hidden_size": 16,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "axes_dim": [4, 4],
    }  # fmt: skip
    return PRXTransformer2DModel(**{**options, **changes})


def prx() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline

    return PRXPipeline(
        transformer=prx_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=gemma_text(), tokenizer=make_tokenizer(length=16),
        vae=kl_vae(quant_conv=False),
        default_sample_size=32,
    )  # fmt: skip


def prx_pixel() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline

    transformer = prx_transformer(
        in_channels=3, patch_size=8, bottleneck_size=12, resolution_embeds=True
    )
    return PRXPixelPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=gemma_text(), tokenizer=make_tokenizer(length=16), default_sample_size=32,
        prompt_max_tokens=16,
    )  # fmt: skip


def ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16,
        in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def controlnet() -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    plain = stable_diffusion()
    extra = ControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        conditioning_embedding_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    for name, value in extra.named_parameters():  # a fresh one adds nothing: its ends are zero
        if "controlnet_" in name:
            torch.nn.init.normal_(value, std=0.05)
    return StableDiffusionControlNetPipeline(
        vae=plain.vae, text_encoder=plain.text_encoder, tokenizer=plain.tokenizer, unet=plain.unet,
        controlnet=extra, scheduler=plain.scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "prx": prx,
    "prx_pixel": prx_pixel,
    "ddpm": ddpm,
    "controlnet": controlnet,
}


def make(family: str) -> Any:
    """A tiny pipeline of a family, the same one every time, without dropout."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline
