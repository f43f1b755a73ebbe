"""Tensors that a pipeline calls its denoiser with, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modelops.models.pipelines.form import denoiser_of
from modelops.models.pipelines.signatures import parameters_of, template_of


class _DenoiserReachedError(Exception):
    """A pipeline is about to call its denoiser."""


def peek(pipeline: Any, call: Callable[[], Any]) -> dict[str, torch.Tensor] | None:
    """Return the tensors of the first call of the denoiser by dotted name.

    None if there is none, if `call` fails before it, or if the call holds something else than
    tensors and plain values.

    Args:
        pipeline: whose transformer or UNet is watched.
        call: calls the pipeline.
    """
    denoiser = denoiser_of(pipeline)
    if denoiser is None:
        return None
    parameters = parameters_of(denoiser.forward)
    found: dict[str, torch.Tensor] = {}

    def stop(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(parameters, args, strict=False)) | kwargs
        for name, value in given.items():
            template_of(value, name, found)
        raise _DenoiserReachedError

    hidden = vars(denoiser).get("forward")
    object.__setattr__(denoiser, "forward", stop)
    try:
        call()
    except _DenoiserReachedError:
        return found
    except Exception:  # whatever a pipeline raises, `call` tells nothing then
        return None
    finally:
        object.__delattr__(denoiser, "forward")
        if hidden is not None:
            object.__setattr__(denoiser, "forward", hidden)
    return None
