"""Tiny pipelines of recent families, whose text goes through a language model's template."""

from __future__ import annotations

from typing import Any

import torch

from tiny_pipelines import WORDS, kl_vae, make_tokenizer, t5_text
from zoo.family import Family

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = [
    "\n", ":", ",", ".", "<think>", "</think>", "system", "user", "assistant", "describe",
    "image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text",
    "spatial", "relationships", "objects", "background", "an", "generate",
]  # fmt: skip
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VOCABULARY = len([*SPECIAL, *VISION, *TEMPLATE, *WORDS])
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
UNSET = ("pad_token", "experts.gate_up_proj", "experts.down_proj")  # weights that nobody fills
FLUX_SHIFT: dict[str, Any] = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "shift": 3.0,
}  # fmt: skip


def chat_tokenizer() -> Any:
    """A tokenizer of Qwen's kind: no token of its own around a text, and a chat template.

    Words, marks and line breaks are one token each, so that templates have as many as in Qwen's.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *VISION, *TEMPLATE, *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n|</?think>|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=None, eos_token="<|im_end|>", unk_token="<unk>",
        pad_token="<pad>", additional_special_tokens=["<|im_start|>", *VISION],
        model_max_length=131072, padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def chat_processor() -> Any:
    """Qwen2-VL's processor around the tokenizer, for pipelines that take the text through it."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = chat_tokenizer()
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(), chat_template=CHAT,
    )  # fmt: skip


def language(width: int = 32, layers: int = 2) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "initializer_range": 0.2, "bos_token_id": None,
        "eos_token_id": 5, "pad_token_id": 0,
    }  # fmt: skip


def vision_ids() -> dict[str, int]:
    return {
        "vision_start_token_id": 6, "vision_end_token_id": 7, "image_token_id": 8,
        "video_token_id": 9,
    }  # fmt: skip


def qwen25_vl(layers: int = 2) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**language(layers=layers), "rope_parameters": rope},
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                "out_hidden_size": 32, "fullatt_block_indexes": [0],
            },
            **vision_ids(),
        )
    )  # fmt: skip


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**language(), head_dim=8))


def qwen3_vl(width: int = 32, layers: int = 2, *, head: bool = False) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1000000.0}
    return (Qwen3VLForConditionalGeneration if head else Qwen3VLModel)(
        Qwen3VLConfig(
            text_config={**language(width, layers), "head_dim": 8, "rope_parameters": rope},
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                "out_hidden_size": width, "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            **vision_ids(),
        )
    )  # fmt: skip


def qwen_vae(levels: int = 1) -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1] * (levels + 1), num_res_blocks=1,
        temperal_downsample=[False, True, True][-levels:],
        latents_mean=[0.1, -0.1, 0.0, 0.2], latents_std=[1.2, 0.9, 1.0, 1.1],
    )  # fmt: skip


def deep_vae(channels: int = 4, **changes: Any) -> Any:
    """An autoencoder with the factor 8 that some classes have in their code."""
    from diffusers import AutoencoderKL

    options: dict[str, Any] = {
        "in_channels": 3, "out_channels": 3, "latent_channels": channels,
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "norm_num_groups": 4,
        "sample_size": 64, "mid_block_add_attention": False,
    }  # fmt: skip
    return AutoencoderKL(**{**options, **changes})


def sharpen(model: Any) -> None:
    """Make a writer's attention sharp, so that what it writes depends on a few words of many."""
    for name, value in model.named_parameters():
        if name.endswith("q_proj.weight"):
            value.data.mul_(4.0)


def alive(pipeline: Any, gain: float = 2.0) -> Any:
    """The pipeline in eval mode, with a denoiser that listens to its prompt.

    Weights that start at zero or unset get random numbers, and all of them are made larger: gates
    and residuals hide the text of a network that nobody has trained.
    """
    for role, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
            if role in ("transformer", "unet"):
                for name, value in component.named_parameters():
                    if name.endswith(UNSET) or not (value.ndim < 2 or value.any()):
                        torch.nn.init.normal_(value, std=0.1)
                    if value.ndim > 1:
                        value.mul_(gain)
            component.requires_grad_(True)
    return pipeline


