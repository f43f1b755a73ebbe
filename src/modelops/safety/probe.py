"""Probe of an image filter: its answers must depend on the image.

A filter whose weights are all zero, or that a package left unfinished, answers every image alike.
Nothing it says then means anything, and it counts as failed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from modelops.base.seeding import numpy_generator
from modelops.safety.image import Image, ImageFilter, SafetyFilterError, checked_verdicts

_SIZE = 64  # pixels
_LOWEST, _HIGHEST = 1e-300, 1 - 1e-15
_LEAST = 1e-3  # of log-odds; rounding within a batch changes them by about 1e-6


@functools.cache
def probe_images() -> tuple[Image, ...]:
    """Images uint8 [64, 64, 3] that no two filters of use judge alike: noise, a gradient, a
    skin-coloured disc on black, and stripes."""
    y, x = np.mgrid[0:_SIZE, 0:_SIZE]
    noise = numpy_generator(0, "safety/probe").integers(0, 256, (_SIZE, _SIZE, 3), np.uint8)
    gradient = np.stack([4 * x, 4 * y, 255 - 4 * x], axis=2).astype(np.uint8)
    disc = np.zeros((_SIZE, _SIZE, 3), np.uint8)
    disc[(x - 32) ** 2 + (y - 32) ** 2 < 700] = (224, 172, 136)
    stripes = np.where((x // 8 % 2)[..., None] == 1, (250, 250, 60), (20, 40, 120))
    return noise, gradient, disc, stripes.astype(np.uint8)


def require_working(image_filter: ImageFilter) -> None:
    """Try a filter on the probe images.

    Raises:
        SafetyFilterError: it failed, or its answers do not depend on the image.
    """
    verdicts = checked_verdicts(image_filter, probe_images())
    require_discerning(image_filter, [verdict.score for verdict in verdicts])


def require_discerning(image_filter: Any, scores: Sequence[float]) -> None:
    """Refuse a filter whose scores of different images are all the same.

    A filter that knows a better test has a method `probe`, which is called instead. It raises
    SafetyFilterError.

    Args:
        scores: in [0, 1], of the probe images, and of others if there are more.

    Raises:
        SafetyFilterError: its answers do not depend on the image.
    """
    own = getattr(image_filter, "probe", None)
    if own is not None:
        own()
        return
    clipped = np.clip(np.asarray(scores, np.float64), _LOWEST, _HIGHEST)
    if np.ptp(np.log(clipped) - np.log1p(-clipped)) < _LEAST:
        raise SafetyFilterError(
            f"gives {scores[0]:g} to each of {len(scores)} different images: its answers do not "
            "depend on the image"
        )
