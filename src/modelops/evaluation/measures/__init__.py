"""Families of measurements. Each module has KEYS and measure(bench), which puts those keys."""

from __future__ import annotations

from modelops.evaluation.measures import (
    alignment,
    clipscore,
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
    failures, distances, neighbourhoods, memorization, alignment, fid, clipscore, diversity, safety,
    slices,  # of what the others left in `per_image`
)  # fmt: skip
