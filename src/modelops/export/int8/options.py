"""Options of an INT8 export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelops.base.errors import UsageError
from modelops.export.int8.ranges import METHODS, Method

ERROR_BUDGET = 0.06  # relative error of an output that INT8 may come to, unless the rest is worse
WEIGHT_RANGES = ("auto", "full", "reduced")


@dataclass(frozen=True)
class Int8Options:
    """Options of a denoiser's quantisation.

    Attributes:
        method: finds a tensor's range in the values seen: minmax, percentile, entropy.
        steps: number of steps of a calibration trajectory.
        rows: number of denoiser rows to calibrate with.
        error_budget: relative error allowed (root mean square over held-out rows); when None,
            ERROR_BUDGET, or 1.5 times what the serving precision rounds without INT8.
        search_seconds: seconds for measuring groups of layers; a scan by noise level takes at most
            as long. If it is short for a large network, errors of groups are measured on fewer rows
            (at least eight) and times on fewer rows and rounds (at least one and five).
        weight_range: "full" (8 bits), "reduced" (7 bits, exact on every processor), or "auto": see
            `saturation.choose_weight_range`.
        smooth: try SmoothQuant and shifts on transformers.
        ort_cpu: try a graph for onnxruntime's CPU provider; when None, where OpenVINO is missing.
        speed_rounds: rounds of the timing; 0 leaves it out, which only `allow` lets pass.
    """

    method: Method = "minmax"
    steps: int = 16
    rows: int = 128
    error_budget: float | None = None
    search_seconds: float = 300.0
    weight_range: Literal["auto", "full", "reduced"] = "auto"
    smooth: bool = True
    ort_cpu: bool | None = None
    speed_rounds: int = 15

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"unknown method {self.method!r}", hint=f"choose one of {', '.join(METHODS)}"
            )
        if self.weight_range not in WEIGHT_RANGES:
            raise UsageError(
                f"unknown weight range {self.weight_range!r}",
                hint=f"choose one of {', '.join(WEIGHT_RANGES)}",
            )
        if self.steps < 1 or self.rows < 8:
            raise UsageError(
                f"steps must be at least 1 and rows at least 8, got {self.steps} and {self.rows}"
            )
        if self.error_budget is not None and not 0 < self.error_budget < 1:
            raise UsageError(f"the error budget must be between 0 and 1, got {self.error_budget}")
