"""The networks the trainer can make."""

from __future__ import annotations

from typing import Any

from modelops.models.encoders import MINILM_DIM
from modelops.models.pipeline import PixelFlowPipeline


def make_unet(
    *,
    resolution: int,
    patch_size: int,
    channels: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 2),
    layers_per_block: int = 2,
    attention_levels: tuple[int, ...] = (1, 2),
    cross_attention: bool = False,
    text_dim: int = MINILM_DIM,
) -> Any:
    """A UNet2DConditionModel on pixel-unshuffled RGB, conditioned on pooled text.

    Args:
        resolution: image height and width in pixels.
        patch_size: unshuffle factor; the network works at resolution / patch_size.
        channels: width of the first level; multipliers give the width of each level.
        attention_levels: levels (0 is the outermost) with self-attention.
        cross_attention: attend to text tokens at those levels, beside the pooled embedding.
        text_dim: width of the text embeddings.
    """
    from diffusers import UNet2DConditionModel

    levels = range(len(multipliers))
    kind = "CrossAttn{}Block2D" if cross_attention else "Attn{}Block2D"
    down = [kind.format("Down") if i in attention_levels else "DownBlock2D" for i in levels]
    up = [kind.format("Up") if i in attention_levels else "UpBlock2D" for i in reversed(levels)]
    return UNet2DConditionModel(
        sample_size=resolution // patch_size,
        in_channels=3 * patch_size**2,
        out_channels=3 * patch_size**2,
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DCrossAttn" if cross_attention else "UNetMidBlock2D",
        up_block_types=tuple(up),
        block_out_channels=tuple(channels * factor for factor in multipliers),
        layers_per_block=layers_per_block,
        attention_head_dim=8,
        cross_attention_dim=text_dim,
        class_embed_type="projection",
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=16,
        projection_class_embeddings_input_dim=text_dim,
    )


def make_pipeline(
    unet: Any,
    tokenizer: Any,
    text_encoder: Any,
    *,
    patch_size: int,
    prediction: str = "velocity",
    default_steps: int = 24,
    default_guidance: float = 3.0,
) -> PixelFlowPipeline:
    """A pipeline around a denoiser and a frozen text encoder, sampling by Euler's method."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return PixelFlowPipeline(
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        patch_size=patch_size,
        prediction=prediction,
        default_steps=default_steps,
        default_guidance=default_guidance,
    )
