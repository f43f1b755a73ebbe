"""The kind of processor that numbers come from: the instructions that change them or their cost."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Name in a label to the names of torch.cpu.get_capabilities() any of which mean it.
_FEATURES: dict[str, tuple[str, ...]] = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": ("avx512_fp16", "fp16"),
    "AMX": ("amx_tile",),
    "NEON": ("neon",),
    "SVE": ("sve",),
    "I8MM": ("i8mm",),
}
# What oneDNN leaves out when one of its variables limits it, by the limit's name.
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "AVX2_VNNI_2")
_WITH_VNNI = ("VNNI", *_WITH_BF16)


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor, as the libraries in this process may use it.

    Attributes:
        architecture: as `platform.machine()` names it.
        features: names of `_FEATURES` that it has.
        limit: limit that a variable sets for oneDNN (torch's and OpenVINO's kernels), or "".
    """

    architecture: str
    features: tuple[str, ...]
    limit: str = ""

    @property
    def kind(self) -> str:
        """Name for records and messages: "x86_64 with AVX2, AVX-512, VNNI, bf16"."""
        text = f"{self.architecture} with {', '.join(self.features) or 'no extensions'}"
        return f"{text}, oneDNN limited to {self.limit}" if self.limit else text

    @property
    def has_bfloat16(self) -> bool:
        """Return whether oneDNN multiplies bfloat16 in hardware, and does not emulate it slowly."""
        return "bf16" in self.features and self._allows(_WITH_BF16)

    @property
    def sums_saturate(self) -> bool:
        """Return whether INT8 kernels may add pairs of products in 16 bits, which can overflow.

        True of x86 processors without VNNI; there only 7-bit weights are sure to be exact.
        """
        if "AVX2" not in self.features:
            return self.architecture in ("x86_64", "AMD64", "i686")
        return "VNNI" not in self.features or not self._allows(_WITH_VNNI)

    def _allows(self, names: tuple[str, ...]) -> bool:
        return not self.limit or any(name in self.limit for name in names)


def this_processor() -> Processor:
    """The processor of this machine, within the limits that variables set for its libraries."""
    return describe_processor(platform.machine(), _capabilities(), os.environ)


def describe_processor(
    architecture: str, capabilities: Mapping[str, Any], variables: Mapping[str, str]
) -> Processor:
    """Describe a processor from torch's report and from variables; see `this_processor`."""
    features = tuple(
        name for name, keys in _FEATURES.items() if any(capabilities.get(key) for key in keys)
    )
    limit = next((variables[name].upper() for name in ONEDNN_LIMITS if variables.get(name)), "")
    if limit in ("ALL", "DEFAULT"):
        limit = ""
    return Processor(architecture, features, limit)


def _capabilities() -> Mapping[str, Any]:
    import torch

    try:
        found: Mapping[str, Any] = torch.cpu.get_capabilities()
        return found
    except AttributeError:  # before torch 2.10
        level = torch.backends.cpu.get_cpu_capability()
        private = {
            "avx512_vnni": "_is_vnni_supported", "avx512_bf16": "_is_avx512_bf16_supported",
            "amx_tile": "_is_amx_tile_supported",
        }  # fmt: skip
        asked = {key: getattr(torch.cpu, name, None) for key, name in private.items()}
        known = {key: bool(function and function()) for key, function in asked.items()}
        return {**known, "avx2": level in ("AVX2", "AVX512"), "avx512_f": level == "AVX512"}
