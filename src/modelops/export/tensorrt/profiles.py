"""Optimization profiles: the smallest, the usual and the largest shape of every input.

An engine is built for ranges of shapes and is fastest at the usual one. A range is given per named
axis of the graph ("batch=1:8:16,height=32:64:96"), so that inputs that share an axis share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from modelops.base.errors import ExportError, UsageError
from modelops.export.graphs.axes import GraphAxes

_AXIS = re.compile(r"([A-Za-z_][\w.]*)=(\d+)(?::(\d+):(\d+))?")
Limits = tuple[int, int, int]  # min, opt, max
_MAX_ELEMENTS = 2**31 - 1  # of one tensor in TensorRT


class ShapeRange(BaseModel):
    """One input's shapes: minimum <= optimum <= maximum in every axis, all at least 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not len(self.minimum) == len(self.optimum) == len(self.maximum):
            raise ValueError("minimum, optimum and maximum have different ranks")
        for low, usual, high in zip(self.minimum, self.optimum, self.maximum, strict=True):
            if not 1 <= low <= usual <= high:
                raise ValueError(f"{low}:{usual}:{high} is not 1 <= min <= opt <= max")
        return self

    def holds(self, shape: Sequence[int]) -> bool:
        """Return whether a shape lies in the range."""
        return len(shape) == len(self.minimum) and all(
            low <= size <= high
            for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )


class OptimizationProfile(BaseModel):
    """A range for each input of a graph."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: dict[str, ShapeRange]

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Return whether shapes for all inputs lie in the profile."""
        return set(shapes) == set(self.inputs) and all(
            self.inputs[name].holds(shape) for name, shape in shapes.items()
        )


def dynamic_axes(axes: GraphAxes) -> list[str]:
    """Names of the dynamic axes of the inputs, each once, in the order in which they occur."""
    return list(
        dict.fromkeys(d for dims in axes.inputs.values() for d in dims if isinstance(d, str))
    )


def parse_limits(text: str) -> dict[str, Limits]:
    """ "batch=1:8:16,height=64" as {"batch": (1, 8, 16), "height": (64, 64, 64)}.

    Raises:
        UsageError: not of that form, a name twice, or not 1 <= min <= opt <= max.
    """
    limits: dict[str, Limits] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _AXIS.fullmatch(part)
        if match is None:
            raise UsageError(
                f"{part!r} is no axis of a profile",
                hint='write AXIS=SIZE or AXIS=MIN:OPT:MAX, as in "batch=1:8:16,height=64"',
            )
        name, low, usual, high = match.groups()
        if name in limits:
            raise UsageError(f"axis {name} is there twice in {text!r}")
        sizes = (int(low), int(usual or low), int(high or low))
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(f"{part}: not 1 <= MIN <= OPT <= MAX")
        limits[name] = sizes
    if not limits:
        raise UsageError("an empty profile", hint='as in "batch=1:8:16,height=64,width=64"')
    return limits


def make_profile(axes: GraphAxes, limits: Mapping[str, Limits]) -> OptimizationProfile:
    """A profile for a graph from limits per axis.

    Args:
        axes: of the graph, from `axes.read_axes`.
        limits: axis name to (min, opt, max). "INPUT.AXIS" goes before "AXIS" for that input.

    Raises:
        UsageError: an axis without limits, limits for an axis that the graph does not have, that
            are not in order or no multiples of what the network takes, or a tensor too large for
            TensorRT.
        ExportError: a dynamic axis has no name.
    """
    names = dynamic_axes(axes)
    if "" in names:
        raise ExportError("a dynamic axis of the graph has no name", hint="export it again")
    qualified = {
        f"{name}.{d}": d for name, dims in axes.inputs.items() for d in dims if isinstance(d, str)
    }
    unknown = sorted(set(limits) - set(names) - set(qualified))
    if unknown:
        raise UsageError(
            f"the graph has no dynamic axis {', '.join(unknown)}",
            hint=f"it has {', '.join(names) or 'none'}",
        )
    for name, sizes in limits.items():
        step = axes.multiples.get(qualified.get(name, name), 1)
        told = f"{name}={':'.join(map(str, sizes))}"
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(f"{told}: not 1 <= MIN <= OPT <= MAX")
        if any(size % step for size in sizes):
            raise UsageError(f"{told}: this network takes multiples of {step}")
    missing: dict[str, None] = {}
    ranges: dict[str, ShapeRange] = {}
    for name, dims in axes.inputs.items():
        sizes_of: list[Limits] = []
        for dim in dims:
            if isinstance(dim, int):
                sizes_of.append((dim, dim, dim))
                continue
            found = limits.get(f"{name}.{dim}") or limits.get(dim)
            if found is None:
                missing[dim] = None
            sizes_of.append(found or (1, 1, 1))
        lows, usuals, highs = (tuple(sizes[k] for sizes in sizes_of) for k in range(3))
        if math.prod(highs) > _MAX_ELEMENTS:
            raise UsageError(
                f"input {name} would have {math.prod(highs):,} elements at its largest, more than "
                f"TensorRT's {_MAX_ELEMENTS:,}", hint="lower a maximum",
            )  # fmt: skip
        ranges[name] = ShapeRange(minimum=lows, optimum=usuals, maximum=highs)
    if missing:
        example = ",".join(f"{n}=1:8:16" if n == "batch" else f"{n}=64" for n in missing)
        raise UsageError(
            f"the profile says nothing of the dynamic axes {', '.join(missing)}",
            hint=f'add them, as in "{example}"',
        )
    return OptimizationProfile(inputs=ranges)


