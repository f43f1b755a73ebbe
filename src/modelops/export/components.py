"""Networks of a diffusers pipeline, found by watching its calls.

No model is known by name here. A pipeline is called a few times with different batch sizes, image
sizes and prompt lengths, and every call of a network is caught. The arguments become the graph's
inputs, and the axes that changed between the calls become its dynamic axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from modelops.base.errors import ExportError
from modelops.models.pipelines.observe import find_traits
from modelops.models.pipelines.signatures import (
    TIMESTEP_NAMES,
    Example,
    Method,
    Signature,
    parameters_of,
    rebuild,
    template_of,
)
from modelops.models.pipelines.traits import Traits
from modelops.models.pipelines.watch import (
    NOT_CALLABLE,
    CaughtCall,
    Key,
    Probe,
    first_call,
    first_that_works,
)

Role = Literal["denoiser", "control", "text_encoder", "encoder", "decoder"]
Axes = dict[str, dict[int, str]]


@dataclass
class Component:
    """Network of a pipeline, prepared for a graph.

    Attributes:
        name: its folder in the artifact: the pipeline's own name for it, with "_encoder" or
            "_decoder" added for the halves of an autoencoder.
        attribute: the pipeline's own name for it.
        role: its task in the pipeline.
        flat: takes the tensors of `example` as positions, returns a tuple of tensors.
        example: input name to (tensor, names of its dynamic axes).
        outputs: output name to the names of its dynamic axes.
        signature: how the pipeline calls it.
        varied: (axis, tensors by input name) of calls in which that axis is another.
    """

    name: str
    attribute: str
    role: Role
    flat: FlatModule
    example: Example
    outputs: Axes
    signature: Signature
    varied: list[tuple[str, dict[str, torch.Tensor]]] = field(default_factory=list)

    @property
    def rows_in(self) -> list[str]:
        """Names of the inputs with a row for every image; the others are the same for all."""
        return self.signature.batch

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """Run the torch network on a graph's feed of numpy arrays: the reference for parity."""
        values = [torch.from_numpy(feed[name]) for name in self.signature.inputs]
        with torch.no_grad():
            return [item.numpy() for item in self.flat(*values)]


class FlatModule(torch.nn.Module):
    """Component with its tensors as positional arguments and everything else fixed."""

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


def find_components(
    pipeline: Any,
    *,
    size: tuple[int, int] | None = None,
    traits: Traits | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Component]:
    """Call a pipeline a few times and describe every network that worked.

    Args:
        pipeline: a diffusers pipeline in torch, float32, in evaluation mode.
        size: height and width in pixels of the calls; the pipeline's own when not given. Where a
            network's size cannot vary it is the only one that the graphs will take.
        traits: of the pipeline; measured when not given.
        on_progress: called with (calls done, calls).

    Raises:
        UsageError: the pipeline does not take this size.
        ExportError: the pipeline needs an argument that cannot be guessed, or cannot be called.
    """
    traits = traits or find_traits(pipeline)
    height, width = size or traits.own_size
    base = Probe(height=height, width=width, tokens=_token_limit(traits))
    calls = first_call(pipeline, traits, base)
    axes: dict[Key, tuple[Axes, Axes]] = {}
    feeds: dict[Key, list[tuple[str, dict[str, torch.Tensor]]]] = {}
    variations: list[tuple[str, list[Probe]]] = [("batch", [replace(base, batch=3)])]
    if height and width:
        variations += [
            ("height", [replace(base, height=height * n // 4) for n in _QUARTERS]),
            ("width", [replace(base, width=width * n // 4) for n in _QUARTERS]),
        ]
    if base.tokens:
        variations.append(("tokens", [replace(base, tokens=base.tokens // 2)]))
    if traits.form.subject == "prompt":
        variations.append(("tokens", [replace(base, long=True)]))
    for done, (axis, probes) in enumerate(variations):
        varied = first_that_works(pipeline, traits, probes)
        if varied is not None:
            for key, caught in calls.items():
                if key in varied:
                    known = axes.setdefault(key, ({}, {}))
                    feeds.setdefault(key, []).append((axis, varied[key][0].tensors))
                    _note_axes(caught[0].tensors, varied[key][0].tensors, axis, known[0])
                    _note_axes(caught[0].outputs, varied[key][0].outputs, axis, known[1])
        if on_progress:
            on_progress(done + 1, len(variations))
    components = [
        _describe(pipeline, attribute, method, caught, *axes.get((attribute, method), ({}, {})))
        for (attribute, method), caught in calls.items()
    ]
    for component in components:
        known_feeds = feeds.get((component.attribute, component.signature.method), [])
        names = set(component.signature.inputs)
        component.varied += [item for item in known_feeds if item[1].keys() == names]
    components += _encoders(pipeline, components, height, width)
    if not any(component.role == "denoiser" for component in components):
        called = ", ".join(component.name for component in components)
        raise ExportError(
            f"{type(pipeline).__name__}: no network has an input {' or '.join(TIMESTEP_NAMES)}, "
            f"so that none is a denoiser ({called})"
        )
    return sorted(components, key=lambda item: (_ORDER.index(item.role), item.name))


_QUARTERS = (3, 2, 5, 6, 8)  # of the height or width, tried in this order
_ORDER: tuple[Role, ...] = ("denoiser", "control", "text_encoder", "encoder", "decoder")


def _token_limit(traits: Traits) -> int | None:
    stated = traits.form.default("max_sequence_length")
    return stated if isinstance(stated, int) else None


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
                known_as = axes.get(index, axis)
                axes[index] = known_as if axis in known_as.split("_") else f"{known_as}_{axis}"


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
        role=_role(attribute, module, signature),
        flat=FlatModule(module, signature).eval(),
        example={name: (tensor, input_axes.get(name, {})) for name, tensor in tensors.items()},
        outputs={name: output_axes.get(name, {}) for name in call.outputs},
        signature=signature,
    )


def _role(attribute: str, module: Any, signature: Signature) -> Role:
    """Return a network's task; a denoiser is one that is told the noise level of its input."""
    if signature.method != "forward":
        return "encoder" if signature.method == "encode" else "decoder"
    if "ControlNet" in type(module).__name__:
        return "control"
    if attribute.startswith("text_encoder"):
        return "text_encoder"
    if any(name in signature.inputs for name in TIMESTEP_NAMES):
        return "denoiser"
    return "text_encoder" if signature.integers else "encoder"


def _encoders(
    pipeline: Any, components: list[Component], height: int | None, width: int | None
) -> list[Component]:
    """Return the encoding half of every autoencoder whose decoding half was called."""
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
        try:
            with torch.no_grad():
                call.output = template_of(module.encode(picture), "output", call.outputs)
        except NOT_CALLABLE:
            continue  # one that takes something else than images; the pipeline never called it
        inputs: Axes = {"picture": {0: "batch", 2: "height", 3: "width"}}
        outputs: Axes = {name: {0: "batch", 2: "height", 3: "width"} for name in call.outputs}
        found.append(_describe(pipeline, component.attribute, "encode", [call], inputs, outputs))
    return found
