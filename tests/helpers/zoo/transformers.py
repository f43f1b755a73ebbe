"""Families whose denoiser is a transformer: MMDiT, DiT and their kin.

Each has two layers and random weights. What a family is known for is kept as released: its
scheduler, its VAE's factors, how its text is padded, where its guidance goes.
"""

from __future__ import annotations

from typing import Any

import torch

from tiny_pipelines import clip_text, make_tokenizer, t5_text
from zoo.family import Family


def awake(network: Any, *, gain: float = 1.0) -> Any:
    """Make a fresh network say something: most start as the identity, with gates of zero.

    Args:
        network: a denoiser with random weights.
        gain: how much louder its matrices become; where the prompt would hardly be seen.
    """
    with torch.no_grad():
        for value in network.parameters():
            if value.dim() > 1:
                value.mul_(gain) if value.any() else value.normal_(std=0.2)
    return network


def vae(*, levels: int = 2, channels: int = 4, width: int = 8, **changes: Any) -> Any:
    """A VAE that makes pictures 2 ** (levels - 1) times as large as its latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels,
        block_out_channels=(width,) * (levels - 1) + (2 * width,),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1, norm_num_groups=4, **changes,
    )  # fmt: skip


def plain_vae(scale: float, shift: float | None, **changes: Any) -> Any:
    """A VAE of the newer kind: no convolutions around the latents, which may be shifted."""
    return vae(
        scaling_factor=scale, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
        **changes,
    )  # fmt: skip


def deep_vae() -> Any:
    """A deep-compression autoencoder: 32 pixels a latent, as Sana's."""
    from diffusers import AutoencoderDC

    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((),) * 3 + ((5,),) * 3
    return AutoencoderDC(
        in_channels=3, latent_channels=8, attention_head_dim=4, encoder_block_types=kinds,
        decoder_block_types=kinds, encoder_block_out_channels=(4, 4, 8, 8, 8, 8),
        decoder_block_out_channels=(4, 4, 8, 8, 8, 8), encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales, encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6, downsample_block_type="Conv",
        upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip


def flow(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.2,
            attn_implementation="eager",
        )
    )  # fmt: skip


def stable_diffusion_3(**changes: Any) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=24, **changes,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=awake(transformer), vae=plain_vae(1.5305, 0.0609),
        scheduler=flow(shift=3.0), text_encoder=clip_text(projection=True),
        text_encoder_2=clip_text(projection=True), text_encoder_3=t5_text(64),
        tokenizer=make_tokenizer(length=16, pad="</s>"),
        tokenizer_2=make_tokenizer(length=16),
        tokenizer_3=make_tokenizer(length=512),
    )  # fmt: skip


def stable_diffusion_35_medium() -> Any:
    return stable_diffusion_3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux(*, guidance: bool, scheduler: Any) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    return FluxPipeline(
        transformer=awake(transformer, gain=2.0), vae=plain_vae(0.3611, 0.1159),
        scheduler=scheduler, text_encoder=clip_text(), text_encoder_2=t5_text(),
        tokenizer=make_tokenizer(length=16, pad="</s>"),
        tokenizer_2=make_tokenizer(length=512),
    )  # fmt: skip


