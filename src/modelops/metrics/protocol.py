"""Protocol identity: a value is comparable only under the protocol it was measured with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelops.base.errors import EvaluationError
from modelops.base.files import sha256_json


def protocol_id(protocol: Mapping[str, Any]) -> str:
    """Return the sha256 of the protocol's canonical JSON."""
    return sha256_json(dict(protocol))


def protocol_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], *, prefix: str = ""
) -> list[str]:
    """Return differences, a line each, such as "features.resize: bicubic against bilinear"."""
    lines = []
    for key in sorted({*first, *second}):
        a, b = first.get(key, "absent"), second.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += protocol_differences(a, b, prefix=f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} against {b}")
    return lines


def require_same_protocol(
    first: Mapping[str, Any], second: Mapping[str, Any], *, metric: str
) -> None:
    """Refuse to compare values of different protocols.

    Raises:
        EvaluationError: they differ; the message lists how.
    """
    differences = protocol_differences(first, second)
    if differences:
        raise EvaluationError(
            f"{metric}: measured under different protocols: {'; '.join(differences)}",
            hint="measure both again with the same settings",
        )
