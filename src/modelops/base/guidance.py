"""Scale of classifier-free guidance: one meaning of it for commands, requests and services."""

from __future__ import annotations

import math

GUIDANCE_OFF = 1.0
GUIDANCE_DECIMALS = 6


def guidance_scale(value: float) -> float:
    """Return a guidance scale as it is used: 0 and 1 are both off, and 0 becomes 1.

    It has six decimals: more do not come back unchanged from every reader of JSON, C2PA's among
    them.

    Raises:
        ValueError: it is below 0, between 0 and 1 (pipelines disagree about what that is), or no
            finite number.
    """
    kept = round(float(value), GUIDANCE_DECIMALS) if 0 <= value < math.inf else math.nan
    if kept == 0:
        return GUIDANCE_OFF
    if not kept >= GUIDANCE_OFF:
        raise ValueError("must be 0 or 1 (off), or more than 1")
    return kept
