"""Whether files that run code when they are opened may be opened: TorchScript and .pt2 programs.

Not by default: an artifact's digests say that it is whole, not who made it.
"""

from __future__ import annotations

import os

from modelops.base.errors import UsageError

VARIABLE = "MODELOPS_TRUST_CODE"


def trust_code() -> None:
    """Let this process, and those that it starts, open such files: `--trust-code`."""
    os.environ[VARIABLE] = "1"


def require_trust(path: object) -> None:
    """Refuse a file that runs code, unless the caller has said that its maker is trusted.

    Raises:
        UsageError: neither `--trust-code` nor MODELOPS_TRUST_CODE=1.
    """
    if os.environ.get(VARIABLE) != "1":
        raise UsageError(
            f"{path}: a program of torch, whose code runs when it is opened",
            hint=f"if you trust who made it: --trust-code, or {VARIABLE}=1 for a service",
        )
