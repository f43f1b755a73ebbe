"""The networks of a diffusers pipeline, found by watching it work.

Nothing here knows a model by name. A pipeline is called a few times with other batch sizes, picture
sizes and prompt lengths; every call of a network is caught. What it was called with becomes the
graph's inputs, and the axes that changed between the calls become its dynamic axes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from modelops.errors import ExportError
from modelops.export.onnx.writer import Example
from modelops.export.signatures import (
    TIMESTEP_NAMES,
    Method,
    Signature,
    parameters_of,
    rebuild,
    template_of,
)
from modelops.models.sources import native_size

Role = Literal["denoiser", "control", "text_encoder", "encoder", "decoder"]
Axes = dict[str, dict[int, str]]
OMITTED = ("safety_checker", "image_encoder")  # modelops' own filters stand in for the first
_PROMPTS = ("a red heart", "two words more than that", "dog", "a house with a garden and the sun")
_STEPS = 2
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
Calls = dict[Key, list[CaughtCall]]


@dataclass
class Component:
    """A network as a graph will have it.

    Attributes:
        name: its folder in the artifact: the pipeline's own name for it, with "_encoder" or
            "_decoder" added for the halves of an autoencoder.
        attribute: the pipeline's own name for it.
        role: what it does.
        flat: takes the tensors of `example` as positions, returns a tuple of tensors.
        example: input name to (tensor, names of its dynamic axes).
        outputs: output name to the names of its dynamic axes.
        signature: how the pipeline calls it.
    """

    name: str
    attribute: str
    role: Role
    flat: FlatModule
    example: Example
    outputs: Axes
    signature: Signature

    @property
    def rows_in(self) -> list[str]:
        """Inputs with a row for every picture; the others are the same for all."""
        return self.signature.batch

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """The torch network on a graph's feed of numpy arrays: the reference for parity."""
        values = [torch.from_numpy(feed[name]) for name in self.signature.inputs]
        with torch.no_grad():
            return [item.numpy() for item in self.flat(*values)]


class FlatModule(torch.nn.Module):
    """A component with its tensors as positions and everything else fixed."""

    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.signature = signature

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        signature = self.signature
        named = dict(zip(signature.inputs, tensors, strict=True))
        kwargs = {name: rebuild(item, named) for name, item in signature.arguments.items()}
        if signature.method == "forward":
            answer = self.module(**kwargs)
        else:
            answer = getattr(self.module, signature.method)(**kwargs)
        found: dict[str, torch.Tensor] = {}
        template_of(answer, "output", found)
        return tuple(found[name] for name in signature.outputs)


@dataclass(frozen=True)
class Probe:
    """What one call of the pipeline is made with."""

    batch: int = 2
    height: int | None = None
    width: int | None = None
    tokens: int | None = None


