"""Test calls of a pipeline, to catch the inputs and answers of its networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from modelops.base.errors import ExportError, UsageError
from modelops.models.pipelines.signatures import Method, parameters_of, template_of

OMITTED = ("safety_checker", "image_encoder")  # modelops' own filters stand in for the first
# With guidance diffusers 0.42 gives their transformer two timesteps whatever the number of prompts.
ONE_GUIDED_PROMPT = ("PRXPipeline", "PRXPixelPipeline")
_PROMPTS = ("a red heart", "two words more than that", "dog", "a house with a garden and the sun")
_STEPS = 2
# What a pipeline raises of a size that it cannot have, or of parts that do not fit together.
_NOT_CALLABLE = (ValueError, RuntimeError, AssertionError, IndexError, TypeError)
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
    """Settings of one call of the pipeline; None keeps the pipeline's own."""

    batch: int = 2
    height: int | None = None
    width: int | None = None
    tokens: int | None = None


def watch(pipeline: Any, probe: Probe, **changes: Any) -> CaughtCalls:
    """Call a pipeline and catch every call of its networks, in the order of their first call."""
    calls: CaughtCalls = {}

    def on_call(attribute: str, method: Method, call: CaughtCall) -> None:
        calls.setdefault((attribute, method), []).append(call)

    with catching(pipeline, on_call):
        call_pipeline(pipeline, probe, **changes)
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


def call_pipeline(pipeline: Any, probe: Probe, *, steps: int = _STEPS, **changes: Any) -> Any:
    """Call any text-to-image or unconditional pipeline once, without arguments it does not take.

    Raises:
        ExportError: the pipeline needs an argument that cannot be guessed.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    prompts = [_PROMPTS[index % len(_PROMPTS)] for index in range(probe.batch)]
    generators = [torch.Generator("cpu").manual_seed(index) for index in range(probe.batch)]
    wanted: dict[str, Any] = {
        "prompt": prompts,
        "height": probe.height,
        "width": probe.width,
        "max_sequence_length": probe.tokens,
        "num_inference_steps": steps,
        "generator": generators,
        "output_type": "np",
        "use_resolution_binning": False,  # would change the size that is asked for
        "clean_caption": False,
        **changes,
    }
    if "prompt" not in parameters:
        wanted["batch_size"] = probe.batch
    if probe.batch > 1 and type(pipeline).__name__ in ONE_GUIDED_PROMPT:
        wanted["guidance_scale"] = 1.0  # off: the networks are called alike
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    for name in required:
        if name in ("image", "control_image"):
            shape = (probe.batch, 3, probe.height or 0, probe.width or 0)
            wanted[name] = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        elif name == "class_labels":
            wanted[name] = list(range(probe.batch))
    given = {n: v for n, v in wanted.items() if n in parameters and v is not None}
    # A ControlNet pipeline's image has a default of None, and no call works without it.
    if "controlnet_conditioning_scale" in parameters and "image" in parameters:
        shape = (probe.batch, 3, probe.height or 0, probe.width or 0)
        given["image"] = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    missing = [name for name in required if name not in given]
    if missing:
        raise ExportError(
            f"{type(pipeline).__name__} wants {', '.join(missing)}, which export cannot make up"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**given)


def first_call(pipeline: Any, probe: Probe) -> CaughtCalls:
    """Call `watch`, and give the pipeline's error in one line.

    Raises:
        UsageError: the pipeline does not take this size.
        ExportError: the pipeline cannot be called.
    """
    try:
        return watch(pipeline, probe)
    except _NOT_CALLABLE as error:
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


def first_that_works(pipeline: Any, probes: Sequence[Probe]) -> CaughtCalls | None:
    """`watch` with the first of some probes that the pipeline takes; None if it takes none."""
    for probe in probes:
        try:
            return watch(pipeline, probe, steps=1)
        except _NOT_CALLABLE:
            continue  # a size that this network cannot have
    return None
