"""Stand-ins for torch modules inside a diffusers pipeline: the same call, another runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict

from modelops.base.errors import UsageError
from modelops.export.graphs.graph import Graph
from modelops.models.pipelines.signatures import Method, Signature

Part = tuple[Graph, Signature]


class ExportedModule:
    """Stand-in for a pipeline's network that answers by graphs.

    `forward` (and so a call), `encode` and `decode` run a graph. `config`, `dtype` and `device` are
    its own. All other attributes that a pipeline reads, such as the width of a layer, come from the
    original class, built without weights.

    Args:
        parts: {method: (its graph, its signature)}.
        config: the configuration of the module it was exported from.
        library, class_name: library ("diffusers" or "transformers") and name of that class.
    """

    dtype = torch.float32  # of everything that enters and leaves a graph

    def __init__(
        self,
        parts: Mapping[Method, Part],
        config: dict[str, Any],
        *,
        library: str = "",
        class_name: str = "",
    ) -> None:
        self.parts = dict(parts)
        self.config = FrozenDict(config)
        self.graph = next(iter(self.parts.values()))[0]
        self.device = torch.device(self.graph.device)
        self._origin = (library, class_name)
        self._skeleton: torch.nn.Module | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, as a call of a torch module does."""
        return self._run("forward", args, kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as the autoencoder does."""
        return self._run("encode", args, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Decode as the autoencoder does."""
        return self._run("decode", args, kwargs)

    def memory(self, **arguments: Any) -> dict[str, torch.Tensor] | None:
        """Return the memory from which the graph reads such arguments of `forward`.

        It is by input name. A call need not copy what is written there. None if the graph has no
        such memory.

        The memory is the graph's, and every call with other arguments of these shapes writes it;
        the graph counts those (`overwritten`).
        """
        graph, signature = self.parts["forward"]
        if self.device.type != "cpu" or not hasattr(graph, "bind"):
            return None
        feed = {name: value.numpy() for name, value in signature.flatten(arguments).items()}
        return {name: torch.from_numpy(array) for name, array in graph.bind(feed)[0].items()}

    def to(self, *args: Any, **kwargs: Any) -> ExportedModule:
        """Return itself: a graph stays in its runtime."""
        return self

    def eval(self) -> ExportedModule:
        """Return itself: a graph is never trained."""
        return self

    def _run(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method not in self.parts:
            raise UsageError(f"{self._origin[1] or 'this network'} was exported without {method}")
        graph, signature = self.parts[method]
        given = dict(zip(signature.parameters, args, strict=False)) | kwargs
        wants_fields = bool(given.get("return_dict", True))
        tensors = signature.flatten(given)
        self._check_positions(tensors)
        if self.device.type == "cpu":
            feed = {name: value.numpy() for name, value in tensors.items()}
            outputs = [torch.from_numpy(array) for array in graph.run_all(feed)]
        else:
            on_device: Any = graph
            placed = {name: value.to(self.device) for name, value in tensors.items()}
            outputs = on_device.run_device(placed)
        return signature.restore(outputs, return_dict=wants_fields)

    def _check_positions(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse what the original class does: more patches than it has positions for.

        A graph takes other rows of the table then, and makes an image.
        """
        limit, patch = self.config.get("pos_embed_max_size"), self.config.get("patch_size") or 1
        images = [tensor for tensor in tensors.values() if tensor.ndim == 4] if limit else []
        for side in (side for image in images for side in image.shape[-2:]):
            if side // patch > limit:
                raise UsageError(
                    f"{side // patch} patches on a side; {self._origin[1]} has {limit} positions",
                    hint="make a smaller image",
                )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_origin" not in self.__dict__:
            raise AttributeError(name)
        if self._skeleton is None:
            self._skeleton = _build_skeleton(*self._origin, dict(self.config))
        return getattr(self._skeleton, name)


class ExportedControl(ExportedModule):
    """Stand-in that passes for the original class, which ControlNet pipelines check."""

    @property
    def __class__(self) -> Any:
        return library_class(*self._origin)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("an exported network's class cannot be changed")


def library_class(library: str, name: str) -> Any:
    """Return a class of diffusers or transformers by its name.

    Raises:
        UsageError: the library is another one, or does not have that name.
    """
    import importlib

    import diffusers

    place = library
    if library.isidentifier() and hasattr(diffusers.pipelines, library):
        place = f"diffusers.pipelines.{library}"  # a part that only one family has
    elif library not in ("diffusers", "transformers"):
        raise UsageError(f"a part of the pipeline is from {library!r}, which is not loaded")
    found = getattr(importlib.import_module(place), name, None)
    if not isinstance(found, type):
        raise UsageError(f"{library} has no {name}", hint="is it a newer version's?")
    return found


def _build_skeleton(library: str, class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    """Build the original module with its weights on no device."""
    from accelerate import init_empty_weights

    kind = library_class(library, class_name)
    with init_empty_weights():
        if library == "diffusers":
            module = kind.from_config(config)
        else:
            module = kind(kind.config_class.from_dict(config))
    result: torch.nn.Module = module
    return result
