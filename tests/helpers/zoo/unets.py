"""Families whose denoiser is a U-Net: Stable Diffusion and what came before and beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tiny_pipelines import clip_text, condition_unet, ddim, kl_vae, make_tokenizer, t5_text
from zoo.family import Family

NOISE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
}  # fmt: skip


def louder(network: Any, *, part: str = "attn2", times: float = 4.0) -> Any:
    """A network whose matrices with `part` in their names count for more than fresh ones do."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            if part in name and value.ndim > 1:
                value.mul_(times)
    return network


def picture_vae(channels: int = 4, **changes: Any) -> Any:
    """A decoder whose random images use more than the middle greys."""
    return louder(kl_vae(channels, **changes), part="decoder.conv_out", times=3.0)


def deep_vae() -> Any:
    """A VAE of four levels: eight pixels to a latent, as the real ones have."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    return louder(vae, part="decoder.conv_out", times=3.0)


def pndm() -> Any:
    from diffusers import PNDMScheduler

    return PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)


def safety() -> dict[str, Any]:
    """The checker of Stable Diffusion 1, which flags nothing here, and what prepares its input."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 16,
    }  # fmt: skip
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16},
        text_config={**small, "vocab_size": 64}, projection_dim=16,
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    return {
        "safety_checker": StableDiffusionSafetyChecker(config).eval(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side),
    }


def stable_diffusion(
    scheduler: Any = pndm, *, variant: str = "", checked: bool = False, **unet: Any
) -> Any:
    import diffusers

    checks = safety() if checked else {"safety_checker": None, "feature_extractor": None}
    return getattr(diffusers, f"StableDiffusion{variant}Pipeline")(
        vae=picture_vae(), text_encoder=clip_text(),
        tokenizer=make_tokenizer(length=16, pad="</s>"), unet=louder(condition_unet(**unet)),
        scheduler=scheduler(), requires_safety_checker=checked, **checks,
    )  # fmt: skip


def stable_diffusion_2() -> Any:
    """Stable Diffusion 2.1: v-prediction, zero terminal signal, trailing steps."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    unet = condition_unet(use_linear_projection=True, attention_head_dim=(2, 4))
    return StableDiffusionPipeline(
        vae=picture_vae(), text_encoder=clip_text(), tokenizer=make_tokenizer(length=16),
        unet=louder(unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def euler(*, spacing: str = "leading", ancestral: bool = False) -> Any:
    from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

    kind = EulerAncestralDiscreteScheduler if ancestral else EulerDiscreteScheduler
    return kind(**NOISE, timestep_spacing=spacing, steps_offset=1)


def ddpm() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**NOISE, clip_sample=False, steps_offset=1)


def dpm_solver() -> Any:
    """DPM-Solver++ of the second order, which draws noise at each step."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        **NOISE, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, steps_offset=1
    )


def dpm_sde() -> Any:
    """A sampler with a Brownian tree of noise, seeded from torch's global generator."""
    from diffusers import DPMSolverSDEScheduler

    return DPMSolverSDEScheduler(**NOISE, steps_offset=1)


def heun() -> Any:
    """Heun's sampler, which asks the network twice a step."""
    from diffusers import HeunDiscreteScheduler

    return HeunDiscreteScheduler(**NOISE, steps_offset=1)


def lcm() -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=True, steps_offset=1)


def latent_consistency() -> Any:
    """LCM: four steps, and the guidance is an input of the network."""
    from diffusers import LatentConsistencyModelPipeline

    unet = louder(condition_unet(time_cond_proj_dim=32), part="cond_proj", times=8.0)
    return LatentConsistencyModelPipeline(
        vae=picture_vae(), text_encoder=clip_text(),
        tokenizer=make_tokenizer(length=16, pad="</s>"), unet=louder(unet), scheduler=lcm(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def xl_unet(*, width: int = 64, ids: int = 6, **changes: Any) -> Any:
    return louder(
        condition_unet(
            addition_embed_type="text_time", addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2), use_linear_projection=True,
            projection_class_embeddings_input_dim=8 * ids + 32, cross_attention_dim=width,
            **changes,
        )
    )  # fmt: skip


def stable_diffusion_xl(
    scheduler: Any = euler, *, pipeline: str = "StableDiffusionXLPipeline", **unet: Any
) -> Any:
    """SDXL: no negative prompt means zeros; the sizes and the crop are inputs of the network."""
    import diffusers

    return getattr(diffusers, pipeline)(
        vae=picture_vae(), text_encoder=clip_text(), text_encoder_2=clip_text(projection=True),
        tokenizer=make_tokenizer(length=16, pad="</s>"), tokenizer_2=make_tokenizer(length=16),
        unet=xl_unet(**unet), scheduler=scheduler(), force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )  # fmt: skip


def xl_refiner() -> Any:
    """The refiner of SDXL: one text encoder, an aesthetic score, no zeros."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(
        vae=picture_vae(), text_encoder=None, tokenizer=None, unet=xl_unet(width=32, ids=5),
        text_encoder_2=clip_text(projection=True), tokenizer_2=make_tokenizer(length=16),
        scheduler=euler(), requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )  # fmt: skip


def latent_diffusion_text() -> Any:
    """LDM: its own BERT reads 77 tokens, and a latent is eight pixels whatever the VAE says."""
    from diffusers import LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=64, max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=64,
            encoder_attention_heads=2, head_dim=16, d_model=32, pad_token_id=0,
        )
    )  # fmt: skip
    return LDMTextToImagePipeline(
        vqvae=deep_vae(), bert=bert.eval(), tokenizer=make_tokenizer(length=77),
        unet=louder(condition_unet(sample_size=8)), scheduler=ddim(),
    )  # fmt: skip


def deepfloyd() -> Any:
    """DeepFloyd IF, first stage: pixels, learned variance, dynamic thresholds, a watermark."""
    from diffusers import DDPMScheduler, IFPipeline
    from diffusers.pipelines.deepfloyd_if import IFWatermarker

    unet = condition_unet(
        sample_size=32, in_channels=3, out_channels=6, encoder_hid_dim=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="text", addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", act_fn="gelu",
    )  # fmt: skip
    mark = IFWatermarker()
    mark.watermark_image.copy_(torch.randint(128, 256, mark.watermark_image.shape))
    return IFPipeline(
        tokenizer=make_tokenizer(length=77), text_encoder=t5_text().eval(),
        unet=louder(unet, part="add_", times=4.0), watermarker=mark, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5,
            dynamic_thresholding_ratio=0.95, variance_type="learned_range",
        ),
    )  # fmt: skip


def pixel_unet(**changes: Any) -> Any:
    from diffusers import UNet2DModel

    options: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DModel(**{**options, **changes})


def unconditional(pipeline: str, scheduler: str, **settings: Any) -> Any:
    import diffusers

    return getattr(diffusers, pipeline)(
        unet=pixel_unet(), scheduler=getattr(diffusers, scheduler)(**settings)
    )


def latent_diffusion() -> Any:
    """LDM without a prompt: the VQ model looks its latents up in a book of codes."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    vqvae = VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, num_vq_embeddings=64,
        norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )
    return LDMPipeline(
        vqvae=louder(vqvae, part="quantize", times=64.0), unet=pixel_unet(sample_size=16),
        scheduler=scheduler,
    )  # fmt: skip


