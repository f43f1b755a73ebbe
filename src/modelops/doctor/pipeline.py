"""Report on a pipeline: its networks, its call, and what modelops can do with it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.errors import ModelopsError
from modelops.base.files import write_bytes
from modelops.base.images import encode_png
from modelops.doctor.machine import Finding
from modelops.export.components import Component, find_components
from modelops.models.pipelines.inputs import list_input
from modelops.models.pipelines.traits import Traits
from modelops.models.request import ImageRequest, InputImage
from modelops.models.sources import PipelineSource, open_checkpoint

_TRIED_PARAMETERS = 20_000_000  # of a network that is written as a graph, to see whether it can be
_TRIED_S = 40.0  # no further graph is begun then
_SIDE = 256  # of an input image, in pixels
_STEPS_FROM_IMAGE = 8  # of which pipelines make a share
_EXPORT = "modelops export --to onnx"


def examine_pipeline(path: str | Path) -> Iterator[Finding]:
    """Watch a pipeline work, and yield what was found as it is found.

    Args:
        path: a diffusers directory or hub id.

    Raises:
        UsageError: it cannot be loaded or called.
        MissingExtraError: a package that it needs is not installed.
    """
    source = open_checkpoint(path)
    pipeline = source.pipeline
    yield Finding("pipeline", type(pipeline).__name__, "ok", f"sampler {source.scheduler_name}")
    traits = source.traits
    yield from _call(traits, pipeline)
    size = traits.quick_size
    components: list[Component] = []
    try:
        components = find_components(pipeline, size=size, traits=traits)
    except ModelopsError as error:
        yield _refused("network", "all", error)
    for component in components:
        yield _network(pipeline, component)
    with tempfile.TemporaryDirectory() as scratch:
        yield _tried("sample, eval", lambda: _sampled(source, Path(scratch)))
    if traits.wants_image:
        detail = "it changes an image that it is given, and no request to a service carries one"
        yield Finding("can", "serve", "missing", detail)
    else:
        yield _tried("serve", lambda: _served(source))
    yield _exported(pipeline, components)
    yield Finding("can", "train", "missing", "modelops trains only networks of its own so far")


def _call(traits: Traits, pipeline: Any) -> Iterator[Finding]:
    form = traits.form

    def line(name: str, detail: str) -> Finding:
        return Finding("call", name, "ok", detail)

    subject = {
        "prompt": "a prompt",
        "class": f"a class: a number from 0 to {form.n_classes - 1}"
        + (" or a name" if form.classes else ""),
        "nothing": "nothing; images are made of noise alone",
    }[form.subject]
    given = (" and an image" if traits.wants_image else "") + (
        " with a mask" if traits.wants_image and form.takes("mask_image") else ""
    )
    yield line("takes", subject + given)
    yield line("steps", f"{form.default('num_inference_steps') or 'not stated'} by default")
    yield line("guidance", _guidance(traits))
    effect = "has an effect" if traits.negative else "has no effect"
    if form.subject == "prompt":
        yield line("negative prompt", effect)
    height, width = traits.native_size
    only = "only" if traits.fixed_size else "by default"
    yield line("size", f"{width}x{height} {only}" if height and width else "that of its image")
    sharing = {
        "any": "images of several prompts",
        "same length": "images of several prompts, if they have the same number of tokens",
        "one": "one image",
    }[traits.sharing]
    yield line("one call makes", sharing + (f": {traits.reason}" if traits.reason else ""))
    if traits.global_noise:
        yield line("noise", "from global generators too, which every call seeds")


def _guidance(traits: Traits) -> str:
    if not traits.guidance:
        return "has no effect"
    default = traits.form.default(traits.guidance)
    stated = "" if default is None else f", {default:g} by default"
    beside = ", beside a negative prompt alone" if traits.guided_by_negative else ""
    return f"{traits.guidance}{stated}{beside}"


def _network(pipeline: Any, component: Component) -> Finding:
    module = getattr(pipeline, component.attribute)
    count = sum(value.numel() for value in module.parameters())
    shapes = (
        f"{name} [{', '.join(str(axes.get(i, n)) for i, n in enumerate(tensor.shape))}]"
        for name, (tensor, axes) in component.example.items()
    )
    role = component.role.replace("_", " ")
    detail = f"{role}, {type(module).__name__}, {count / 1e6:.2f} M parameters; "
    return Finding("network", component.name, "ok", detail + ", ".join(shapes))


def _sampled(source: PipelineSource, scratch: Path) -> str:
    requests = _requests(source)
    if source.traits.wants_image:
        image = _noise_to_change(source, scratch)
        requests = [replace(one, image=image, steps=_STEPS_FROM_IMAGE) for one in requests]
    alone = [source.generate([request])[0] for request in requests]
    together = source.generate(requests)
    worst = max(_difference(a, b) for a, b in zip(alone, together, strict=True))
    with_images = ", with --input-images" if source.traits.wants_image else ""
    return f"an image in company differs by {worst} of 255 from the same image alone{with_images}"


def _noise_to_change(source: PipelineSource, scratch: Path) -> InputImage:
    """An input image of noise, half of it to be painted anew."""
    height, width = source.traits.quick_size or (_SIDE, _SIDE)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width, 3), np.uint8)
    mask[:, width // 2 :] = 255
    write_bytes(scratch / "noise.png", encode_png(pixels))
    write_bytes(scratch / "noise_mask.png", encode_png(mask))
    has_mask = source.traits.form.takes("mask_image")
    return list_input(scratch / "noise.png", scratch / "noise_mask.png" if has_mask else None)


def _served(source: PipelineSource) -> str:
    from modelops.serving.engine.engine import StepEngine

    requests = [replace(one, steps=2 + place) for place, one in enumerate(_requests(source))]
    expected = [source.generate([request])[0] for request in requests]
    engine = StepEngine(source.pipeline, traits=source.traits)
    try:
        done = [job.future.result(120) for job in engine.submit(requests)]
    finally:
        engine.close(drain=False, timeout_s=10)
    worst = max(_difference(a.pixels, b) for a, b in zip(done, expected, strict=True))
    own = max(engine.model.rows_of(request) for request in requests)
    shared = max(max(one.batch_rows) for one in done) > own
    return (
        f"two requests {'share evaluations' if shared else 'take turns'}; their images differ by "
        f"{worst} of 255 from sampled ones"
    )


def _requests(source: PipelineSource) -> list[ImageRequest]:
    height, width = source.traits.quick_size or (None, None)
    texts = ("0", "1") if source.traits.is_of_classes else ("red heart", "a dog and the sun")
    return [
        ImageRequest(prompt=text, seed=seed, steps=2, height=height, width=width)
        for seed, text in enumerate(texts)
    ]


def _exported(pipeline: Any, components: list[Component]) -> Finding:
    """Write the graphs of networks that are small; parity is measured by the export itself."""
    from modelops.export.to_onnx import MAX_OPSET, write_component

    began, left = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        for component in components:
            module = getattr(pipeline, component.attribute)
            count = sum(value.numel() for value in module.parameters())
            if count > _TRIED_PARAMETERS or time.monotonic() - began > _TRIED_S:
                left.append(component.name)
                continue
            try:
                write_component(
                    pipeline, component, Path(scratch) / component.name, opset=MAX_OPSET
                )
            except ModelopsError as error:
                return _refused("can", "export", error)
    if not components:
        return Finding("can", "export", "missing", "no network was found")
    if left:
        detail = f"not tried: {', '.join(left)}"
        return Finding("can", "export", "warning", detail, f"{_EXPORT} tries")
    return Finding("can", "export", "ok", "every network has an ONNX form")


def _tried(name: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding("can", name, "ok", work())
    except ModelopsError as error:
        return _refused("can", name, error)


def _refused(area: str, name: str, error: ModelopsError) -> Finding:
    return Finding(area, name, "missing", error.message, error.hint or "")


def _difference(first: Any, second: Any) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())
