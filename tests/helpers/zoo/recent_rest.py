"""Tiny pipelines with two networks or more at work, or calls with settings of their own."""

from __future__ import annotations

from typing import Any

from zoo.family import Family
from zoo.recent import alive, chat_tokenizer, deep_vae, flow, language, qwen3_vl, sharpen
from zoo.recent_more import flux2_vae


def ideogram4() -> Any:
    """Ideogram 4: a second network without text, and a guidance for each of its 48 steps.

    Another number of steps needs `guidance_schedule` of that length, or None and `guidance_scale`.
    """
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel

    def transformer() -> Any:
        network = Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            intermediate_size=32, adaln_dim=16, llm_features_dim=13 * 8, mrope_section=(4, 2, 2),
        )  # fmt: skip
        network.llm_cond_proj.weight.data.mul_(4.0)  # two words among 2048 places
        for name, value in network.named_parameters():
            if name.endswith("norm_q.weight"):
                value.data.mul_(4.0)
        return network

    return alive(
        Ideogram4Pipeline(
            scheduler=flow(), vae=flux2_vae(), text_encoder=qwen3_vl(8, 36),
            tokenizer=chat_tokenizer(), transformer=transformer(),
            unconditional_transformer=transformer(),
        ),
        gain=3.0,
    )  # fmt: skip


def glm_processor() -> Any:
    from transformers import GlmImageImageProcessor, GlmImageProcessor, PreTrainedTokenizerFast

    plain = chat_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>", "grid_bos_token": "<|vision_start|>",
            "grid_eos_token": "<|vision_end|>",
        },
    )  # fmt: skip
    return GlmImageProcessor(
        image_processor=GlmImageImageProcessor(), tokenizer=tokenizer,
        chat_template=plain.chat_template,
    )  # fmt: skip


def glm_image() -> Any:
    """GLM-Image: a language model draws a small picture's tokens first, by torch's generator."""
    from diffusers import GlmImagePipeline, GlmImageTransformer2DModel
    from transformers import (
        ByT5Tokenizer,
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        T5Config,
        T5EncoderModel,
    )

    glyphs = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    drafts = GlmImageConfig(
        text_config={
            **language(), "vocab_size": 128, "vision_vocab_size": 96, "eos_token_id": 125,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 32, "patch_size": 8,
            "intermediate_size": 16,
        },
        vq_config={"embed_dim": 16, "num_embeddings": 96, "latent_channels": 16},
        image_token_id=8, image_start_token_id=124, image_end_token_id=125,
    )  # fmt: skip
    writer = GlmImageForConditionalGeneration(drafts)
    sharpen(writer)
    transformer = GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=32, time_embed_dim=16, condition_dim=8,
        prior_vq_quantizer_codebook_size=96,
    )  # fmt: skip
    vae = deep_vae(latents_mean=[0.1, -0.1, 0.0, 0.2], latents_std=[1.2, 0.9, 1.0, 1.1])
    return alive(
        GlmImagePipeline(
            tokenizer=ByT5Tokenizer(), processor=glm_processor(),
            text_encoder=T5EncoderModel(glyphs),
            vision_language_encoder=writer, vae=vae,
            transformer=transformer,
            scheduler=flow(
                use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75,
                time_shift_type="linear",
            ),
        )
    )  # fmt: skip


FAMILIES: tuple[Family, ...] = (
    Family("Ideogram 4", ideogram4, (64, 64), (96, 64), steps=(48, 48)),
    Family("GLM-Image", glm_image, (64, 64), (96, 64)),
)
