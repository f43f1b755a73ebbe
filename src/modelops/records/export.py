"""Records of an export: artifact.json, its comparisons and the processors where it holds."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, StrictBool, StrictFloat, StrictInt, model_validator
from typing_extensions import TypedDict  # typing's own has no pydantic support before 3.12

from modelops.records.base import Amount, Count, InputRef, Measurement, Record, RecordPart
from modelops.records.ranges import check_measured, check_value, range_of


class ExportedComponent(RecordPart):
    """One exported graph."""

    name: str
    attribute: str = ""  # the pipeline's name for it; both halves of an autoencoder have one
    role: Literal["", "denoiser", "control", "text_encoder", "encoder", "decoder"] = ""
    file: str
    sha256: str
    bytes: Count
    precision: str
    opset: Count | None = None
    dynamic_axes: list[str] = []
    quantized_nodes: Count = 0
    total_nodes: Count = 0
    data: InputRef | None = None  # the file beside the graph with its weights; counted in `bytes`
    shapes: dict[str, list[int]] = {}  # of its inputs at the size it was exported at
    axis_multiples: dict[str, Count] = {}  # sizes of an axis must be a multiple of its number


_AT_LEAST = ("psnr_db", "ssim")


class ParityCheck(RecordPart):
    """Distance of an exported component, or of the whole pipeline, from its source."""

    name: str
    measure: Literal[
        "max_abs_error",  # in records of 0.1 only
        "max_scaled_error",  # largest |difference| over largest |value|
        "max_relative_error",  # largest L2 of a row's difference over the row's L2
        "psnr_db",
        "ssim",
        "feature_distance",  # largest 1 - cosine of a pair of images in feature space
    ]
    value: float
    bound: float
    passed: bool
    n: Count

    @model_validator(mode="after")
    def _a_distance_is_not_negative(self) -> Self:
        if self.value < 0 and self.measure not in _AT_LEAST:
            raise ValueError(f"{self.measure} is a distance, {self.value} is none")
        check_value(self.measure, self.value, range_of(self.measure))
        return self

    @property
    def holds(self) -> bool:
        """Whether the value is within its bound and something was compared, and it says so too.

        PSNR and SSIM must be at least their bound, distances at most.
        """
        within = self.value >= self.bound if self.measure in _AT_LEAST else self.value <= self.bound
        return self.passed and within and self.n > 0

    @property
    def distance(self) -> str:
        """ "psnr_db 3 (bound 28)"."""
        return f"{self.measure} {self.value:.3g} (bound {self.bound:.3g})"


class ReproductionCheck(RecordPart):
    """Check whether a runtime gives an artifact's numbers on a kind of processor."""

    processor: str
    runtime: str
    precision: str  # of the nodes that are not INT8
    error: Amount  # relative, beside torch; of INT8 the root mean square over the rows
    bound: float  # INT8: 1.1 times the error of exact sums
    passed: bool
    n: Count  # rows
    fault: str = ""  # reason why there is no error value: the runtime crashed
    imitated_by: str = ""  # the variable that narrowed another processor to this kind

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound and something was compared, and it says so too."""
        return self.passed and not self.fault and self.error <= self.bound and self.n > 0

    @property
    def answer(self) -> str:
        """ "the same numbers", "OTHER NUMBERS", or what went wrong."""
        return self.fault or ("the same numbers" if self.holds else "OTHER NUMBERS")

    @property
    def distance(self) -> str:
        """ "off by 0.0031 (bound 0.0054)", or "" where there is no error."""
        return "" if self.fault else f"off by {self.error:.3g} (bound {self.bound:.3g})"


class LoraUse(TypedDict, total=False):
    """Use of `inputs["lora"]`: whether it was added to the weights, and at which scale."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    fused: StrictBool
    scale: StrictInt | StrictFloat


class Execution(TypedDict, total=False):
    """Precision that a runtime was seen to run a graph's nodes in."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    layers: dict[str, Count]
    int8_layers: Count
    layers_total: Count
    float_layers: list[str]
    rest: str  # precision of the layers that are not INT8
    quantised_but_float: list[str]


class ArtifactRecord(Record):
    """artifact.json: a checkpoint exported for a runtime."""

    kind: Literal["artifact"] = "artifact"
    format: Literal["onnx", "int8", "tensorrt", "torchscript"]
    precision: str
    runtime: str
    components: list[ExportedComponent] = []
    parity: list[ParityCheck] = []
    calibration: dict[str, Any] = {}
    bytes_total: Count = 0
    source_bytes_total: Count = 0
    speed: dict[str, Measurement] = {}
    error_by_noise: list[dict[str, float]] = []  # of the denoiser, in bands of noise level
    pipeline: str = ""  # class of the diffusers pipeline
    size: list[Count] = []  # height and width in pixels it was exported and compared at
    omitted: list[str] = []  # parts of the checkpoint that the artifact leaves out
    lora: LoraUse = {}
    conversion: dict[str, Any] = {}  # half precision: what stays in float32, and why
    # By runtime; TensorRT by component, torch-export with the reason why one was not captured.
    execution: dict[str, Execution | dict[str, Execution] | dict[str, str]] = {}
    files: dict[str, InputRef] = {}  # every other file of the artifact, relative to it
    reproduced: list[ReproductionCheck] = []  # where an INT8 artifact gives the same numbers

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.speed)
        return self
