"""Traits of a pipeline that no configuration states; `observe` measures them.

Which argument is the guidance scale, whether a negative prompt changes anything, which prompts may
share a call without changing each other's images, and whether noise comes from elsewhere than the
generators of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from modelops.base.errors import UsageError
from modelops.models.pipelines.arguments import pipeline_arguments
from modelops.models.pipelines.form import CallForm
from modelops.models.pipelines.inputs import image_arguments, takes_image
from modelops.models.request import GUIDANCE_OFF, ImageRequest

Sharing = Literal["any", "same length", "one"]
SHORT_PROMPT = "red heart"
# Past the first step of padding (8 or 16 tokens) and short of every limit (77).
LONG_PROMPT = (
    "a house with a garden and the sun of the flag and a dog with a cat and a face of the red sun"
)


@dataclass(frozen=True)
class Traits:
    """Traits of a pipeline.

    Attributes:
        form: of its call.
        guidance: name of the argument that is the guidance scale; "" if none has an effect.
        guided_by_negative: whether that scale has an effect beside a negative prompt alone.
        negative: whether a negative prompt has an effect.
        sharing: which prompts may share a call: "any", those of the "same length" in tokens, or
            "one" image a call.
        reason: of `sharing`, in words; "" for "any".
        takes_many: whether a call with guidance takes several prompts.
        global_noise: whether noise is drawn from global generators, which are seeded then.
        wants_image: whether no call works without an input image.
        native_size: height and width in pixels of a call that states none.
        fixed_size: height and width in pixels of every image; None where a call can state them.
        input_size: height and width in pixels of input images, where an image has their size.
        fixed_steps: number of steps of every image; None where a call can state another.
        quick_size: height and width of a small image that the pipeline takes; None where a call
            cannot state them.
    """

    form: CallForm
    guidance: str = ""
    guided_by_negative: bool = False
    negative: bool = False
    sharing: Sharing = "any"
    reason: str = ""
    takes_many: bool = True
    global_noise: bool = False
    wants_image: bool = False
    native_size: tuple[int | None, int | None] = (None, None)
    fixed_size: tuple[int, int] | None = None
    input_size: tuple[int, int] | None = None
    fixed_steps: int | None = None
    quick_size: tuple[int, int] | None = None

    def check(self, request: ImageRequest) -> None:
        """Refuse what would have no effect, and a prompt that is no class.

        Raises:
            UsageError: guidance, a negative prompt or a size without an effect; no such class.
        """
        name = self.form.pipeline
        if self.is_of_classes:
            self.form.class_number(request.prompt)
        self._check_image(request)
        if request.negative_prompt and not self.negative:
            raise UsageError(f"a negative prompt has no effect on images of {name}")
        guided = (self.guidance_of(request) or GUIDANCE_OFF) > GUIDANCE_OFF
        if request.negative_prompt and self.guided_by_negative and not guided:
            raise UsageError(
                f"a negative prompt has no effect on images of {name} without guidance",
                hint="give a guidance scale above 1",
            )
        if request.guidance not in (None, GUIDANCE_OFF, self.default_guidance):
            if not self.guidance:
                raise UsageError(f"guidance has no effect on images of {name}", hint="leave it out")
            if self.guided_by_negative and not request.negative_prompt:
                raise UsageError(
                    f"guidance has no effect on images of {name} without a negative prompt",
                    hint="leave it out",
                )
        if self.fixed_steps and request.steps not in (None, self.fixed_steps):
            raise UsageError(
                f"{name} makes images in {self.fixed_steps} steps only", hint="leave --steps out"
            )
        asked = request.height or request.width
        if asked and self.size_of_input:
            raise UsageError(
                f"{name} makes images of the size of its input images", hint="leave the size out"
            )
        if asked and self.fixed_size not in (None, (request.height, request.width)):
            height, width = self.fixed_size or (0, 0)
            raise UsageError(
                f"{name} makes images of {width}x{height} pixels only", hint="leave the size out"
            )

    def _check_image(self, request: ImageRequest) -> None:
        """Refuse an image that is lacking or has no effect."""
        if request.image is None:
            self.require_no_image()
        elif not takes_image(self.form):
            raise UsageError(f"{self.form.pipeline} takes no input image", hint="leave it out")

    def require_no_image(self) -> None:
        """Refuse a pipeline that wants an image.

        Raises:
            UsageError: it does.
        """
        if self.wants_image:
            raise UsageError(
                f"{self.form.pipeline} changes an image that it is given, and makes none of a "
                "prompt alone",
                hint="sample and eval take a folder of them with --input-images",
            )

    @property
    def size_of_input(self) -> bool:
        """Whether an image has the size of its input image."""
        return self.input_size is not None

    @property
    def default_guidance(self) -> float | None:
        """Guidance scale of a call that states nothing; None where it is off or has no effect."""
        return self.guidance_of(ImageRequest(prompt="", seed=0))

    def guidance_of(self, request: ImageRequest) -> float | None:
        """Return the guidance scale that an image is made with; None where it has no effect."""
        if not self.guidance or (self.guided_by_negative and not request.negative_prompt):
            return None
        if request.guidance is not None:
            return request.guidance
        value = self.form.default(self.guidance)
        return float(value) if isinstance(value, (int, float)) else None

    @property
    def own_size(self) -> tuple[int | None, int | None]:
        """Native size where there can be another; else None twice."""
        if self.input_size is not None:
            return self.input_size
        return (None, None) if self.fixed_size else self.native_size

    @property
    def is_of_classes(self) -> bool:
        """Whether a prompt is the name or number of a class."""
        return self.form.subject == "class"

    @property
    def any_prompt(self) -> str:
        """A prompt that the pipeline takes."""
        return self.class_prompt(0) if self.is_of_classes else SHORT_PROMPT

    @property
    def other_prompt(self) -> str:
        """A longer prompt that the pipeline takes."""
        return self.class_prompt(1) if self.is_of_classes else LONG_PROMPT

    def usable_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts, or as many classes where the pipeline makes images of classes."""
        if not self.is_of_classes:
            return list(prompts)
        return [self.class_prompt(number) for number in range(len(prompts))]

    def class_prompt(self, number: int) -> str:
        """A prompt that is a class; numbers beyond the last begin anew."""
        return str(number % max(1, self.form.n_classes))

    def made_up_images(self, shape: tuple[int, int, int, int]) -> dict[str, Any]:
        """Return arguments for a pipeline that wants images: noise [N, 3, H, W] in [0, 1], and the
        strength at which every step is taken."""
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        given = {
            "image": images, "control_image": images, "mask_image": images[:, :1].round(),
            "strength": 1.0,
        }  # fmt: skip
        return {name: value for name, value in given.items() if self.form.takes(name)}

    def arguments(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """Return the arguments of a call for these images; see `pipeline_arguments`.

        A request with an input image is alone in its call.
        """
        negative = any(request.negative_prompt for request in requests)
        name = "" if self.guided_by_negative and not negative else self.guidance
        given = pipeline_arguments(self.form, requests, name)
        for request in requests:
            if request.image is not None:
                given |= image_arguments(self.form, request.image)
        return given
