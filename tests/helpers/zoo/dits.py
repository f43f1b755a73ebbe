"""Families whose transformer reads its text by cross-attention, or a class instead of a text.

Several have resolution binning: the picture is drawn at the nearest size of a list and resized to
what was asked. Their sizes here are of that list.
"""

from __future__ import annotations

from typing import Any

from tiny_pipelines import make_tokenizer, t5_text
from zoo.family import Family
from zoo.transformers import awake, deep_vae, flow, gemma2, plain_vae, vae


def pixart_transformer() -> Any:
    """A transformer whose `sample_size` names the list of sizes, the one of 256 pixels here."""
    from diffusers import PixArtTransformer2DModel

    return awake(
        PixArtTransformer2DModel(
            sample_size=32, num_layers=2, patch_size=2, attention_head_dim=8, in_channels=4,
            num_attention_heads=4, caption_channels=32, cross_attention_dim=32, out_channels=8,
            use_additional_conditions=False,
        ),
        gain=1.5,
    )  # fmt: skip


def pixart_alpha() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    return PixArtAlphaPipeline(
        transformer=pixart_transformer(), scheduler=DPMSolverMultistepScheduler(),
        text_encoder=t5_text(), tokenizer=make_tokenizer(length=120), vae=vae(levels=4),
    )  # fmt: skip


def pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(
        transformer=pixart_transformer(), scheduler=DPMSolverMultistepScheduler(),
        text_encoder=t5_text(), tokenizer=make_tokenizer(length=300),
        vae=vae(levels=4, scaling_factor=0.13025),
    )  # fmt: skip


def hunyuan_dit() -> Any:
    """Hunyuan-DiT: two texts, noise at every step, sizes from 768 pixels on.

    The released one has patches of 2 latents; here they are 4, so that a call takes a second.
    """
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    transformer = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=4, sample_size=128,
        hidden_size=16, num_layers=4, mlp_ratio=2.0, cross_attention_dim=32,
        cross_attention_dim_t5=32, pooled_projection_dim=16,
    )  # fmt: skip
    text = BertModel(
        BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=128, initializer_range=0.2,
        )
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", steps_offset=1,
    )  # fmt: skip
    return HunyuanDiTPipeline(
        transformer=awake(transformer, gain=1.5), scheduler=scheduler, text_encoder=text,
        tokenizer=make_tokenizer(length=77), text_encoder_2=t5_text(),
        tokenizer_2=make_tokenizer(length=256), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        vae=vae(
            levels=4, width=4, scaling_factor=0.13025, mid_block_add_attention=False
        ),
    )  # fmt: skip


LABELS = {
    0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 207: "golden retriever",
    281: "tabby, tabby cat", 417: "balloon", 980: "volcano",
}  # fmt: skip


def dit() -> Any:
    """DiT: a class of ImageNet's thousand; class 1000 is none, whatever the network was told."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip
    pipeline = DiTPipeline(
        transformer=awake(transformer, gain=2.0), vae=vae(), id2label=LABELS,
        scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    # The class keeps no record of its labels; released folders have them in their index.
    pipeline.register_to_config(id2label=LABELS)
    return pipeline


def sana_transformer(**changes: Any) -> Any:
    from diffusers import SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=2, num_attention_heads=4,
        attention_head_dim=8, num_cross_attention_heads=4, cross_attention_head_dim=8,
        cross_attention_dim=32, caption_channels=32, **changes,
    )  # fmt: skip
    return awake(transformer, gain=1.5)


def sana() -> Any:
    """Sana of 512 pixels: its call asks for 1024 by default, draws 512 and enlarges it."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        transformer=sana_transformer(sample_size=16), vae=deep_vae(), scheduler=scheduler,
        text_encoder=gemma2(), tokenizer=make_tokenizer(length=300),
    )  # fmt: skip


def sana_sprint() -> Any:
    """Sana Sprint: an embedded guidance, noise between steps, and by default two steps only."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    transformer = sana_transformer(
        sample_size=32, guidance_embeds=True, qk_norm="rms_norm_across_heads"
    )
    return SanaSprintPipeline(
        transformer=transformer, vae=deep_vae(), scheduler=SCMScheduler(),
        text_encoder=gemma2(), tokenizer=make_tokenizer(length=300),
    )  # fmt: skip


def prx() -> Any:
    """PRX of 256 pixels, with Gemma 2 for T5Gemma's encoder.

    diffusers 0.42.1 puts that class on a module of transformers 5 that is replaced afterwards, so a
    folder with it does not load.
    """
    from diffusers import PRXPipeline, PRXTransformer2DModel

    transformer = PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=32, hidden_size=32, mlp_ratio=2.0,
        num_heads=2, depth=2, axes_dim=[8, 8],
    )  # fmt: skip
    return PRXPipeline(
        transformer=awake(transformer, gain=2.0), scheduler=flow(shift=3.0),
        text_encoder=gemma2(), tokenizer=make_tokenizer(length=256),
        vae=plain_vae(0.3611, 0.1159, levels=4), default_sample_size=256,
    )  # fmt: skip


def lumina_next() -> Any:
    """Lumina-Next: text padded to the longest of the call and then to 8 tokens, on the left."""
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline
    from transformers import GemmaConfig, GemmaModel

    transformer = LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, cross_attention_dim=32,
    )  # fmt: skip
    text = GemmaModel(
        GemmaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.2,
        )
    )  # fmt: skip
    tokenizer = make_tokenizer(length=256)
    tokenizer.padding_side = "left"
    return LuminaPipeline(
        transformer=awake(transformer), scheduler=flow(), text_encoder=text,
        tokenizer=tokenizer, vae=vae(levels=4, scaling_factor=0.13025),
    )  # fmt: skip


def lumina2() -> Any:
    """Lumina 2: a system prompt comes before the prompt, and none before the negative one."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(8, 4, 4), axes_lens=(300, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=awake(transformer), scheduler=flow(shift=6.0), text_encoder=gemma2(),
        tokenizer=make_tokenizer(length=256), vae=plain_vae(0.3611, 0.1159, levels=4),
    )  # fmt: skip


FAMILIES: tuple[Family, ...] = (
    Family("PixArt-alpha", pixart_alpha, size=(256, 256), other=(192, 320)),
    Family("PixArt-sigma", pixart_sigma, size=(256, 256), other=(192, 320)),
    Family("Hunyuan-DiT", hunyuan_dit, size=(768, 1024), other=(1024, 768)),
    Family("DiT", dit, size=None, other=None, kind="class"),
    Family("Sana", sana, size=(512, 512), other=(384, 640)),
    Family("Sana Sprint", sana_sprint, size=(1024, 1024), other=(832, 1216), steps=(2, 2)),
    Family("PRX", prx, size=(256, 256), other=(192, 320)),
    Family("Lumina-Next", lumina_next, size=(64, 64), other=(96, 64)),
    Family("Lumina 2", lumina2, size=(64, 64), other=(96, 64)),
)