def consistency(classes: int | None = None) -> Any:
    """A consistency model: one step by default, sigmas from 80 to 0.002."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    unet = pixel_unet(
        num_class_embeds=classes, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    return ConsistencyModelPipeline(
        unet=unet,
        scheduler=CMStochasticIterativeScheduler(
            num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0
        ),
    )


FAMILIES: tuple[Family, ...] = (
    Family("Stable Diffusion 1.5 (PNDM)", stable_diffusion),
    Family("Stable Diffusion 1.5 (safety checker)", partial(stable_diffusion, checked=True)),
    Family(
        "Stable Diffusion 1.5 (Euler ancestral)",
        partial(stable_diffusion, partial(euler, ancestral=True)),
    ),
    Family("Stable Diffusion 1.5 (DDPM)", partial(stable_diffusion, ddpm)),
    Family("Stable Diffusion 1.5 (DPM-Solver++ SDE)", partial(stable_diffusion, dpm_solver)),
    Family("Stable Diffusion 1.5 (Heun)", partial(stable_diffusion, heun)),
    Family(
        "Stable Diffusion 1.5 (DPM SDE, torchsde)",
        partial(stable_diffusion, dpm_sde),
        needs="torchsde",
    ),
    Family(
        "Stable Diffusion 1.5 (img2img)",
        partial(stable_diffusion, variant="Img2Img"),
        size=None, other=None, kind="image", steps=(8, 12),
    ),
    Family(
        "Stable Diffusion 1.5 (inpainting, nine channels)",
        partial(stable_diffusion, variant="Inpaint", in_channels=9),
        kind="image", steps=(8, 12),
    ),
    Family(
        "Stable Diffusion 1.5 (inpainting, four channels)",
        partial(stable_diffusion, variant="Inpaint"),
        kind="image", steps=(8, 12),
    ),
    Family("Stable Diffusion 2.1 (v-prediction)", stable_diffusion_2),
    Family("SDXL", stable_diffusion_xl),
    Family(
        "SDXL Turbo",
        partial(stable_diffusion_xl, partial(euler, spacing="trailing", ancestral=True)),
    ),
    Family("SDXL (LCM)", partial(stable_diffusion_xl, lcm, time_cond_proj_dim=32)),
    Family(
        "SDXL (img2img)",
        partial(stable_diffusion_xl, pipeline="StableDiffusionXLImg2ImgPipeline"),
        size=None, other=None, kind="image", steps=(8, 12),
    ),
    Family("SDXL (refiner)", xl_refiner, size=None, other=None, kind="image", steps=(8, 12)),
    Family("LCM", latent_consistency),
    Family("LDM (text)", latent_diffusion_text, size=(64, 64), other=(96, 64)),
    Family("DeepFloyd IF (stage 1)", deepfloyd),
    Family(
        "DDPM",
        partial(unconditional, "DDPMPipeline", "DDPMScheduler", variance_type="fixed_large"),
        size=None, other=None, kind="unconditional",
    ),
    Family(
        "DDIM",
        partial(unconditional, "DDIMPipeline", "DDIMScheduler"),
        size=None, other=None, kind="unconditional",
    ),
    Family("LDM (unconditional)", latent_diffusion, size=None, other=None, kind="unconditional"),
    Family("Consistency model", consistency, size=None, other=None, kind="unconditional"),
    Family(
        "Consistency model (classes)", partial(consistency, 10), size=None, other=None,
        kind="class", guided=False,
    ),
)  # fmt: skip
