"""How a node runs, read from MODELOPS_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from modelops.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """How a node runs; each field is read from MODELOPS_<NAME> by `from_environment`.

    Attributes:
        max_rows: rows of a forward pass (a guided request takes two).
        queue_limit: requests that may wait for a place.
        deadline_s: seconds after which a request is dropped.
        filter_timeout_s: seconds a safety filter may take.
        runtime: of an exported artifact; "auto" takes the fastest that is installed.
        device: of a checkpoint.
        prompt_filter, image_filter: by name, as in `modelops eval` (see
            `modelops.safety.registry`); serving has no "none".
        evaluate_every_days: an evaluation of the released model that is older is overdue.
        signing_key, signing_chain: PEM files, see `signing.open_signing_key`; without them a
            development key of this machine signs.
        receipts: folder where signed receipts are kept; "" keeps none.
        receipts_mb: megabytes of that folder, at most; the oldest receipts go first.
        receipts_failure: "send" or "refuse" the picture when its receipt cannot be written.
        receipts_prompts: "digest" keeps receipts without the prompt's text, "text" with it.
    """

    max_rows: int = 16
    queue_limit: int = 64
    deadline_s: float = 120.0
    filter_timeout_s: float = 10.0
    runtime: str = "auto"
    device: str = "cpu"
    prompt_filter: str = "words"
    image_filter: str = "open_nsfw"
    evaluate_every_days: float = 30.0
    signing_key: str = ""
    signing_chain: str = ""
    receipts: str = ""
    receipts_mb: int = 256
    receipts_failure: str = "send"
    receipts_prompts: str = "digest"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> NodeSettings:
        """Settings from environment variables.

        Raises:
            UsageError: a variable is not a number in range.
        """
        values: dict[str, Any] = {}
        for entry in fields(cls):
            name = f"MODELOPS_{entry.name.upper()}"
            if name not in environment:
                continue
            kind: Any = type(entry.default)
            try:
                values[entry.name] = kind(environment[name])
            except ValueError as error:
                raise UsageError(f"{name}={environment[name]!r}: not a number") from error
            if kind is not str and not 0 < values[entry.name] < 1e6:
                raise UsageError(f"{name}={environment[name]!r}: out of range")
        return cls(**values)