def parse_profiles(axes: GraphAxes, texts: Sequence[str]) -> list[OptimizationProfile]:
    """One profile for each text such as "batch=1:8:16,height=64,width=64".

    A graph without dynamic axes needs none and gets the one of its fixed shapes.

    Raises:
        UsageError: as `parse_limits` and `make_profile`; no text for a graph with dynamic axes.
        ExportError: a dynamic axis has no name.
    """
    if not texts:
        return [make_profile(axes, {})]
    return [make_profile(axes, parse_limits(text)) for text in texts]


def limits_of_shapes(axes: GraphAxes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Limits]:
    """Limits that hold every dynamic axis of every input at its size in `shapes`.

    They are each input's own ("sample.height"): inputs may share an axis' name and not its size, as
    latents and the image of a ControlNet do.

    Raises:
        UsageError: an input is missing or its rank differs.
    """
    limits: dict[str, Limits] = {}
    for name, dims in axes.inputs.items():
        shape = tuple(shapes.get(name, ()))
        if len(shape) != len(dims):
            raise UsageError(f"input {name} has the axes {dims}, not the shape {shape}")
        for dim, size in zip(dims, shape, strict=True):
            if isinstance(dim, str):
                limits[f"{name}.{dim}"] = (size, size, size)
    return limits


def choose_profile(
    profiles: Sequence[OptimizationProfile],
    shapes: Mapping[str, Sequence[int]],
    *,
    path: str | Path = "the engine",
) -> int:
    """Index of the profile that holds these shapes and whose usual shape is the nearest.

    Raises:
        ExportError: no profile holds them; the message names the first axis at fault.
    """
    fits = [index for index, profile in enumerate(profiles) if profile.holds(shapes)]
    if fits:
        return min(fits, key=lambda index: _distance(profiles[index], shapes))
    raise ExportError(f"{path}: {_fault(profiles, shapes)}", hint="stay within it, or --rebuild")


def _distance(profile: OptimizationProfile, shapes: Mapping[str, Sequence[int]]) -> float:
    return sum(
        abs(math.log(size / usual))
        for name, shape in shapes.items()
        for size, usual in zip(shape, profile.inputs[name].optimum, strict=True)
    )


def _fault(profiles: Sequence[OptimizationProfile], shapes: Mapping[str, Sequence[int]]) -> str:
    known = set(profiles[0].inputs) if profiles else set()
    if set(shapes) != known:
        return f"needs the inputs {', '.join(sorted(known))}, not {', '.join(sorted(shapes))}"
    for name, shape in shapes.items():
        ranges = [profile.inputs[name] for profile in profiles]
        if any(item.holds(shape) for item in ranges):
            continue
        if len(shape) != len(ranges[0].minimum):
            return f"input {name} has {len(ranges[0].minimum)} axes, not the shape {tuple(shape)}"
        told = " or ".join(
            f"{'x'.join(map(str, item.minimum))} to {'x'.join(map(str, item.maximum))}"
            for item in ranges
        )
        return f"input {name} is {'x'.join(map(str, shape))}; its profile allows {told}"
    return f"no one profile holds { ({n: tuple(s) for n, s in shapes.items()}) }"
