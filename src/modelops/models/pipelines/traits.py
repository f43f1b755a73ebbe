"""Traits of a pipeline that no configuration states, measured by a few quick calls of it.

Which argument is the guidance scale, whether a negative prompt changes anything, which prompts may
share a call without changing each other's images, and whether noise comes from elsewhere than the
generators of the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.errors import ModelopsError, UsageError, first_line
from modelops.base.extras import missing_package
from modelops.models.pipelines.arguments import native_size, pipeline_arguments
from modelops.models.pipelines.form import CallForm, denoiser_of, read_form
from modelops.models.pipelines.peek import peek
from modelops.models.pipelines.state import GlobalNoise, Samplers, watching_global_noise
from modelops.models.pipelines.tokens import PromptReader
from modelops.models.request import GUIDANCE_OFF, ImageRequest

Sharing = Literal["any", "same length", "one"]
_PROMPT, _NEGATIVE = "red heart", "a dark house with a flag"
_LIKE_IT = ("blue flag", "two dogs", "green sun", "a dog")  # one of them has as many tokens
# Past the first step of padding (8 or 16 tokens) and short of every limit (77).
LONG_PROMPT = (
    "a house with a garden and the sun of the flag and a dog with a cat and a face of the red sun"
)
_STEPS = 2
_STEPS_FROM_IMAGE = 8  # of which pipelines make a share, 0.3 and more
_FRACTIONS = (4, 2, 1)  # of the native size, tried in this order: these calls need not be pretty
_STEEP = 7.0  # a guidance scale
# Differences of images in [0, 1]: an effect is above the first; the same image in another call is
# below the second.
_FINE, _COARSE = (1e-4, 1e-3), (1e-2, 2e-2)
_HALVES = (torch.float16, torch.bfloat16)
_FAILURES = Exception  # each runtime has its own for what a network cannot do


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
    quick_size: tuple[int, int] | None = None

    def check(self, request: ImageRequest) -> None:
        """Refuse what would have no effect, and a prompt that is no class.

        Raises:
            UsageError: guidance, a negative prompt or a size without an effect; no such class.
        """
        name = self.form.pipeline
        if self.is_of_classes and not self.wants_image:
            self.form.class_number(request.prompt)
        self.require_no_image()
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
        asked = request.height or request.width
        if asked and self.fixed_size not in (None, (request.height, request.width)):
            height, width = self.fixed_size or (0, 0)
            raise UsageError(
                f"{name} makes images of {width}x{height} pixels only", hint="leave the size out"
            )

    def require_no_image(self) -> None:
        """Refuse a pipeline that wants an image.

        Raises:
            UsageError: it does.
        """
        if self.wants_image:
            raise UsageError(
                f"{self.form.pipeline} changes an image that it is given, and makes none of a "
                "prompt alone"
            )

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
        """Native size where a call can state another; else None twice."""
        return (None, None) if self.fixed_size else self.native_size

    @property
    def is_of_classes(self) -> bool:
        """Whether a prompt is the name or number of a class."""
        return self.form.subject == "class"

    @property
    def any_prompt(self) -> str:
        """A prompt that the pipeline takes."""
        return self.class_prompt(0) if self.is_of_classes else _PROMPT

    @property
    def other_prompt(self) -> str:
        """A longer prompt that the pipeline takes."""
        return self.class_prompt(1) if self.is_of_classes else LONG_PROMPT

    def class_prompt(self, number: int) -> str:
        """A prompt that is a class; numbers beyond the last begin anew."""
        return str(number % max(1, self.form.n_classes))

    def made_up_images(self, shape: tuple[int, int, int, int]) -> dict[str, torch.Tensor]:
        """Return arguments for a pipeline that wants images: noise [N, 3, H, W] in [0, 1]."""
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        given = {"image": images, "control_image": images, "mask_image": images[:, :1].round()}
        return {name: value for name, value in given.items() if self.form.takes(name)}

    def arguments(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """Return the arguments of a call for these images; see `pipeline_arguments`."""
        negative = any(request.negative_prompt for request in requests)
        name = "" if self.guided_by_negative and not negative else self.guidance
        return pipeline_arguments(self.form, requests, name)


def find_traits(pipeline: Any) -> Traits:
    """Call a pipeline a few times with two steps, and compare the images.

    The calls are small where the pipeline takes a small size.

    Raises:
        UsageError: it cannot be called.
        MissingExtraError: a package that it needs is not installed.
    """
    return _Observer(pipeline).traits()


class _Observer:
    """Caller of a pipeline that compares what changes its images."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.form = read_form(pipeline)
        self._samplers = Samplers(pipeline)
        coarse = getattr(denoiser_of(pipeline), "dtype", torch.float32) in _HALVES
        coarse |= pipeline._execution_device.type != "cpu"  # where float32 may be TF32
        self._rounding, self._same = _COARSE if coarse else _FINE
        pipeline.set_progress_bar_config(disable=True)

    def traits(self) -> Traits:
        first = self._first()
        if first is None:
            native = native_size(self.pipeline)
            return Traits(self.form, sharing="one", wants_image=True, native_size=native)
        pair = [first, replace(first, seed=2)]
        size = (first.height, first.width) if first.height and first.width else None
        found = Traits(self.form, quick_size=size)
        if not self.form.takes("height"):
            height, width = self._image([first]).shape[:2]
            found = replace(found, fixed_size=(height, width), native_size=(height, width))
        else:
            found = replace(found, native_size=self._native_size(first))
        reason = "its call takes one prompt"
        many = not self.form.bare_prompt
        if many:
            try:
                with watching_global_noise() as drawn:
                    alone = self._image(pair)
            except _FAILURES as error:
                many, reason = False, f"{reason} ({first_line(error)})"
        if not many:
            found = replace(found, sharing="one", reason=reason, takes_many=False)
            pair = pair[:1]
            with watching_global_noise() as drawn:
                alone = self._image(pair)
        if drawn[0]:
            reason = "its noise comes from a global generator"
            found = replace(found, sharing="one", reason=reason, global_noise=True)
        elif many:
            sharing, reason = self._sharing(pair)
            found = replace(found, sharing=sharing, reason=reason)
        return self._guided(found, pair, alone)

    def _first(self) -> ImageRequest | None:
        """Return a request that works, small if the pipeline lets it; None if it wants an image.

        Raises:
            UsageError: none does.
        """
        given = {"prompt", "class_labels", *Traits(self.form).made_up_images((1, 3, 1, 1))}
        lacking = [name for name in self.form.required if name not in given]
        if lacking:
            raise UsageError(
                f"{self.form.pipeline} wants {' and '.join(lacking)}, which no request carries",
                hint="give the whole pipeline that it is a part of",
            )
        prompt = Traits(self.form).any_prompt
        height, width = native_size(self.pipeline)
        request = ImageRequest(prompt=prompt, seed=1, steps=_STEPS)
        sizes = [(height // n, width // n) for n in _FRACTIONS] if height and width else []
        problem: Exception | None = None
        for size in [*sizes, (None, None)]:
            request = replace(request, height=size[0], width=size[1])
            for bare in (False, True) if self.form.subject == "prompt" else (False,):
                self.form = replace(self.form, bare_prompt=bare)
                try:
                    self._image([request])
                    return request
                except ImportError as error:
                    raise missing_package(error, needed_for=self.form.pipeline) from error
                except _FAILURES as error:
                    problem = problem if bare else error
        self.form = replace(self.form, bare_prompt=False)
        if self.form.takes("image") and self._works_with_an_image(request, height, width):
            return None
        assert problem is not None
        if isinstance(problem, ModelopsError):
            raise problem
        raise UsageError(
            f"{self.form.pipeline} cannot be called: {first_line(problem)}",
            hint="run with --debug for the pipeline's own report",
        ) from problem

    def _native_size(self, request: ImageRequest) -> tuple[int | None, int | None]:
        """Return the size of a call that states none, by the latents that it begins with.

        What signature and configurations say is taken if it gives the same latents.
        """
        height, width = native_size(self.pipeline)
        own = self._latents(request, None, None)
        known = self._latents(request, height, width)
        if own is None or known is None or own == known or not (height and width):
            return height, width
        if len(own) < 2 or len(own) != len(known):
            return height, width
        found = round(height * own[-2] / known[-2]), round(width * own[-1] / known[-1])
        return found if self._latents(request, *found) == own else (height, width)

    def _latents(
        self, request: ImageRequest, height: int | None, width: int | None
    ) -> tuple[int, ...] | None:
        """Return the shape of the latents; a square's sides where a call has them as one row."""
        asked = replace(request, height=height, width=width)
        tensors = peek(self.pipeline, lambda: self._image([asked]))
        shapes = [tuple(value.shape) for value in (tensors or {}).values() if value.ndim >= 3]
        if not shapes:
            return None
        first = shapes[0]
        if len(first) == 3:  # [rows, pixels, channels]
            side = math.isqrt(first[1])
            return (side, side) if side * side == first[1] else first
        return first

    def _works_with_an_image(
        self, request: ImageRequest, height: int | None, width: int | None
    ) -> bool:
        given = Traits(self.form).made_up_images((1, 3, height or 256, width or 256))
        try:
            self._image([replace(request, steps=_STEPS_FROM_IMAGE)], **given)
        except _FAILURES:
            return False
        return True

    def _image(self, requests: Sequence[ImageRequest], **more: Any) -> npt.NDArray[Any]:
        """Return the first image of a call, float [H, W, 3]."""
        return self._images(requests, **more)[0]

    def _images(self, requests: Sequence[ImageRequest], **more: Any) -> npt.NDArray[Any]:
        """Return the images of a call, float [N, H, W, 3]."""
        arguments = pipeline_arguments(self.form, requests, "") | more
        with torch.no_grad(), self._samplers.using(self._samplers.fresh()):
            return images_of(self.pipeline(**arguments))

    def _sharing(self, pair: list[ImageRequest]) -> tuple[Sharing, str]:
        """Return which prompts may share a call, and why not any.

        Each of two images is compared with the same one in a call of its own, and beside other
        prompts in the same place of a call.
        """
        reader = PromptReader(self.pipeline)
        first, second = pair
        alone = [self._images([one])[0] for one in pair]

        def keeps(*requests: ImageRequest) -> bool:
            """Return whether the images of the pair in a call are those of the pair alone."""
            try:
                images = self._images(requests)
            except _FAILURES:
                return False
            return all(
                _distance(images[requests.index(one)], own) <= self._same
                for one, own in zip(pair, alone, strict=True)
                if one in requests
            )

        def beside(prompt: str) -> bool:
            other = replace(second, prompt=prompt, seed=3)
            return keeps(first, other) and keeps(other, second)

        if not keeps(first, second):
            return "one", "an image depends on the others in its call"
        if self.form.subject != "prompt" or beside(LONG_PROMPT):
            return "any", ""
        length = reader.lengths(_PROMPT)
        alike = next((text for text in _LIKE_IT if reader.lengths(text) == length), _LIKE_IT[0])
        if length and beside(alike):
            return "same length", "it pads prompts to the longest of a call"
        return "one", "an image depends on the other prompts of its call"

    def _guided(self, found: Traits, pair: list[ImageRequest], alone: npt.NDArray[Any]) -> Traits:
        """Add what guidance and a negative prompt do."""
        seeded = found.global_noise

        def changes(base: npt.NDArray[Any], requests: list[ImageRequest], **more: Any) -> bool:
            try:
                return _distance(self._seeded(requests, seeded, **more), base) > self._rounding
            except _FAILURES:
                return False

        if seeded:
            alone = self._seeded(pair, seeded)
        name = next((n for n in self.form.guidance if changes(alone, pair, **self._other(n))), "")
        if not (self.form.takes("negative_prompt") and self.form.subject == "prompt"):
            return replace(found, guidance=name)
        negative = [replace(one, negative_prompt=_NEGATIVE) for one in pair]
        try:
            base = self._seeded(negative, seeded)
        except _FAILURES as error:
            if len(pair) == 1:
                return replace(found, guidance=name)
            reason = f"its call takes one negative prompt ({first_line(error)})"
            found = replace(found, sharing="one", reason=reason)
            return self._guided(found, pair[:1], self._seeded(pair[:1], seeded))
        if name:
            guided = {name: max(self.form.default(name) or 0.0, _STEEP)}
            works = changes(self._seeded(pair, seeded, **guided), negative, **guided)
            return replace(found, guidance=name, negative=works)
        name = next(
            (n for n in self.form.guidance if changes(base, negative, **self._other(n))), ""
        )
        works = bool(name) or changes(alone, negative)
        return replace(found, guidance=name, guided_by_negative=bool(name), negative=works)

    def _seeded(
        self, requests: Sequence[ImageRequest], seeded: bool, **more: Any
    ) -> npt.NDArray[Any]:
        if not seeded:
            return self._image(requests, **more)
        with GlobalNoise(requests[0].seed):
            return self._image(requests, **more)

    def _other(self, name: str) -> dict[str, float]:
        """Return a scale that is not the call's own."""
        default = self.form.default(name)
        on = isinstance(default, (int, float)) and default > GUIDANCE_OFF
        return {name: GUIDANCE_OFF if on else _STEEP}


def images_of(output: Any) -> npt.NDArray[Any]:
    """Return the images [N, H, W, 3] in [0, 1] of a pipeline's answer.

    Raises:
        UsageError: it holds none.
    """
    images = getattr(output, "images", getattr(output, "image", None))
    if images is None:
        fields = ", ".join(output) if isinstance(output, dict) else type(output).__name__
        raise UsageError(f"the pipeline makes no images: its answer has {fields}")
    found = np.asarray(images)
    if found.ndim != 4 or found.shape[-1] not in (1, 3, 4):
        raise UsageError(
            f"the pipeline's images have the shape {list(found.shape)}, not [N, H, W, 3]"
        )
    if found.shape[-1] == 1:
        return np.repeat(found, 3, axis=-1)
    return found[..., :3]  # a fourth channel is opacity


def _distance(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    if first.shape != second.shape:
        return 1.0
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).max())
