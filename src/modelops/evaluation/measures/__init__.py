"""Families of measurements. Each module has KEYS and measure(bench), which puts those keys."""

from __future__ import annotations

from modelops.evaluation.measures import (
    alignment,
    clipscore,
    distances,
    failures,
    fid,
    memorization,
    neighbourhoods,
    safety,
)

FAMILIES = (
    failures, distances, neighbourhoods, memorization, alignment, fid, clipscore, safety,
)  # fmt: skip
