"""Families of measurements. Each module has KEYS and measure(bench), which puts those keys."""

from __future__ import annotations

from modelops.evaluation.measures import (
    alignment,
    clip,
    dinov2,
    distances,
    diversity,
    failures,
    fid,
    memorization,
    neighbourhoods,
    safety,
    slices,
)

FAMILIES = (
    failures, distances, neighbourhoods, memorization, alignment, fid, clip, dinov2, diversity,
    safety, slices,  # slices: of what the others left in `per_image`
)  # fmt: skip
