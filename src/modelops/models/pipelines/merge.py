"""Calls of one network by several requests, made as one.

A call is taken apart into its tensors. Those with a row for every row of the call are put one after
the other; the rest (a table of positions, say) must be equal in all of them. Nothing here knows a
network by name, so it goes for UNets and transformers alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelops.base.errors import ExportError
from modelops.models.pipelines.signatures import (
    TIMESTEP_NAMES,
    Fields,
    Template,
    rebuild,
    template_of,
)

RETURN_DICT = "return_dict"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a network.

    Attributes:
        rows: of its batch.
        arguments: argument name to template.
        tensors: the tensors in them by dotted name, each [rows, ...] unless it is in `shared`.
        shared: name of a tensor without rows to the digest of its content.
        returns_dict: whether an answer with fields is expected, or a tuple; None if the network
            has no such choice.
        key: calls of the same key can be made as one.
        raw: arguments by position and name of a call that cannot be taken apart, and so is made as
            it is; None for the others.
    """

    rows: int
    arguments: dict[str, Template]
    tensors: dict[str, torch.Tensor]
    shared: dict[str, str]
    returns_dict: bool | None
    key: tuple[Any, ...]
    raw: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def read_any_call(
    parameters: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: dict[str, tuple[torch.Tensor, str]],
    rowed: Mapping[str, bool],
) -> Call:
    """Take a call apart as `read_call` does, or keep it whole if it holds something else than
    tensors and plain values, such as a cache of keys and values that the call fills."""
    try:
        return read_call(parameters, args, kwargs, known, rowed)
    except (ExportError, ValueError):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        rows = max((len(value) for value in tensors if value.ndim), default=1)
        return Call(rows, {}, {}, {}, None, (object(),), raw=(args, kwargs))


def read_call(
    parameters: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known: dict[str, tuple[torch.Tensor, str]] | None = None,
    rowed: Mapping[str, bool] | None = None,
) -> Call:
    """Take a call apart.

    Args:
        parameters: names of the network's arguments, in the order of positions.
        args, kwargs: what it is called with.
        known: shared tensors of this request's earlier calls with their digests; added to.
        rowed: whether a tensor has rows, for those of which that is known; any other has them if it
            is as long as the call has rows.

    Raises:
        ExportError: an argument is neither a tensor nor a plain value.
        ValueError: no argument has rows, or more arguments than names.
    """
    if len(args) > len(parameters):
        raise ValueError(f"{len(args)} arguments by position, of {len(parameters)}")
    given = dict(zip(parameters, args, strict=False)) | dict(kwargs)
    returns_dict = bool(given.pop(RETURN_DICT, True)) if RETURN_DICT in parameters else None
    tensors: dict[str, torch.Tensor] = {}
    arguments = {name: template_of(value, name, tensors) for name, value in given.items()}
    listed = next(iter(given.values()), None)
    sample = next((value for value in tensors.values() if value.ndim >= 3), None)
    if sample is None:
        raise ValueError("the network is called without a batch")
    if _is_list_of_rows(listed):  # each row may have a size of its own: such calls stay apart
        no_rows = dict.fromkeys(tensors, "")
        return Call(len(listed or ()), arguments, tensors, no_rows, returns_dict, (object(),))
    rows = len(sample)
    for name in TIMESTEP_NAMES:
        if name in given:  # one number for all rows, or a row each: always a row each
            step = torch.as_tensor(given[name], device=sample.device)
            tensors[name] = step.reshape(-1).expand(rows)
            arguments[name] = {"tensor": name}
    has_rows = dict(rowed or {}) | dict.fromkeys(TIMESTEP_NAMES, True)
    shared = {
        name: _digest(name, value, {} if known is None else known)
        for name, value in tensors.items()
        if value.ndim == 0 or len(value) != rows or not has_rows.get(name, True)
    }
    shapes = tuple(
        (name, value.dtype, value.shape if name in shared else value.shape[1:])
        for name, value in tensors.items()
    )
    key = (repr(sorted(arguments.items())), shapes, tuple(shared.items()))
    return Call(rows, arguments, tensors, shared, returns_dict, key)


def _is_list_of_rows(value: Any) -> bool:
    """Return whether an argument is a list of images, which Z-Image's network takes."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, torch.Tensor) and item.ndim >= 3 for item in value)
    )


def content_key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Equal for calls with equal arguments, tensors compared by content.

    Raises:
        ExportError: an argument is neither a tensor nor a plain value.
    """
    tensors: dict[str, torch.Tensor] = {}
    template = template_of([list(args), dict(kwargs)], "call", tensors)
    found = {name: (value.dtype, value.shape, digest(value)) for name, value in tensors.items()}
    return repr((template, found))


def digest(value: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    data = value.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _digest(name: str, value: torch.Tensor, known: dict[str, tuple[torch.Tensor, str]]) -> str:
    if name not in known or known[name][0] is not value:
        known[name] = (value, digest(value))
    return known[name][1]


def merged(calls: Sequence[Call], rows: int | None = None) -> dict[str, Any]:
    """Merge calls of one key into the keyword arguments of a single call.

    Args:
        rows: of that call; copies fill it, and surplus rows are dropped. All rows of the calls when
            not given.
    """
    first = calls[0]
    tensors = dict(first.tensors)
    for name in tensors.keys() - first.shared.keys():
        parts = [call.tensors[name] for call in calls]
        together = torch.cat(parts) if len(parts) > 1 else parts[0]
        if rows is not None and rows != len(together):
            together = together[[row % len(together) for row in range(rows)]]
        tensors[name] = together
    arguments = {name: rebuild(item, tensors) for name, item in first.arguments.items()}
    if first.returns_dict is not None:
        arguments[RETURN_DICT] = False
    return arguments


def answers(calls: Sequence[Call], output: Any, rows: int) -> list[Any]:
    """The answer to each of the calls, as each expects it.

    Args:
        output: of a call with `merged` arguments.
        rows: that call's.
    """
    tensors: dict[str, torch.Tensor] = {}
    template = template_of(output, "output", tensors)
    found, start = [], 0
    if len(calls) == 1 and not calls[0].tensors.keys() - calls[0].shared.keys():
        rows = 0  # every tensor is this call's
    for call in calls:
        own = {
            name: value[start : start + call.rows] if value.ndim and len(value) == rows else value
            for name, value in tensors.items()
        }
        start += call.rows
        answer = rebuild(template, own)
        found.append(Fields({"sample": answer[0]}) if call.returns_dict else answer)
    return found
