"""Tiny pipelines of more recent families: large autoencoders, experts, guiders, own words."""

from __future__ import annotations

from typing import Any

from tiny_pipelines import kl_vae, make_tokenizer, t5_text
from zoo.family import Family
from zoo.recent import (
    FLUX_SHIFT,
    alive,
    chat_processor,
    chat_tokenizer,
    deep_vae,
    flow,
    language,
    qwen3_vl,
    qwen25_vl,
    qwen_vae,
)


def clip(projection: bool, positions: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=32, intermediate_size=37,
        num_attention_heads=4, num_hidden_layers=2, vocab_size=64, projection_dim=32,
        max_position_embeddings=positions, hidden_act="gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vl_processor() -> Any:
    """Qwen3-VL's processor around the tokenizer."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = chat_tokenizer()
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(), chat_template=tokenizer.chat_template,
    )  # fmt: skip


def flux2_vae(blocks: int = 4) -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, block_out_channels=(8,) * blocks,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip


def hidream(scheduler: Any) -> Any:
    """HiDream, which draws 128 x 128 latents whatever is asked; patches of 4 keep it quick."""
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    transformer = HiDreamImageTransformer2DModel(
        patch_size=4, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 32], text_emb_dim=64,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128), llama_layers=[0, 1], force_inference_output=True,
    )  # fmt: skip
    llama = LlamaConfig(**language(), attn_implementation="eager")
    return alive(
        HiDreamImagePipeline(
            scheduler=scheduler, vae=kl_vae(quant_conv=False), text_encoder=clip(True, 128),
            tokenizer=make_tokenizer(length=128), text_encoder_2=clip(True, 128),
            tokenizer_2=make_tokenizer(length=128), text_encoder_3=t5_text(),
            tokenizer_3=make_tokenizer(length=128), text_encoder_4=LlamaForCausalLM(llama),
            tokenizer_4=make_tokenizer(length=128), transformer=transformer,
        ),
        gain=1.3,
    )  # fmt: skip


def hidream_full() -> Any:
    from diffusers import UniPCMultistepScheduler

    return hidream(
        UniPCMultistepScheduler(
            flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    )


def hidream_fast() -> Any:
    """HiDream's distilled model: its scheduler draws noise in each step."""
    from diffusers import FlowMatchLCMScheduler

    return hidream(FlowMatchLCMScheduler(shift=3.0))


def kandinsky5() -> Any:
    """Kandinsky 5, which draws the nearest of seven sizes of a megapixel whatever is asked."""
    from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=16, out_visual_dim=4,
        patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=(4, 6, 6), visual_cond=False, attention_type="regular",
    )  # fmt: skip
    return alive(
        Kandinsky5T2IPipeline(
            transformer=transformer, vae=deep_vae(use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=qwen25_vl(), tokenizer=chat_processor(), text_encoder_2=clip(False, 77),
            tokenizer_2=make_tokenizer(length=77), scheduler=flow(shift=3.0),
        )
    )  # fmt: skip


def hunyuan_image(distilled: bool) -> Any:
    """HunyuanImage 2.1; nine tenths of its weights are in a layer of fixed width for glyphs."""
    from diffusers import (
        AutoencoderKLHunyuanImage,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )
    from diffusers.guiders import AdaptiveProjectedMixGuidance
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=distilled,
        text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(4, 4), use_meanflow=distilled,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32),
        layers_per_block=1, scaling_factor=0.75289, spatial_compression_ratio=4, sample_size=64,
    )  # fmt: skip
    glyphs = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    guiders: list[Any] = [None, None]
    if not distilled:
        guiders = [
            AdaptiveProjectedMixGuidance(
                guidance_scale=3.5, adaptive_projected_guidance_scale=10.0,
                adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=10.0,
                adaptive_projected_guidance_start_step=start,
            )
            for start in (5, 38)
        ]  # fmt: skip
    return alive(
        HunyuanImagePipeline(
            scheduler=flow(shift=4.0 if distilled else 5.0), vae=vae, text_encoder=qwen25_vl(3),
            tokenizer=chat_tokenizer(), text_encoder_2=T5EncoderModel(glyphs),
            tokenizer_2=ByT5Tokenizer(), transformer=transformer, guider=guiders[0],
            ocr_guider=guiders[1],
        ),
        gain=3.0,
    )  # fmt: skip


def hunyuan_image_base() -> Any:
    """HunyuanImage 2.1, guided by guiders of its own: its call takes no guidance scale."""
    return hunyuan_image(False)


def hunyuan_image_distilled() -> Any:
    """HunyuanImage 2.1 distilled: guidance goes in, and each step names the next one's time."""
    return hunyuan_image(True)


def omnigen() -> Any:
    """OmniGen, one network for text and image, whose negative prompt is in its code."""
    from diffusers import OmniGenPipeline, OmniGenTransformer2DModel

    transformer = OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=32, num_layers=2, pad_token_id=0, vocab_size=64, time_step_dim=8,
        rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 1, 1, 1]},
        pos_embed_max_size=64,
    )  # fmt: skip
    return alive(
        OmniGenPipeline(
            transformer=transformer, scheduler=flow(invert_sigmas=True, num_train_timesteps=1),
            vae=deep_vae(), tokenizer=make_tokenizer(length=131072),
        ),
        gain=1.5,
    )  # fmt: skip


