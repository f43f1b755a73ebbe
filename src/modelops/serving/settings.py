"""Settings of a node, read from MODELOPS_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from modelops.base.errors import UsageError
from modelops.export.graphs.graph import RUNTIMES

_MAY_BE_ZERO = {"evaluate_every_days", "golden_every_s", "profile_s", "threads"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "quarantine_prompts": ("digest", "text"),
    "quarantine_stages": ("images", "all"),
    "receipts_failure": ("send", "refuse"),
    "receipts_prompts": ("digest", "text"),
    "runtime": ("auto", *RUNTIMES),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """Settings of a node; `from_environment` reads each field from MODELOPS_<NAME>.

    Attributes:
        max_rows: rows of a forward pass (a guided request takes two).
        profile_s: seconds to spend at start-up on measuring which batch widths pay; 0 measures
            nothing and batches up to max_rows.
        golden_every_s: seconds after which a check of readiness makes the golden image again; 0
            makes it at the start only.
        queue_limit: requests that may wait for a place.
        deadline_s: seconds after which a request is dropped.
        filter_timeout_s: seconds a safety filter may take.
        stalled_s: seconds of one network evaluation after which the engine counts as dead.
        client_timeout_s: seconds that a client may take for a request's head, for its body, or
            without reading of its answer.
        max_connections: open at once in one process; one more is closed unanswered.
        stream_write_timeout_s: seconds that the reader of a stream may take for one event; a slower
            one is dropped.
        runtime: of an exported artifact; "auto" takes the fastest that is installed.
        device: of a checkpoint: "cpu", "cuda" (each worker takes one of its own), "cuda:1", "auto".
        threads: CPU threads of the model; 0 is all cores of the process, divided by the workers.
        prompt_filter, image_filter: by name, as in `modelops eval` (see
            `modelops.safety.registry`); serving has no "none".
        evaluate_every_days: an evaluation of the released model that is older is overdue; 0 takes
            what the released policy says, or 30.
        signing_key, signing_chain: PEM files, see `signing.open_signing_key`; without them a
            development key of this machine signs.
        receipts: folder where signed receipts are kept; "" keeps none.
        receipts_mb: megabytes of that folder, at most; the oldest receipts go first.
        receipts_failure: "send" or "refuse" the image when its receipt cannot be written.
        receipts_prompts: "digest" keeps receipts without the prompt's text, "text" with it.
        quarantine: folder where blocked images are kept for review; "" keeps none.
        quarantine_mb: megabytes of that folder, at most; the oldest entries go first.
        quarantine_days: days after which an entry is deleted.
        quarantine_stages: "images" keeps what the image filter blocked, "all" also what the prompt
            filter blocked.
        quarantine_prompts: "digest" keeps entries without the prompt's text, "text" with it.
        quarantine_key: a reviewer's X25519 public key (PEM); entries are encrypted to it.
        watermark_key: key file of the invisible watermark; "" embeds none.
        releases: folder of releases that may be swapped in while the node runs (see `rollout`); ""
            turns that off.
        drift_log: folder of the drift log, which `modelops monitor` reads; "" keeps none.
        drift_sample: share of the requests that it logs.
        drift_log_mb: megabytes of that folder, at most; the oldest rows go first.

    Raises:
        UsageError: invalid choice, max_rows too small, or a share outside (0, 1].
    """

    max_rows: int = 16
    profile_s: float = 5.0
    golden_every_s: float = 600.0
    queue_limit: int = 64
    deadline_s: float = 120.0
    filter_timeout_s: float = 10.0
    stalled_s: float = 60.0
    client_timeout_s: float = 30.0
    max_connections: int = 2000
    stream_write_timeout_s: float = 30.0
    runtime: str = "auto"
    device: str = "cpu"
    threads: int = 0
    prompt_filter: str = "words"
    image_filter: str = "open_nsfw"
    evaluate_every_days: float = 0.0
    signing_key: str = ""
    signing_chain: str = ""
    receipts: str = ""
    receipts_mb: int = 256
    receipts_failure: str = "send"
    receipts_prompts: str = "digest"
    quarantine: str = ""
    quarantine_mb: int = 256
    quarantine_days: float = 30.0
    quarantine_stages: str = "images"
    quarantine_prompts: str = "digest"
    quarantine_key: str = ""
    watermark_key: str = ""
    releases: str = ""
    drift_log: str = ""
    drift_sample: float = 0.1
    drift_log_mb: int = 64

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _refused(name, getattr(self, name), f"must be {' or '.join(choices)}")
        if self.max_rows < 2:
            raise _refused("max_rows", self.max_rows, "must be at least 2")
        if not 0 < self.drift_sample <= 1:
            raise _refused("drift_sample", self.drift_sample, "must be above 0 and at most 1")

    @classmethod
    def variables(cls) -> list[str]:
        """Return the variables that `from_environment` reads."""
        return [_variable(entry.name) for entry in fields(cls)]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> NodeSettings:
        """Read settings from environment variables.

        Raises:
            UsageError: a variable is not a number in range, or see the class.
        """
        values: dict[str, Any] = {}
        for entry in fields(cls):
            text = environment.get(_variable(entry.name))
            if text is None:
                continue
            kind: Any = type(entry.default)
            try:
                values[entry.name] = kind(text)
            except ValueError as error:
                raise _refused(entry.name, text, "not a number") from error
            least = 0.0 if entry.name in _MAY_BE_ZERO else 1e-9
            if kind is not str and not least <= values[entry.name] < 1e6:
                raise _refused(entry.name, text, "out of range")
        return cls(**values)


def _variable(name: str) -> str:
    return f"MODELOPS_{name.upper()}"


def _refused(name: str, value: object, why: str) -> UsageError:
    return UsageError(f"{_variable(name)}={value!r}: {why}")
