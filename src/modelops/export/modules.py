"""Stand-ins for torch modules inside a diffusers pipeline: the same call, another runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict

from modelops.export.graphs import Array, Graph


class ExportedModule:
    """What a pipeline asks of a network beside calling it: `config`, `dtype`, `device`.

    Args:
        graph: the network in its runtime.
        config: the configuration of the module it was exported from.
    """

    dtype = torch.float32
    device = torch.device("cpu")  # arrays enter and leave a runtime in host memory

    def __init__(self, graph: Graph, config: dict[str, Any]) -> None:
        self.graph = graph
        self.config = FrozenDict(config)

    def _run(self, feed: dict[str, Array]) -> torch.Tensor:
        return torch.from_numpy(self.graph.run(feed))


class ExportedDenoiser(ExportedModule):
    """Called like UNet2DConditionModel."""

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """sample float32 [N, C, h, w] at timestep [N] (or one for all rows) to [N, C, h, w]."""
        output = self._run(
            denoiser_feed(
                self.graph.input_names, sample, torch.as_tensor(timestep), class_labels,
                encoder_hidden_states, encoder_attention_mask,
            )
        )  # fmt: skip
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=output)


class ExportedTextEncoder(ExportedModule):
    """Called like BertModel; returns (last_hidden_state float32 [N, L, D],)."""

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor]:
        feed = {"input_ids": _integers(input_ids), "attention_mask": _integers(attention_mask)}
        return (self._run(feed),)


def denoiser_feed(
    names: list[str],
    sample: torch.Tensor,
    timestep: torch.Tensor,
    pooled: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> dict[str, Array]:
    """A denoiser call as the named arrays of its graph; `names` says which ones it has."""
    given = {
        "sample": sample,
        "timestep": timestep.reshape(-1).expand(len(sample)),
        "class_labels": pooled,
        "encoder_hidden_states": tokens,
    }
    feed = {
        name: np.ascontiguousarray(value.detach().to(torch.float32).numpy())
        for name, value in given.items()
        if name in names and value is not None
    }
    if "encoder_attention_mask" in names and mask is not None:
        feed["encoder_attention_mask"] = _integers(mask)
    missing = set(names) - set(feed)
    if missing:
        raise TypeError(f"the denoiser needs {', '.join(sorted(missing))}")
    return feed


def _integers(tensor: torch.Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().to(torch.int64).numpy())