def shifting() -> Any:
    """Flux's scheduler: how far it shifts depends on the size of the picture."""
    return flow(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip


def flux_dev() -> Any:
    """Flux with its guidance embedded: one evaluation a step at any guidance."""
    return flux(guidance=True, scheduler=shifting())


def flux_schnell() -> Any:
    """Flux that takes a guidance and does nothing with it."""
    return flux(guidance=False, scheduler=flow(shift=1.0))


def flux2_parts(*, guidance: bool) -> dict[str, Any]:
    """The networks of Flux 2. The latents are scaled by running statistics of the VAE's own."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=32, guidance_embeds=guidance,
    )  # fmt: skip
    coder = AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
    )  # fmt: skip
    torch.nn.init.normal_(coder.bn.running_mean, std=0.3)
    torch.nn.init.uniform_(coder.bn.running_var, 0.5, 2.0)
    return {"transformer": awake(transformer, gain=2.0), "vae": coder, "scheduler": shifting()}


def flux2_dev() -> Any:
    """Flux 2 (dev): the pipeline reads layers 10, 20 and 30 of a chat model's hidden states."""
    from diffusers import Flux2Pipeline
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    template = (
        "{% for message in messages %}{{ message['role'] + ' ' }}"
        "{% for part in message['content'] %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    )
    tokenizer = make_tokenizer(length=512)
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]}
    )
    small: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8,
    }  # fmt: skip
    words = {
        **small, "model_type": "mistral", "vocab_size": 64, "num_hidden_layers": 31,
        "num_key_value_heads": 1, "initializer_range": 0.2, "sliding_window": None,
    }  # fmt: skip
    sight = {
        **small, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Mistral3Config(text_config=words, vision_config=sight, image_token_index=19)
    parts = flux2_parts(guidance=True)
    for name, value in parts["transformer"].named_parameters():
        if "norm" in name.split(".")[-2]:  # of queries and keys: sharp, as after training,
            value.data.mul_(4.0)  # to find the prompt's few tokens among 512, most of them padding
    return Flux2Pipeline(
        **parts,
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=PixtralProcessor(
            image_processor=PixtralImageProcessor(), tokenizer=tokenizer,
            chat_template=template,
        ),
    )  # fmt: skip


def flux2_klein(*, distilled: bool) -> Any:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer(length=512)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=28,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.2,
        )
    )  # fmt: skip
    return Flux2KleinPipeline(
        **flux2_parts(guidance=False), text_encoder=text, tokenizer=tokenizer,
        is_distilled=distilled,
    )  # fmt: skip


def flux2_klein_distilled() -> Any:
    """Flux 2 (klein): a guidance is taken and ignored, as the folder says that it is distilled."""
    return flux2_klein(distilled=True)


def flux2_klein_base() -> Any:
    """Flux 2 (klein base): true guidance, two evaluations a step, and no negative prompt."""
    return flux2_klein(distilled=False)


def aura_flow() -> Any:
    """AuraFlow: a table of 64 x 64 learned positions, just enough for the default 1024 pixels."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
    from transformers import UMT5Config, UMT5EncoderModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=4096,
    )  # fmt: skip
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    return AuraFlowPipeline(
        transformer=awake(transformer, gain=3.0), scheduler=flow(shift=1.73), text_encoder=text,
        vae=vae(levels=4, scaling_factor=0.13025, mid_block_add_attention=False),
        tokenizer=make_tokenizer(length=256),
    )  # fmt: skip


def cogview3_plus() -> Any:
    """CogView3+: zeros stand for a negative prompt that is not given."""
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogView3PlusPipeline,
        CogView3PlusTransformer2DModel,
    )

    transformer = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, text_embed_dim=32, time_embed_dim=32, condition_dim=8,
        pos_embed_max_size=16, sample_size=16,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0,
        timestep_spacing="trailing",
    )  # fmt: skip
    return CogView3PlusPipeline(
        transformer=awake(transformer), scheduler=scheduler, text_encoder=t5_text(),
        vae=vae(scaling_factor=0.7), tokenizer=make_tokenizer(length=224),
    )  # fmt: skip


def cogview4() -> Any:
    """CogView4: text is padded on the left, to the longest of the call and then to 16 tokens."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, text_embed_dim=32, time_embed_dim=32, condition_dim=8,
        sample_size=16, pos_embed_max_size=16,
    )  # fmt: skip
    text = GlmModel(
        GlmConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
            initializer_range=0.2,
        )
    )  # fmt: skip
    tokenizer = make_tokenizer(length=1024)
    tokenizer.padding_side = "left"
    scheduler = flow(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256,
        time_shift_type="linear",
    )  # fmt: skip
    return CogView4Pipeline(
        transformer=awake(transformer, gain=2.0), scheduler=scheduler, text_encoder=text,
        tokenizer=tokenizer, vae=plain_vae(1.0, None),
    )  # fmt: skip


FAMILIES: tuple[Family, ...] = (
    Family("Stable Diffusion 3", stable_diffusion_3),
    Family("Stable Diffusion 3.5 (medium)", stable_diffusion_35_medium),
    Family("Flux 1 (dev)", flux_dev),
    Family("Flux 1 (schnell)", flux_schnell, guided=False),
    Family("Flux 2 (dev)", flux2_dev),
    Family("Flux 2 (klein)", flux2_klein_distilled, guided=False),
    Family("Flux 2 (klein base)", flux2_klein_base),
    Family("AuraFlow", aura_flow, size=(64, 64), other=(96, 64)),
    Family("CogView3+", cogview3_plus),
    Family("CogView4", cogview4),
)
