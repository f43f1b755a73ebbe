"""Measurement of a pipeline's traits by a few quick calls of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.errors import ModelopsError, UsageError, first_line
from modelops.base.extras import missing_package
from modelops.models.pipelines.arguments import (
    configured_size,
    images_of,
    native_size,
    pipeline_arguments,
)
from modelops.models.pipelines.form import denoiser_of, read_form
from modelops.models.pipelines.inputs import takes_image
from modelops.models.pipelines.peek import peek
from modelops.models.pipelines.state import GlobalNoise, Samplers, watching_global_noise
from modelops.models.pipelines.tokens import PromptReader
from modelops.models.pipelines.traits import LONG_PROMPT, SHORT_PROMPT, Sharing, Traits
from modelops.models.request import GUIDANCE_OFF, ImageRequest

_NEGATIVE = "a dark house with a flag"
_LIKE_IT = ("blue flag", "two dogs", "green sun", "a dog")  # one has as many tokens as SHORT_PROMPT
_STEPS = 2
_OF_VIDEOS = ("num_frames", "video_length")
_SIDES = ((64, 64), (128, 128), (256, 256))  # of input images, where a call states no size
_FRACTIONS = (4, 2, 1)  # of the native size, tried in this order: these calls need not be pretty
_STEEP = 7.0  # a guidance scale
# Differences of images in [0, 1]: an effect is above the first; the same image in another call is
# below the second.
_FINE, _COARSE = (1e-4, 1e-3), (1e-2, 2e-2)
_HALVES = (torch.float16, torch.bfloat16)
_FAILURES = Exception  # each runtime has its own for what a network cannot do


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
        self._side: tuple[int, int] | None = None  # of an input image, if the pipeline wants one
        coarse = getattr(denoiser_of(pipeline), "dtype", torch.float32) in _HALVES
        coarse |= pipeline._execution_device.type != "cpu"  # where float32 may be TF32
        self._rounding, self._same = _COARSE if coarse else _FINE
        pipeline.set_progress_bar_config(disable=True)

    def traits(self) -> Traits:
        first = self._first()
        if self._side is not None:
            return self._of_input_images(first)
        pair = [first, replace(first, seed=2)]
        size = (first.height, first.width) if first.height and first.width else None
        found = Traits(self.form, quick_size=size, fixed_steps=self._fixed_steps(first))
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

    def _of_input_images(self, first: ImageRequest) -> Traits:
        """Return the traits of a pipeline that changes images, which are alone in their calls."""
        size = (first.height, first.width) if first.height and first.width else None
        of_input = None if self.form.takes("height") else configured_size(self.pipeline)
        with watching_global_noise() as drawn:
            alone = self._image([first])
        found = Traits(
            self.form, sharing="one", reason="it is made of an input image", wants_image=True,
            global_noise=drawn[0], native_size=native_size(self.pipeline),
            input_size=of_input, quick_size=size, fixed_steps=self._fixed_steps(first),
        )  # fmt: skip
        return self._guided(found, [first], alone)

    def _fixed_steps(self, first: ImageRequest) -> int | None:
        """Return the call's own number of steps if it takes no other."""
        own = self.form.default("num_inference_steps")
        if not isinstance(own, int):
            return None
        if first.steps is None:
            return own
        try:
            self._image([replace(first, steps=first.steps + 1)])
        except _FAILURES:
            return own
        return None

    def _first(self) -> ImageRequest:
        """Return a request that works, small if the pipeline lets it.

        Where it works with an input image alone, `_side` is set.

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
        if any(self.form.takes(name) for name in _OF_VIDEOS):
            raise UsageError(f"{self.form.pipeline} makes videos")
        prompt = Traits(self.form).any_prompt
        height, width = native_size(self.pipeline)
        request = ImageRequest(prompt=prompt, seed=1, steps=_STEPS)
        sizes = [(height // n, width // n) for n in _FRACTIONS] if height and width else []
        tries = [(size, _STEPS) for size in [*sizes, (None, None)]]
        problem: Exception | None = None
        for size, steps in [*tries, (tries[0][0], None)]:  # Ideogram has one number of steps
            request = replace(request, height=size[0], width=size[1], steps=steps)
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
        request = replace(request, steps=_STEPS)
        found = self._first_with_image(request, sizes) if takes_image(self.form) else None
        if found is not None:
            return found
        self._side = None
        if self.form.takes("image") and self.form.takes("control_image"):
            raise UsageError(
                f"{self.form.pipeline} wants an input image and a control image, and a request "
                "carries one"
            )
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

    def _first_with_image(
        self, request: ImageRequest, sizes: Sequence[tuple[int, int]]
    ) -> ImageRequest | None:
        for side in sizes or _SIDES:
            self._side = side
            size = side if sizes else (None, None)
            request = replace(request, height=size[0], width=size[1])
            try:
                self._image([request])
                return request
            except _FAILURES:
                continue
        return None

    def _image(self, requests: Sequence[ImageRequest], **more: Any) -> npt.NDArray[Any]:
        """Return the first image of a call, float [H, W, 3]."""
        return self._images(requests, **more)[0]

    def _images(self, requests: Sequence[ImageRequest], **more: Any) -> npt.NDArray[Any]:
        """Return the images of a call, float [N, H, W, 3]."""
        arguments = pipeline_arguments(self.form, requests, "")
        if self._side is not None:
            arguments |= Traits(self.form).made_up_images((len(requests), 3, *self._side))
        arguments |= more
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
        length = reader.lengths(SHORT_PROMPT)
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


def _distance(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    if first.shape != second.shape:
        return 1.0
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).max())
