"""Test calls of a pipeline, to catch the inputs and answers of its networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from modelops.base.errors import ExportError, UsageError
from modelops.models.pipelines.peek import peek
from modelops.models.pipelines.signatures import Method, parameters_of, template_of
from modelops.models.pipelines.state import GlobalNoise, Samplers
from modelops.models.pipelines.traits import LONG_PROMPT, Traits
from modelops.models.request import GUIDANCE_OFF, ImageRequest

OMITTED = ("safety_checker", "image_encoder")  # modelops' own filters stand in for the first
_PROMPTS = ("red heart", "two words more than that", "dog", "a house with a garden and the sun")
_STEPS = 2
# What a pipeline raises of a size that it cannot have, or of parts that do not fit together.
NOT_CALLABLE = (ValueError, RuntimeError, AssertionError, IndexError, TypeError)
_WHOLE: tuple[Method, ...] = ("forward",)
_HALVES: tuple[Method, ...] = ("decode", "encode")


@dataclass
class CaughtCall:
    """One call of a component.

    Attributes:
        arguments: templates by argument name.
        tensors: inputs by dotted name.
        output: template of the answer.
        outputs: tensors of the answer by dotted name.
    """

    arguments: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    output: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


Key = tuple[str, Method]
CaughtCalls = dict[Key, list[CaughtCall]]


@dataclass(frozen=True)
class Probe:
    """Settings of one call of the pipeline; None keeps the pipeline's own.

    Attributes:
        batch: number of images.
        height, width: in pixels.
        tokens: `max_sequence_length`, where the call has it.
        long: whether one of the prompts is beyond the first step of padding.
    """

    batch: int = 2
    height: int | None = None
    width: int | None = None
    tokens: int | None = None
    long: bool = False

    def requests(self, traits: Traits, *, steps: int = _STEPS) -> list[ImageRequest]:
        """Return the requests of the call."""
        prompts = [LONG_PROMPT, *_PROMPTS] if self.long else _PROMPTS
        return [
            ImageRequest(
                prompt=traits.class_prompt(index)
                if traits.is_of_classes
                else prompts[index % len(prompts)],
                seed=index, steps=steps, height=self.height, width=self.width,
            )
            for index in range(self.batch)
        ]  # fmt: skip


def watch(pipeline: Any, traits: Traits, probe: Probe, *, steps: int = _STEPS) -> CaughtCalls:
    """Call a pipeline and catch every call of its networks, in the order of their first call."""
    calls: CaughtCalls = {}

    def on_call(attribute: str, method: Method, call: CaughtCall) -> None:
        calls.setdefault((attribute, method), []).append(call)

    changes: dict[str, Any] = {}
    if probe.tokens and traits.form.takes("max_sequence_length"):
        changes["max_sequence_length"] = probe.tokens
    if probe.batch > 1 and not traits.takes_many:
        # Without guidance it does, and the networks are called alike.
        changes |= dict.fromkeys(traits.form.guidance[:1], GUIDANCE_OFF)
    with catching(pipeline, on_call):
        call_pipeline(pipeline, traits, probe.requests(traits, steps=steps), **changes)
    return calls


@contextmanager
def catching(
    pipeline: Any, on_call: Callable[[str, Method, CaughtCall], None], only: Sequence[str] = ()
) -> Iterator[None]:
    """Report every call of a pipeline's networks while the block runs.

    Args:
        pipeline: a diffusers pipeline in torch.
        on_call: gets the component's name, its method and the call.
        only: names of the components to watch; all when empty.
    """
    watched: list[tuple[torch.nn.Module, Method]] = []
    try:
        for attribute, module in pipeline.components.items():
            if not isinstance(module, torch.nn.Module) or attribute in OMITTED:
                continue
            if only and attribute not in only:
                continue
            # An autoencoder is called by its halves.
            methods: tuple[Method, ...] = _HALVES if hasattr(module, "decode") else _WHOLE
            for method in methods:
                original = getattr(module, method)
                setattr(module, method, _recorder(attribute, method, original, on_call))
                watched.append((module, method))
        yield
    finally:
        for module, method in watched:
            delattr(module, method)  # the class's own shows again


def _recorder(
    attribute: str,
    method: Method,
    original: Callable[..., Any],
    on_call: Callable[[str, Method, CaughtCall], None],
) -> Callable[..., Any]:
    parameters = parameters_of(original)

    @functools.wraps(original)  # `generate` of a language model reads its signature
    def recorded(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        call = CaughtCall({}, {})
        for name, value in given.items():
            # An autoencoder's generator is for diffusion decoders; the plain ones ignore it.
            if name != "generator":
                call.arguments[name] = template_of(value, name, call.tensors)
        call.tensors = {name: value.detach().clone() for name, value in call.tensors.items()}
        call.output = template_of(answer, "output", call.outputs, once=True)
        call.outputs = {name: value.detach() for name, value in call.outputs.items()}
        on_call(attribute, method, call)
        return answer

    return recorded


def call_pipeline(
    pipeline: Any, traits: Traits, requests: Sequence[ImageRequest], **changes: Any
) -> Any:
    """Call a pipeline as `PipelineSource` does, with an input image made up if it wants one.

    Args:
        pipeline: in torch or in another runtime.
        traits: of the pipeline.
        requests: of images that may share a call.
        changes: arguments in place of those.
    """
    if traits.fixed_steps:
        requests = [replace(request, steps=traits.fixed_steps) for request in requests]
    given = traits.arguments(requests)
    if traits.wants_image:
        shape = (len(requests), 3, requests[0].height or 0, requests[0].width or 0)
        given |= traits.made_up_images(shape)
    pipeline.set_progress_bar_config(disable=True)
    noise = GlobalNoise(requests[0].seed) if traits.global_noise else nullcontext()
    samplers = Samplers(pipeline)
    with torch.no_grad(), samplers.using(samplers.fresh()), noise:
        return pipeline(**given | changes)


def tensors_with_rows(pipeline: Any, traits: Traits) -> dict[str, bool]:
    """Return whether each tensor of a denoiser's call has a row for every row of the call.

    Calls for one image and for two are compared; the denoiser is not run. Empty where the pipeline
    makes one image a call.
    """
    height, width = traits.quick_size or (None, None)
    first = Probe(batch=1, height=height, width=width).requests(traits)[0]
    first = replace(first, prompt=traits.any_prompt)
    requests = [first, replace(first, seed=2)]
    one = peek(pipeline, lambda: call_pipeline(pipeline, traits, requests[:1]))
    two = peek(pipeline, lambda: call_pipeline(pipeline, traits, requests))
    if one is None or two is None:
        return {}
    return {
        name: bool(value.ndim) and len(two[name]) == 2 * len(value)
        for name, value in one.items()
        if name in two
    }


class _DecoderReachedError(Exception):
    """A pipeline is about to decode."""


@contextmanager
def stopping_before_decoder(pipeline: Any) -> Iterator[None]:
    """End the block where the pipeline would decode its latents."""

    def stop(*_args: Any, **_kwargs: Any) -> Any:
        raise _DecoderReachedError

    parts = [part for part in pipeline.components.values() if hasattr(part, "decode")]
    decoders = [part for part in parts if isinstance(part, torch.nn.Module)]
    hidden = [vars(part).get("decode") for part in decoders]
    for part in decoders:
        object.__setattr__(part, "decode", stop)
    try:
        with suppress(_DecoderReachedError):
            yield
    finally:
        for part, own in zip(decoders, hidden, strict=True):
            object.__delattr__(part, "decode")
            if own is not None:
                object.__setattr__(part, "decode", own)


def first_call(pipeline: Any, traits: Traits, probe: Probe) -> CaughtCalls:
    """Call `watch`, and give the pipeline's error in one line.

    Raises:
        UsageError: the pipeline does not take this size.
        ExportError: the pipeline cannot be called.
    """
    try:
        return watch(pipeline, traits, probe)
    except NOT_CALLABLE as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        name = type(pipeline).__name__
        if probe.height and probe.width and "divisible" in reason:
            raise UsageError(
                f"{name} makes no images of {probe.height} x {probe.width} pixels: {reason}",
                hint="give --size another height and width",
            ) from error
        raise ExportError(
            f"{name} cannot be called: {reason}",
            hint="run with --debug for the pipeline's own report",
        ) from error


def first_that_works(pipeline: Any, traits: Traits, probes: Sequence[Probe]) -> CaughtCalls | None:
    """`watch` with the first of some probes that the pipeline takes; None if it takes none."""
    for probe in probes:
        try:
            return watch(pipeline, traits, probe, steps=1)
        except NOT_CALLABLE:
            continue  # a size that this network cannot have
    return None
