"""Text-to-image by rectified flow on pixel-unshuffled RGB.

This file is copied into every checkpoint as `pipeline.py`, so it imports nothing but torch and
diffusers: `DiffusionPipeline.from_pretrained(checkpoint, trust_remote_code=True)` loads it where
modelops is not installed. The same class drives exported components; see `modelops.export.runtime`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class PixelFlowPipeline(DiffusionPipeline):
    """Generates RGB images from text with a UNet that works on p x p pixel-unshuffled images.

    Shapes: N batch, C = 3 p^2 channels, h = height / p, w = width / p, L text tokens, D text width.

    Args:
        unet: UNet2DConditionModel with `class_embed_type` set; takes the pooled text as
            `class_labels` [N, D] and, if it has cross-attention, tokens as
            `encoder_hidden_states` [N, L, D].
        text_encoder: a transformers encoder (BertModel); its last hidden state is mean-pooled.
        tokenizer: its tokenizer.
        scheduler: a flow-matching scheduler whose timesteps are 1000 sigma.
        patch_size: p.
        max_text_tokens: L; longer prompts are truncated.
        prediction: what the network's output is: "velocity" (noise - image) or "sample" (image).
        default_steps, default_guidance: used when a call does not say.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        patch_size: int = 4,
        max_text_tokens: int = 32,
        prediction: str = "velocity",
        default_steps: int = 24,
        default_guidance: float = 3.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(
            patch_size=patch_size,
            max_text_tokens=max_text_tokens,
            prediction=prediction,
            default_steps=default_steps,
            default_guidance=default_guidance,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @cached_property
    def uses_tokens(self) -> bool:
        """Whether the network attends to text tokens, beside the pooled embedding."""
        blocks = (*self.unet.config["down_block_types"], *self.unet.config["up_block_types"])
        middle = self.unet.config.get("mid_block_type") or ""
        return any("CrossAttn" in block for block in (*blocks, middle))

    @property
    def resolution(self) -> int:
        """The height and width in pixels that the network was trained at."""
        return int(self.unet.config["sample_size"]) * int(self.config["patch_size"])

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Text to (pooled [N, D] of length sqrt(D), tokens [N, L, D], mask [N, L] of 0 and 1).

        Always padded to L, so that a prompt's embedding does not depend on its company.
        """
        encoded = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.config["max_text_tokens"],
            return_tensors="pt",
        )
        device = self.text_encoder.device
        mask = encoded["attention_mask"].to(device)
        tokens = self.text_encoder(input_ids=encoded["input_ids"].to(device), attention_mask=mask)[
            0
        ]
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5, tokens, mask

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents.

        Raises:
            ValueError: height or width is not a positive multiple of what the network needs.
        """
        patch = int(self.config["patch_size"])
        multiple = patch * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"height and width must be positive multiples of {multiple}, got {height}x{width}"
            )
        return 3 * patch**2, height // patch, width // patch

    def unet_arguments(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        pooled: torch.Tensor,
        tokens: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """What the network is called with: latents [N, C, h, w] at timesteps [N], 1000 sigma."""
        text: dict[str, Any] = {"encoder_hidden_states": None}
        if self.uses_tokens:
            text = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}
        return {"sample": latents, "timestep": timesteps, "class_labels": pooled, **text}

    def predict_velocity(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        pooled: torch.Tensor,
        tokens: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One network evaluation: latents [N, C, h, w] at noise levels sigmas [N] in (0, 1] to
        velocity (noise - image) [N, C, h, w]. Rows may have different noise levels."""
        arguments = self.unet_arguments(latents, sigmas * 1000.0, pooled, tokens, mask)
        output = self.unet(**arguments, return_dict=False)[0]
        if self.config["prediction"] == "sample":
            level = sigmas.clamp(min=0.05).view(-1, 1, 1, 1).to(output.dtype)
            return (latents - output) / level
        return output

    def denoise(
        self,
        latents: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
        on_step: Callable[..., dict[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Noise [N, C, h, w] to latents of the same shape, along the scheduler's timesteps.

        Args:
            text: of `encode_prompt`; 2 N rows where guidance is on, the negative prompts last.
            scale: classifier-free guidance; 1 turns it off.
            on_step: `callback_on_step_end` of a call.
        """
        guided = scale != 1.0
        timesteps = self.scheduler.timesteps
        rows = 2 * len(latents) if guided else len(latents)
        levels = (timesteps / 1000.0).to(latents.dtype).unsqueeze(1).repeat(1, rows).unbind()
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            inputs = torch.cat([latents, latents]) if guided else latents
            velocity = self.predict_velocity(inputs, levels[step], *text)
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + scale * (conditional - unconditional)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if on_step is not None:
                changed = on_step(self, step, timestep, {"latents": latents})
                latents = (changed or {}).get("latents", latents)
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] to images [N, 3, H, W] in [0, 1]."""
        images = F.pixel_shuffle(latents.float(), int(self.config["patch_size"]))
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> Any:
        """Generate images.

        Args:
            prompt: one prompt or N.
            height, width: pixels; the training resolution when not given.
            num_inference_steps: network evaluations along the trajectory.
            guidance_scale: classifier-free guidance; 0 and 1 both turn it off.
            negative_prompt: what to guide away from; the empty prompt when not given.
            num_images_per_prompt: images made for each prompt.
            generator: one generator, or one per image.
            latents: starting noise [N, C, h, w], in place of `generator`.
            output_type: "pil", "np" ([N, H, W, 3] in [0, 1]), "pt" ([N, 3, H, W] in [0, 1]).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}).

        Raises:
            ValueError: guidance below 0 or between 0 and 1; texts or sizes that do not fit.
        """
        steps = self.config["default_steps"] if num_inference_steps is None else num_inference_steps
        scale = self.config["default_guidance"] if guidance_scale is None else guidance_scale
        if scale != 0 and not 1 <= scale < float("inf"):
            raise ValueError(f"guidance_scale {scale}: must be 0 or 1 (off), or more than 1")
        scale = scale or 1.0
        height, width = height or self.resolution, width or self.resolution
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        negatives = negative_prompt or ""
        if isinstance(negatives, str):
            negatives = [negatives] * len(prompts)
        else:
            negatives = [text for text in negatives for _ in range(num_images_per_prompt)]
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(negatives)} negative prompts")

        device = self._execution_device
        guided = scale != 1.0
        pooled, tokens, mask = self.encode_prompt(prompts + negatives if guided else prompts)
        dtype = self.unet.dtype
        shape = (len(prompts), *self.latent_shape(height, width))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        latents = latents.to(device, dtype)
        pooled, tokens, mask = pooled.to(device, dtype), tokens.to(device, dtype), mask.to(device)

        self.scheduler.set_timesteps(steps, device=device)
        latents = self.denoise(latents, (pooled, tokens, mask), scale, callback_on_step_end)
        images: Any = latents if output_type == "latent" else self.decode(latents)
        if output_type in ("np", "pil"):
            images = self.image_processor.pt_to_numpy(images)
        if output_type == "pil":
            images = self.image_processor.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