def ernie_image() -> Any:
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel
    from transformers import Mistral3Config, Mistral3Model

    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=16,
        out_channels=16, patch_size=1, text_in_dim=32, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    text = Mistral3Config(
        text_config={"model_type": "mistral", **language(), "head_dim": 8},
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "head_dim": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        image_token_index=8,
    )  # fmt: skip
    return alive(
        ErnieImagePipeline(
            transformer=transformer, vae=flux2_vae(), text_encoder=Mistral3Model(text),
            tokenizer=make_tokenizer(length=4096), scheduler=flow(shift=4.0),
        ),
        gain=1.5,
    )  # fmt: skip


def bria_fibo() -> Any:
    """Bria's FIBO. An empty prompt is token 128000 in its code, so the vocabulary is as long."""
    from diffusers import AutoencoderKLWan, BriaFiboPipeline, BriaFiboTransformer2DModel
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    transformer = BriaFiboTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=None,
        axes_dims_rope=[0, 8, 8], text_encoder_dim=8,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.1, -0.1, 0.0, 0.2],
        latents_std=[1.2, 0.9, 1.0, 1.1], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16,
    )  # fmt: skip
    text = {**language(8), "num_attention_heads": 2, "vocab_size": 128256}
    return alive(
        BriaFiboPipeline(
            transformer=transformer, scheduler=flow(**FLUX_SHIFT), vae=vae,
            text_encoder=SmolLM3ForCausalLM(SmolLM3Config(**text, tie_word_embeddings=True)),
            tokenizer=make_tokenizer(length=3000),
        )
    )  # fmt: skip


def bria_fibo2() -> Any:
    """FIBO 2, which takes layers 5 to 35 of its text encoder, and gist tokens out of them."""
    from diffusers import BriaFibo2Pipeline, BriaFibo2Transformer2DModel

    transformer = BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=6, n_refiner_layers=1, n_heads=2,
        cap_feat_dim=24, injection_layer_ids=(1, 2, 3, 4, 5), perceiver_num_layers=1,
        min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=16,
        gist_max_text_len=64, axes_dims=(4, 6, 6), axes_lens=(64, 128, 128),
    )  # fmt: skip
    return alive(
        BriaFibo2Pipeline(
            transformer=transformer, scheduler=flow(**FLUX_SHIFT), vae=flux2_vae(2),
            text_encoder=qwen3_vl(8, 36, head=True), processor=vl_processor(),
        )
    )  # fmt: skip


def nucleus() -> Any:
    """Nucleus-Image: experts that choose their tokens, text in multiples of eight tokens."""
    from diffusers import NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel

    transformer = NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4), num_experts=4, moe_intermediate_dim=16,
        capacity_factors=[2.0] * 5,
    )  # fmt: skip
    return alive(
        NucleusMoEImagePipeline(
            transformer=transformer, scheduler=flow(), vae=qwen_vae(),
            text_encoder=qwen3_vl(32, 8, head=True), processor=vl_processor(),
        ),
        gain=4.0,
    )  # fmt: skip


def qwen_image_21() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage21,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )

    transformer = QwenImage21Transformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, context_in_dim=32, mlp_ratio=2, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.1, 0.0, 0.2], latents_std=[1.2, 0.9, 1.0, 1.1],
    )  # fmt: skip
    return alive(
        QwenImage21Pipeline(
            scheduler=flow(**FLUX_SHIFT), vae=vae, text_encoder=qwen3_vl(head=True),
            processor=vl_processor(), transformer=transformer,
        )
    )  # fmt: skip


def dreamlite(mobile: bool) -> Any:
    """DreamLite, which takes one prompt a call; the mobile one has four steps and no guidance."""
    from diffusers import (
        AutoencoderTiny,
        DreamLiteMobilePipeline,
        DreamLitePipeline,
        DreamLiteUNetModel,
    )

    unet = DreamLiteUNetModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, layers_per_block=1, norm_num_groups=4,
        transformer_layers_per_block=1,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    vae.decoder.layers[-1].bias.data.fill_(0.5)  # else most of a picture is black
    return alive(
        (DreamLiteMobilePipeline if mobile else DreamLitePipeline)(
            text_encoder=qwen3_vl(head=True), tokenizer=chat_tokenizer(),
            processor=vl_processor(), vae=vae, unet=unet, scheduler=flow(shift=3.0),
        ),
        gain=3.0,
    )  # fmt: skip


def dreamlite_base() -> Any:
    return dreamlite(False)


def dreamlite_mobile() -> Any:
    return dreamlite(True)


FAMILIES: tuple[Family, ...] = (
    Family("HiDream-I1 (full)", hidream_full, (256, 256), (128, 512)),
    Family("HiDream-I1 (fast)", hidream_fast, (256, 256), (128, 512)),
    Family("Kandinsky 5", kandinsky5, (1024, 1024), (1408, 640)),
    Family("HunyuanImage 2.1", hunyuan_image_base, guided=False),
    Family("HunyuanImage 2.1 (distilled)", hunyuan_image_distilled, guided=False),
    Family("OmniGen", omnigen, (64, 64), (96, 64)),
    Family("ERNIE-Image", ernie_image, (64, 64), (96, 64)),
    Family("Bria FIBO", bria_fibo, (64, 64), (96, 64)),
    Family("Bria FIBO 2", bria_fibo2),
    Family("Nucleus-Image", nucleus),
    Family("QwenImage 2.1", qwen_image_21, (64, 64), (96, 64), guided=False),
    Family("DreamLite", dreamlite_base),
    Family("DreamLite (mobile)", dreamlite_mobile, guided=False),
)