def flow(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = flow(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
        max_image_seq_len=8192, shift_terminal=0.02,
    )  # fmt: skip
    return alive(
        QwenImagePipeline(
            scheduler=scheduler, vae=qwen_vae(), text_encoder=qwen25_vl(),
            tokenizer=chat_tokenizer(), transformer=transformer,
        ),
        gain=3.5,
    )  # fmt: skip


def z_image(shift: float) -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32,
        rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[1024, 512, 512],
    )  # fmt: skip
    return alive(
        ZImagePipeline(
            scheduler=flow(shift=shift), vae=deep_vae(shift_factor=0.1159), text_encoder=qwen3(),
            tokenizer=chat_tokenizer(), transformer=transformer,
        )
    )  # fmt: skip


def z_image_base() -> Any:
    return z_image(6.0)


def z_image_turbo() -> Any:
    return z_image(3.0)


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16,
    )  # fmt: skip
    return alive(
        ChromaPipeline(
            scheduler=flow(use_beta_sigmas=True), vae=kl_vae(quant_conv=False),
            text_encoder=t5_text(), tokenizer=make_tokenizer(length=512), transformer=transformer,
        )
    )  # fmt: skip


def bria() -> Any:
    from diffusers import BriaPipeline, BriaTransformer2DModel

    transformer = BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=None,
        axes_dims_rope=[0, 8, 8],
    )  # fmt: skip
    return alive(
        BriaPipeline(
            transformer=transformer, scheduler=flow(**FLUX_SHIFT), vae=kl_vae(),
            text_encoder=t5_text(), tokenizer=make_tokenizer(length=512),
        ),
        gain=3.0,
    )  # fmt: skip


def ovis_image() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return alive(
        OvisImagePipeline(
            scheduler=flow(**FLUX_SHIFT), vae=kl_vae(quant_conv=False), text_encoder=qwen3(),
            tokenizer=chat_tokenizer(), transformer=transformer,
        ),
        gain=3.0,
    )  # fmt: skip


def krea(distilled: bool) -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=32,
        num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )  # fmt: skip
    return alive(
        Krea2Pipeline(
            scheduler=flow(**{**FLUX_SHIFT, "max_image_seq_len": 6400, "shift": 1.0}),
            vae=qwen_vae(3), text_encoder=qwen3_vl(), tokenizer=chat_tokenizer(),
            transformer=transformer, text_encoder_select_layers=(0, 1, 2), is_distilled=distilled,
        ),
        gain=3.0,
    )  # fmt: skip


def krea_base() -> Any:
    return krea(False)


def krea_turbo() -> Any:
    """Krea 2 with `is_distilled`, whose time shift is the same at every size."""
    return krea(True)


def longcat_image() -> Any:
    """LongCat-Image, whose default call lets the text encoder write the prompt anew first.

    Every eighth word ends the writing, which else goes on for 512 tokens.
    """
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    transformer = LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    text_encoder = qwen25_vl()
    text_encoder.generation_config.eos_token_id = list(range(5, VOCABULARY, 8))
    text_encoder.generation_config.min_new_tokens = 4
    sharpen(text_encoder)
    return alive(
        LongCatImagePipeline(
            scheduler=flow(**FLUX_SHIFT), vae=kl_vae(16, quant_conv=False),
            text_encoder=text_encoder, tokenizer=chat_tokenizer(), text_processor=chat_processor(),
            transformer=transformer,
        )
    )  # fmt: skip


FAMILIES: tuple[Family, ...] = (
    Family("QwenImage", qwen_image, guided=False),
    Family("Z-Image", z_image_base, (64, 64), (96, 64)),
    Family("Z-Image (Turbo)", z_image_turbo, (64, 64), (96, 64)),
    Family("Chroma", chroma),
    Family("Bria 3.2", bria),
    Family("Ovis-Image", ovis_image),
    Family("Krea 2", krea_base, (64, 64), (96, 64)),
    Family("Krea 2 (turbo)", krea_turbo, (64, 64), (96, 64)),
    Family("LongCat-Image", longcat_image),
)