def find_components(
    pipeline: Any,
    *,
    size: tuple[int, int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Component]:
    """Call a pipeline a few times and describe every network that worked.

    Args:
        pipeline: a diffusers pipeline in torch, float32, in evaluation mode.
        size: height and width in pixels of the calls; the pipeline's own when not given. Where a
            network's size cannot vary it is the only one that the graphs will take.
        on_progress: called with (calls done, calls).

    Raises:
        ExportError: the pipeline wants an argument that cannot be made up, or cannot be called.
    """
    height, width = size or native_size(pipeline)
    tokens = _token_limit(pipeline)
    base = Probe(height=height, width=width, tokens=tokens)
    calls = watch(pipeline, base)
    axes: dict[Key, tuple[Axes, Axes]] = {}
    variations: list[tuple[str, list[Probe]]] = [
        ("batch", [Probe(batch=3, height=height, width=width, tokens=tokens)])
    ]
    if height and width:
        heights, widths = ([size * n // 4 for n in (3, 2, 5, 6, 8)] for size in (height, width))
        variations += [
            ("height", [Probe(height=size, width=width, tokens=tokens) for size in heights]),
            ("width", [Probe(height=height, width=size, tokens=tokens) for size in widths]),
        ]
    if tokens:
        variations.append(("tokens", [Probe(height=height, width=width, tokens=tokens // 2)]))
    for done, (axis, probes) in enumerate(variations):
        varied = _first_that_works(pipeline, probes)
        if varied is not None:
            for key, caught in calls.items():
                if key in varied:
                    known = axes.setdefault(key, ({}, {}))
                    _note_axes(caught[0].tensors, varied[key][0].tensors, axis, known[0])
                    _note_axes(caught[0].outputs, varied[key][0].outputs, axis, known[1])
        if on_progress:
            on_progress(done + 1, len(variations))
    components = [
        _describe(pipeline, attribute, method, caught, *axes.get((attribute, method), ({}, {})))
        for (attribute, method), caught in calls.items()
    ]
    components += _encoders(pipeline, components, height, width)
    if not any(component.role == "denoiser" for component in components):
        raise ExportError(f"{type(pipeline).__name__}: no network is called at every step")
    return sorted(components, key=lambda item: (_ORDER.index(item.role), item.name))


_ORDER: tuple[Role, ...] = ("denoiser", "control", "text_encoder", "encoder", "decoder")


def watch(
    pipeline: Any, probe: Probe, **changes: Any
) -> dict[tuple[str, Method], list[CaughtCall]]:
    """Call a pipeline and catch every call of its networks, in the order of their first call."""
    calls: dict[tuple[str, Method], list[CaughtCall]] = {}

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
        call.output = template_of(answer, "output", call.outputs)
        call.outputs = {name: value.detach() for name, value in call.outputs.items()}
        on_call(attribute, method, call)
        return answer

    return recorded


def call_pipeline(pipeline: Any, probe: Probe, *, steps: int = _STEPS, **changes: Any) -> Any:
    """One call of any text-to-image or unconditional pipeline; what it has no use for is left out.

    Raises:
        ExportError: it wants an argument that cannot be made up.
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
    # A ControlNet pipeline's picture has a default of None, and no call works without it.
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


def _token_limit(pipeline: Any) -> int | None:
    parameter = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    return int(parameter.default) if parameter and isinstance(parameter.default, int) else None


def _first_that_works(pipeline: Any, probes: Sequence[Probe]) -> Calls | None:
    for probe in probes:
        try:
            return watch(pipeline, probe, steps=1)
        except (ValueError, RuntimeError, AssertionError, IndexError):
            continue  # a size that this network cannot have
    return None


def _note_axes(
    base: Mapping[str, torch.Tensor], varied: Mapping[str, torch.Tensor], axis: str, known: Axes
) -> None:
    for name, tensor in base.items():
        other = varied.get(name)
        if other is None or other.ndim != tensor.ndim:
            continue
        for index, (first, second) in enumerate(zip(tensor.shape, other.shape, strict=True)):
            if first != second:
                axes = known.setdefault(name, {})
                # Packed latents grow with height and with width: one axis of both.
                axes[index] = f"{axes[index]}_{axis}" if index in axes else axis


def _describe(
    pipeline: Any,
    attribute: str,
    method: Method,
    calls: list[CaughtCall],
    input_axes: Axes,
    output_axes: Axes,
) -> Component:
    module = getattr(pipeline, attribute)
    call = calls[0]
    tensors = dict(call.tensors)
    batched = {name for name, axes in input_axes.items() if "batch" in axes.values()}
    rows = max((tensors[n].shape[0] for n in batched if input_axes[n].get(0) == "batch"), default=1)
    for name in TIMESTEP_NAMES:
        if name in tensors and tensors[name].numel() == 1 and rows > 1:
            # One number for all rows; a row each lets rows of different noise share a call.
            tensors[name] = tensors[name].reshape(-1).expand(rows).clone()
            input_axes = {**input_axes, name: {0: "batch"}}
            batched.add(name)
    integers, booleans = [], []
    for name, tensor in tensors.items():
        if name in TIMESTEP_NAMES or tensor.is_floating_point():
            tensors[name] = tensor.to(torch.float32)
        elif tensor.dtype == torch.bool:
            booleans.append(name)
        else:
            integers.append(name)
            tensors[name] = tensor.to(torch.int64)
    signature = Signature(
        method=method,
        parameters=parameters_of(getattr(type(module), method)),
        arguments=call.arguments,
        output=call.output,
        inputs=list(tensors),
        outputs=list(call.outputs),
        integers=integers,
        booleans=booleans,
        batch=[name for name in tensors if name in batched],
    )
    return Component(
        name=attribute if method == "forward" else f"{attribute}_{method}r",
        attribute=attribute,
        role=_role(attribute, module, method, len(calls), bool(integers)),
        flat=FlatModule(module, signature).eval(),
        example={name: (tensor, input_axes.get(name, {})) for name, tensor in tensors.items()},
        outputs={name: output_axes.get(name, {}) for name in call.outputs},
        signature=signature,
    )


def _role(attribute: str, module: Any, method: Method, calls: int, integers: bool) -> Role:
    if method != "forward":
        return "encoder" if method == "encode" else "decoder"
    if "ControlNet" in type(module).__name__:
        return "control"
    if attribute.startswith("text_encoder") or (calls == 1 and integers):
        return "text_encoder"
    return "denoiser"


def _encoders(
    pipeline: Any, components: list[Component], height: int | None, width: int | None
) -> list[Component]:
    """The encoding half of every autoencoder whose decoding half was called."""
    found = []
    named = {component.name for component in components}
    for component in components:
        module = getattr(pipeline, component.attribute)
        if component.role != "decoder" or not hasattr(module, "encode") or not height or not width:
            continue
        if f"{component.attribute}_encoder" in named:
            continue
        channels = int(getattr(module.config, "in_channels", 3))
        shape = (2, channels, height, width)
        picture = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        call = CaughtCall(
            {parameters_of(type(module).encode)[0]: {"tensor": "picture"}}, {"picture": picture}
        )
        with torch.no_grad():
            call.output = template_of(module.encode(picture), "output", call.outputs)
        inputs: Axes = {"picture": {0: "batch", 2: "height", 3: "width"}}
        outputs: Axes = {name: {0: "batch", 2: "height", 3: "width"} for name in call.outputs}
        found.append(_describe(pipeline, component.attribute, "encode", [call], inputs, outputs))
    return found
