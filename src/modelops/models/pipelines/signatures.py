"""Signature of a component: nested arguments to flat named tensors and back again.

A pipeline calls its networks with keyword arguments that may hold lists and dicts of tensors beside
plain values, and reads its answer as a tuple or an object with named fields. A graph takes named
tensors and gives a list. A `Signature` is the bridge; it is stored as signature.json beside the
graph, so that an artifact can be called as the network was.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from modelops.base.errors import ExportError

Template = dict[str, Any]  # {"tensor": name} | {"value": ...} | {"list"|"tuple"|"dict"|...: ...}
Method = Literal["forward", "encode", "decode"]
TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class Signature(BaseModel):
    """Arguments and answer of one method of a component.

    Attributes:
        method: "forward", or "encode" or "decode" of an autoencoder.
        parameters: names of its arguments, in the order of positions.
        arguments: argument name to template; what a call leaves out is not in it.
        output: template of the answer.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        integers: inputs that are int64; masks of bool are in `booleans`; the rest are float32.
        batch: inputs that have a row for every row of the first axis named "batch".
    """

    model_config = ConfigDict(extra="forbid")

    method: Method
    parameters: list[str]
    arguments: dict[str, Template]
    output: Template
    inputs: list[str]
    outputs: list[str]
    integers: list[str] = []
    booleans: list[str] = []
    batch: list[str] = []

    def flatten(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call's arguments by input name, contiguous, in the graph's dtypes.

        A timestep that is one number for all rows is repeated for every row.

        Raises:
            ExportError: a tensor is missing, or another value than the exported one is asked for.
        """
        given = dict(given)
        tensors: dict[str, torch.Tensor] = {}
        for name, template in self.arguments.items():
            _collect(template, given.pop(name, None), name, tensors)
        for name, value in given.items():
            if not _is_neutral(name, value):
                raise ExportError(
                    f"the exported network takes no {name}",
                    hint="export it with a call that uses it",
                )
        return self.cast(tensors)

    def cast(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by input name in the dtypes of the graph, a timestep as a row each."""
        rows = next((len(tensors[n]) for n in self.batch if n not in TIMESTEP_NAMES), 1)
        return {name: self._cast(name, tensors[name], rows) for name in self.inputs}

    def _cast(self, name: str, value: torch.Tensor, rows: int) -> torch.Tensor:
        wanted = torch.float32
        if name in self.integers:
            wanted = torch.int64
        elif name in self.booleans:
            wanted = torch.bool
        if value.dtype is not wanted:
            value = value.to(wanted)
        if value.requires_grad:
            value = value.detach()
        if name in TIMESTEP_NAMES and name in self.batch:
            value = value.reshape(-1).expand(rows)
        return value.contiguous()

    def restore(self, outputs: Sequence[torch.Tensor], *, return_dict: bool = True) -> Any:
        """The network's answer from the graph's outputs, as a tuple if `return_dict` is False."""
        named = dict(zip(self.outputs, outputs, strict=True))
        answer = rebuild(self.output, named)
        if not return_dict and isinstance(answer, Fields):
            return answer.to_tuple()
        if return_dict and isinstance(answer, tuple) and "return_dict" in self.parameters:
            return Fields({"sample": answer[0]})
        return answer


class Fields:
    """An answer with named fields that can also be read by position, as diffusers and transformers
    give them."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"the exported network's answer has no {name}")

    def __getitem__(self, key: int | str | slice) -> Any:
        return self._fields[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(value for value in self._fields.values() if value is not None)


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Names of a function's arguments, without `self`."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name for name, item in inspect.signature(function).parameters.items()
        if item.kind not in kinds and name != "self"
    ]  # fmt: skip


def template_of(
    value: Any, name: str, tensors: dict[str, torch.Tensor], *, once: bool = False
) -> Template:
    """The template of a nested value; its tensors are put into `tensors` by dotted name.

    Args:
        value: to be described.
        name: of the value.
        tensors: gets its tensors.
        once: a tensor that is there twice (a text encoder's answer and its last hidden state) is
            put in once; a graph cannot give one value under two names.

    Raises:
        ExportError: it holds something that is neither a tensor nor a plain value.
    """
    if isinstance(value, torch.Tensor):
        if once:
            name = next((known for known, item in tensors.items() if item is value), name)
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, torch.dtype):
        return {"value": str(value)}
    parameters = getattr(value, "parameters", None)  # a DiagonalGaussianDistribution
    if isinstance(parameters, torch.Tensor):
        tensors[name] = parameters
        return {"gaussian": name}
    if isinstance(value, Mapping):  # transformers' and diffusers' outputs are mappings with fields
        items = {
            str(key): template_of(item, f"{name}.{key}", tensors, once=once)
            for key, item in value.items()
            if item is not None and not hasattr(item, "get_seq_length")  # a key-value cache
        }
        return {"dict" if type(value) is dict else "fields": items}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        items_of = enumerate(value)
        return {kind: [template_of(v, f"{name}.{i}", tensors, once=once) for i, v in items_of]}
    raise ExportError(f"{name} is a {type(value).__name__}, which cannot enter or leave a graph")


def rebuild(template: Template, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A nested value from its template and its tensors."""
    kind, content = next(iter(template.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "gaussian":
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(tensors[content])
    if kind == "value":
        return content
    if kind in ("dict", "fields"):
        values = {key: rebuild(item, tensors) for key, item in content.items()}
        return values if kind == "dict" else Fields(values)
    sequence = [rebuild(item, tensors) for item in content]
    return sequence if kind == "list" else tuple(sequence)


def _collect(template: Template, value: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of a value into `tensors`, after its template."""
    kind, content = next(iter(template.items()))
    if kind == "tensor":
        if value is None:
            raise ExportError(f"the exported network needs {name}")
        tensors[content] = torch.as_tensor(value)
    elif kind in ("dict", "fields"):
        for key, item in content.items():
            _collect(item, None if value is None else value.get(key), f"{name}.{key}", tensors)
    elif kind in ("list", "tuple"):
        if value is None or len(value) != len(content):
            raise ExportError(f"the exported network needs {len(content)} values as {name}")
        for index, (item, part) in enumerate(zip(content, value, strict=True)):
            _collect(item, part, f"{name}.{index}", tensors)
    elif kind == "value" and value != content and not _is_neutral(name, value):
        raise ExportError(f"the network was exported with {name}={content!r}, not {value!r}")


def _is_neutral(name: str, value: Any) -> bool:
    """Return whether leaving an argument out changes nothing."""
    if name in ("return_dict", "output_attentions", "use_cache", "generator"):
        return True
    return value is None or value is False or (isinstance(value, dict) and not value)


# name -> (example, names of its dynamic axes). No example dimension that may vary is 0 or 1:
# torch.export would take it for a constant.
Example = dict[str, tuple[torch.Tensor, dict[int, str]]]


def is_variadic(module: torch.nn.Module) -> bool:
    """Return whether a module takes its tensors as *args; torch.export wants shapes of those
    nested.
    """
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the advice that torch's exporter and onnxruntime's quantiser log for developers."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
