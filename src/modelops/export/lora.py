"""Low-rank weights of a file, put into a pipeline whole or not at all."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelops.base.errors import MissingExtraError, UsageError, first_line
from modelops.base.extras import require_module

# What diffusers raises of a file that is broken, of another format or of another network.
_NOT_A_LORA = (
    OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError,
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """Low-rank weights to export with.

    Attributes:
        path: a safetensors file, or a directory that holds one.
        fused: whether they are added into the weights; else they are kept as separate layers.
        scale: their factor.

    Raises:
        UsageError: the scale is 0 or not finite.
    """

    path: Path
    fused: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise UsageError(
                f"a LoRA's scale is {self.scale:g}; it must be a finite number other than 0",
                hint="leave --lora out to export without it",
            )


def apply_lora(pipeline: Any, lora: Lora) -> None:
    """Load low-rank weights into a pipeline; needs the package peft.

    Raises:
        MissingExtraError: peft is not installed, or too old.
        UsageError: the pipeline takes no LoRA, the file is not a LoRA, or a weight of it fits no
            layer of the pipeline.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise UsageError(f"{type(pipeline).__name__} takes no LoRA")
    path = _weights_file(lora.path)
    require_module("peft", needed_for="exporting with a LoRA")
    where = {"weight_name": path.name, "local_files_only": True, "use_safetensors": True}
    unet = getattr(pipeline, "unet", None)
    try:
        raw = _read_tensors(path)
        unet_config = {} if unet is None else {"unet_config": unet.config}
        read = pipeline.lora_state_dict(str(path.parent), **where, **unet_config)
        named = read[0] if isinstance(read, tuple) else read
        pipeline.load_lora_weights(str(path.parent), **where)
        _check_applied(pipeline, path, raw, named)
        _set_scales(pipeline, raw)
        if lora.fused:
            pipeline.fuse_lora(components=_with_lora(pipeline), lora_scale=lora.scale)
            pipeline.unload_lora_weights()
        elif lora.scale != 1:
            names = pipeline.get_active_adapters()
            pipeline.set_adapters(names, adapter_weights=[lora.scale] * len(names))
    except _NOT_A_LORA as error:
        lines = (line.strip() for line in str(error).splitlines())
        said = next((line for line in lines if "size mismatch" in line), first_line(error))
        if "version of PEFT" in said:  # transformers asks for a newer one than diffusers does
            raise MissingExtraError(f"{path}: {said}", hint="pip install --upgrade peft") from error
        raise UsageError(
            f"{path}: not a LoRA of this checkpoint: {said}",
            hint="name a LoRA of the same family and size",
        ) from error


def _weights_file(path: Path) -> Path:
    """Return the safetensors file that is meant.

    Raises:
        UsageError: there is none, there are several, or it is of another format.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise UsageError(
                f"{path}: {len(found)} files *.safetensors", hint="name the LoRA's own file"
            )
        return found[0]
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: not a *.safetensors file; pickles are not read")
    return path


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error


def _with_lora(pipeline: Any) -> list[str]:
    """Return the names of the components that hold low-rank layers.

    `fuse_lora` without names leaves Flux' text encoder out.
    """
    return [
        name
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        and any("lora_" in key for key, _ in module.named_parameters())
    ]


def _check_applied(
    pipeline: Any,
    path: Path,
    raw: Mapping[str, torch.Tensor],
    named: Mapping[str, torch.Tensor],
) -> None:
    """Check that every weight of the file is in a low-rank layer now.

    diffusers skips what it does not know, with a warning at most. It renames the file's keys in
    many ways; a weight is recognised by its values.

    Args:
        raw: tensors of the file.
        named: the same as diffusers renames them for its layers.

    Raises:
        UsageError: weights were not applied, or a layer lacks one of its two.
    """
    layers = [
        (f"{name}.{key}", value)
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for key, value in module.named_parameters()
        if "lora_" in key
    ]
    present = Counter(_content(value) for _, value in layers if not value.is_meta)
    left_out = []
    for key, value in named.items():
        if _is_weight(key, value):
            content = _content(value)
            if present[content]:
                present[content] -= 1
            else:
                left_out.append(key)
    total = sum(_is_weight(key, value) for key, value in named.items())
    # Renaming may split a weight, and never makes fewer numbers of it.
    numbers = [
        sum(value.numel() for key, value in tensors.items() if _is_weight(key, value))
        for tensors in (raw, named)
    ]
    if not left_out and numbers[1] < numbers[0]:
        known = {_content(value) for value in named.values()}
        left_out = [k for k, v in raw.items() if _is_weight(k, v) and _content(v) not in known]
        total = len(raw)
    if left_out or not total:
        raise UsageError(
            f"{path}: {len(left_out)} of {total} weights fit no layer of "
            f"{type(pipeline).__name__}" + (f", the first {left_out[0]}" if left_out else ""),
            hint="name a LoRA of the same family, of low-rank weights alone",
        )
    lacking = [key for key, value in layers if value.is_meta or present[_content(value)]]
    if lacking:
        raise UsageError(f"{path}: lacks {len(lacking)} weights, the first {lacking[0]}")


def _set_scales(pipeline: Any, raw: Mapping[str, torch.Tensor]) -> None:
    """Give every layer the factor alpha / rank that a file with alphas means for it.

    diffusers takes the commonest alpha for all layers whose own it cannot tell: with ranks that
    differ, or layers without an alpha (whose factor is 1), some came out doubled or halved.
    """
    if not any(key.endswith(".alpha") for key in raw):
        return
    factors: dict[Any, float] = {}
    for key, value in raw.items():
        layer, _, what = key.rpartition(".lora")
        if what in ("_down.weight", ".down.weight", "_A.weight"):
            alpha = raw.get(f"{layer}.alpha")
            factors[_content(value)] = 1.0 if alpha is None else float(alpha) / value.shape[0]
    for module in pipeline.components.values():
        parts: list[Any] = list(module.modules()) if isinstance(module, torch.nn.Module) else []
        for part in parts:
            for name, down in getattr(part, "lora_A", {}).items():
                factor = factors.get(_content(down.weight))
                if factor is not None:
                    part.lora_alpha[name] = factor * part.r[name]
                    part.scaling[name] = factor


def _is_weight(key: str, value: torch.Tensor) -> bool:
    return value.ndim > 0 and not key.endswith("alpha")


def _content(value: torch.Tensor) -> tuple[torch.Size, bytes]:
    """Return a key of a tensor's shape and values, whatever its precision."""
    numbers = value.detach().to("cpu", torch.float32).contiguous().numpy()
    return value.shape, hashlib.sha256(numbers.tobytes()).digest()
