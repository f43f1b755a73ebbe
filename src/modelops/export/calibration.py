"""Calibration inputs: real inputs of a pipeline's networks, caught on its own trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modelops.base.errors import ExportError, UsageError
from modelops.base.files import sha256_bytes, sha256_json
from modelops.base.seeding import image_seed, numpy_generator
from modelops.export.components import Component
from modelops.export.graphs.graph import Array
from modelops.models.pipelines.observe import find_traits
from modelops.models.pipelines.signatures import TIMESTEP_NAMES, Method
from modelops.models.pipelines.traits import LONG_PROMPT, Traits
from modelops.models.pipelines.watch import (
    CaughtCall,
    call_pipeline,
    catching,
    stopping_before_decoder,
)
from modelops.models.request import ImageRequest
from modelops.models.sources import CPU_ROWS, SMALL

DEFAULT_PROMPTS = (
    "red heart", "grinning face", LONG_PROMPT, "waving hand", "house with garden", "flag: Japan",
    "dog face", "green apple", "sun behind cloud", "bicycle", "musical note", "fish", "alarm clock",
)  # fmt: skip
Progress = Callable[[int, int], None]
Feed = dict[str, Array]


@dataclass(frozen=True)
class TrajectoryRows:
    """Rows of denoiser calls, in the order of their noise level.

    Attributes:
        feeds: graph input name to array [R, ...].
        sigmas: noise level of each row [R] in [0, 1]: its timestep over the scheduler's largest.
        record: prompts, seeds, steps and digest, for the artifact.
        shared: inputs that have no rows, such as the positions of an image's patches.
    """

    feeds: dict[str, Array]
    sigmas: Array
    record: dict[str, Any]
    shared: dict[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sigmas)

    def take(self, rows: Sequence[int] | Array) -> dict[str, Array]:
        """Return a feed of the given rows."""
        chosen = np.asarray(rows)
        return {name: array[chosen] for name, array in self.feeds.items()} | self.shared

    def subset(self, rows: Sequence[int] | Array) -> TrajectoryRows:
        """Return the given rows alone, with the record of all."""
        chosen = np.asarray(rows)
        feeds = {name: array[chosen] for name, array in self.feeds.items()}
        return replace(self, feeds=feeds, sigmas=self.sigmas[chosen])

    def spread(self, count: int) -> Array:
        """Choose `count` row numbers evenly over all noise levels; repeated if there are fewer."""
        picks: Array = np.linspace(0, len(self) - 1, num=count).round().astype(int)
        return picks

    def batches(self, size: int) -> list[dict[str, Array]]:
        """Return all rows in feeds of `size` rows, each across all noise levels; drop the rest."""
        count = max(1, len(self) // size)
        return [self.take(range(start, len(self), count)[:size]) for start in range(count)]


def collect_rows(
    pipeline: Any,
    denoiser: Component,
    *,
    prompts: Sequence[str],
    seed: int,
    purpose: str = "calibration",
    steps: int = 16,
    rows: int = 128,
    size: tuple[int | None, int | None] = (None, None),
    traits: Traits | None = None,
    on_progress: Progress | None = None,
) -> TrajectoryRows:
    """Sample every prompt once and keep an equal number of rows of every timestep.

    With guidance a call of the denoiser has rows with the prompt in one half and rows without it in
    the other; the same number is kept of each half.

    Args:
        pipeline: in torch.
        denoiser: the network whose calls are kept.
        prompts: prompts to sample; each gets the seed `image_seed(seed, prompt)`.
        seed: of the noise and of the choice of rows.
        purpose: separates the choices for calibration and for parity.
        steps: network evaluations of a trajectory.
        rows: number of rows to keep in all.
        size: height and width in pixels; the pipeline's own when None.
        traits: of the pipeline; measured when not given.

    Raises:
        UsageError: no prompts, an empty prompt, or no steps or rows.
        ExportError: calls differ in an input that has no rows.
    """
    texts = check_prompts(prompts)
    if steps < 1 or rows < 1:
        raise UsageError(f"steps and rows must be positive, got {steps} and {rows}")
    traits = traits or find_traits(pipeline)
    chunk_size = rows_at_once(traits, *size)
    chunks = [texts[start : start + chunk_size] for start in range(0, len(texts), chunk_size)]
    feeds: list[Feed] = []
    for done, chunk in enumerate(chunks):
        seeds = [image_seed(seed, text) for text in chunk]
        feeds += catch_feeds(pipeline, traits, [denoiser], chunk, seeds, steps, size)[denoiser.name]
        if on_progress:
            on_progress(done + 1, len(chunks))
    halves: dict[float, tuple[list[Feed], list[Feed]]] = {}  # timestep -> rows of either half
    shared: Feed = {}
    for feed in _of_one_shape(feeds, denoiser):
        _check_shared(denoiser, feed, shared)
        rowed = {name: feed[name] for name in denoiser.rows_in}
        level = float(np.max(feed[_timestep_of(denoiser)]))
        count = len(next(iter(rowed.values())))
        middle = (count + 1) // 2
        both = halves.setdefault(level, ([], []))
        both[0].append({name: array[:middle] for name, array in rowed.items()})
        both[1].append({name: array[middle:] for name, array in rowed.items()})
    generator = numpy_generator(seed, purpose)
    wanted = max(1, rows // len(halves) // 2)
    kept: list[Feed] = []
    for level in sorted(halves):
        for parts in halves[level]:
            pooled = {n: np.concatenate([p[n] for p in parts]) for n in denoiser.rows_in}
            count = len(next(iter(pooled.values())))
            if count:
                chosen = generator.choice(count, size=min(wanted, count), replace=False)
                kept.append({name: array[chosen] for name, array in pooled.items()})
    arrays = {name: np.concatenate([feed[name] for feed in kept]) for name in denoiser.rows_in}
    # Some networks take a step's number among those of training, some its noise level in [0, 1].
    largest = 1.0
    if max(halves) > 1.0:
        largest = float(pipeline.scheduler.config.get("num_train_timesteps", 1000))
    sigmas = arrays[_timestep_of(denoiser)].astype(np.float64) / largest
    record = {
        "prompts": texts,
        "seed": seed,
        "seeds": [image_seed(seed, text) for text in texts],
        "steps": steps,
        "rows": len(sigmas),
        "timesteps": len(halves),
        "sigma_min": float(sigmas.min()),
        "sigma_max": float(sigmas.max()),
        "inputs_sha256": sha256_json(
            {name: sha256_bytes(array.tobytes()) for name, array in (arrays | shared).items()}
        ),
    }
    return TrajectoryRows(arrays, sigmas, record, shared)


def catch_feeds(
    pipeline: Any,
    traits: Traits,
    components: Sequence[Component],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    size: tuple[int | None, int | None] = (None, None),
) -> dict[str, list[Feed]]:
    """Call the pipeline once; return the inputs of each component, as feeds of its graph."""
    feeds: dict[str, list[Feed]] = {component.name: [] for component in components}
    known = {(c.attribute, c.signature.method): c for c in components}

    def keep(attribute: str, method: Method, call: CaughtCall) -> None:
        component = known.get((attribute, method))
        if component is not None:
            tensors = component.signature.cast(call.tensors)
            feeds[component.name].append({n: t.numpy() for n, t in tensors.items()})

    height, width = size
    requests = [
        ImageRequest(prompt=prompt, seed=seed, steps=steps, height=height, width=width)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    decodes = any(component.role == "decoder" for component in components)
    stopping = nullcontext() if decodes else stopping_before_decoder(pipeline)
    with catching(pipeline, keep, only=[one.attribute for one in components]), stopping:
        call_pipeline(pipeline, traits, requests)
    return feeds


def rows_at_once(traits: Traits, height: int | None, width: int | None) -> int:
    """Return the images of one call: many small ones, or one that fills the machine alone."""
    if traits.sharing != "any":
        return 1
    return CPU_ROWS if (height or 0) * (width or 0) <= SMALL else 1


def parity_prompts(traits: Traits, prompts: Sequence[str], count: int) -> list[str]:
    """Return so many prompts that the pipeline takes, a long one among them."""
    if traits.is_of_classes:
        return list(prompts[:count])
    return [LONG_PROMPT, *(text for text in prompts if text != LONG_PROMPT)][:count]


def own_prompts(traits: Traits, prompts: Sequence[str]) -> list[str]:
    """Return prompts to export with: those given, or classes in place of the default ones.

    Raises:
        UsageError: a prompt is no class of a pipeline that makes images of classes, there are none,
            or one is blank.
    """
    if not traits.is_of_classes:
        return check_prompts(prompts)
    if tuple(prompts) == DEFAULT_PROMPTS:
        classes = traits.form.n_classes
        count = min(8, classes)
        return [str(number * classes // count) for number in range(count)]
    for text in prompts:
        traits.form.class_number(text)
    return check_prompts(prompts)


def _of_one_shape(feeds: Sequence[Feed], component: Component) -> list[Feed]:
    """Return the feeds of the commonest shapes: prompts may be padded to the longest of a call."""
    rowed = set(component.rows_in)
    shapes = [
        tuple((name, array.shape[name in rowed :]) for name, array in feed.items())
        for feed in feeds
    ]
    commonest = max(shapes, key=shapes.count)
    return [feed for feed, shape in zip(feeds, shapes, strict=True) if shape == commonest]


def _check_shared(component: Component, feed: Feed, shared: Feed) -> None:
    for name, array in feed.items():
        if name in component.rows_in:
            continue
        if not np.array_equal(shared.setdefault(name, array), array):
            raise ExportError(f"{component.name}: {name} has no rows and differs between calls")


def _timestep_of(denoiser: Component) -> str:
    for name in TIMESTEP_NAMES:
        if name in denoiser.rows_in:
            return name
    raise ExportError(f"{denoiser.name}: has no timestep among its inputs")


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts without repeats.

    Raises:
        UsageError: there are none, or one is blank.
    """
    texts = list(dict.fromkeys(prompts))
    if not texts:
        raise UsageError("no prompts to calibrate with", hint="give --prompts a file of lines")
    for index, text in enumerate(texts):
        if not text.strip():
            raise UsageError(f"prompt {index + 1} is blank", hint="remove it")
    return texts
