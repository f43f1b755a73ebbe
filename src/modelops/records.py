"""Every file that one stage leaves for another, as versioned models. Imports no torch.

A record names its inputs by sha256, says how it ended (`ok`, `failed`, `refused`), and gives each
number as a `Measurement`: a value with an interval, n, a method and a protocol, or the reason why
it was not measured.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelops.errors import UsageError
from modelops.files import read_json, sha256_json, write_json

SCHEMA_VERSION = 1
Status = Literal["ok", "failed", "refused"]
Answer = Literal["pass", "fail", "undecided"]
SliceVerdict = Literal["differs", "within noise", "too few"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class InputRef(_Model):
    """An input by name and digest; `path` is relative to the record's workspace where it can be."""

    path: str
    sha256: str


class Environment(_Model):
    """Versions, commit and hardware of the process that wrote a record."""

    modelops: str
    python: str
    platform: str
    packages: dict[str, str] = {}
    commit: str | None = None
    dirty: bool | None = None
    cpu: str = ""
    cores: int | None = None
    memory_gb: float | None = None
    accelerators: list[str] = []


class Measurement(_Model):
    """One number with its interval, or the reason why there is none.

    `value`, `low` and `high` are None exactly when `not_measured` says why.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float = 0.95
    method: str = ""
    n: int = 0
    unit: str = ""
    higher_is_better: bool | None = None
    protocol: str | None = None
    warnings: list[str] = []
    details: dict[str, float | int | str | bool | None] = {}
    not_measured: str | None = None

    @model_validator(mode="after")
    def _value_or_reason(self) -> Self:
        if (self.value is None) == (self.not_measured is None):
            raise ValueError("give either a value or the reason it was not measured")
        if self.value is not None and (self.low is None or self.high is None):
            raise ValueError("a value needs an interval")
        if self.value is None and (self.low is not None or self.high is not None):
            raise ValueError("an interval needs a value")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("the interval is upside down")
        return self

    @classmethod
    def missing(cls, reason: str) -> Measurement:
        """A measurement that was not made, and why."""
        return cls(not_measured=reason)


class Record(_Model):
    """What every record carries."""

    kind: str
    schema_version: int = SCHEMA_VERSION
    status: Status = "ok"
    error: str | None = None
    inputs: dict[str, InputRef] = {}
    seeds: dict[str, int] = {}
    environment: Environment | None = None
    started_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    duration_s: float = 0.0

    @model_validator(mode="after")
    def _known_version(self) -> Self:
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(
                f"schema_version {self.schema_version} is newer than this modelops understands "
                f"({SCHEMA_VERSION}); upgrade modelops"
            )
        return self

    @property
    def digest(self) -> str:
        """sha256 of the record's canonical JSON: what other records cite."""
        return sha256_json(self.model_dump(mode="json"))

    def write(self, path: str | Path) -> None:
        """Write atomically as indented JSON."""
        write_json(path, self.model_dump(mode="json"))


class DuplicateCluster(_Model):
    """Samples closer to their keeper than the threshold; a cluster never crosses a split."""

    keeper: str
    members: list[str]
    kind: Literal["bytes", "pixels", "embedding"]
    min_similarity: float
    reason: str


class DedupReport(Record):
    """dedup_report.json"""

    kind: Literal["dedup"] = "dedup"
    extractor: str
    weights_sha256: str
    threshold: float
    neighbours: int
    n_images: int
    n_candidate_pairs: int
    n_exact_duplicates: int
    clusters: list[DuplicateCluster]
    quarantined: dict[str, str] = {}
    removable: list[str] = []
    components: list[list[str]] = []
    chaining: dict[str, float | int] = {}
    calibration: dict[str, Measurement] = {}
    files: dict[str, InputRef] = {}
    warnings: list[str] = []


class SplitReport(Record):
    """split.json, beside splits.parquet (id, split, group)."""

    kind: Literal["split"] = "split"
    counts: dict[str, int]
    n_groups: int
    leakage: dict[str, Measurement] = {}
    fractions: dict[str, float] = {}
    group_counts: dict[str, int] = {}
    strategy: str = ""
    warnings: list[str] = []
    files: dict[str, InputRef] = {}


class SmokeReport(Record):
    """smoke.json: the DataLoader smoke test over the shards."""

    kind: Literal["smoke"] = "smoke"
    verdict: Literal["pass", "fail"]
    reasons: list[str] = []
    n_samples: int
    n_shards: int
    images_per_second: float
    slowest_batch_over_median: float
    measurements: dict[str, Measurement] = {}


class CheckpointRef(_Model):
    """One checkpoint of a run; sha256 is the tree digest without `training_state/`."""

    step: int
    images_seen: int
    path: str
    sha256: str


class TrainRecord(Record):
    """runs/NAME/train.json"""

    kind: Literal["train"] = "train"
    run_name: str
    parameters: int
    effective_batch: int
    steps: int
    images_seen: int
    final_train_loss: float | None = None
    final_validation_loss: float | None = None
    final_train_probe_loss: float | None = None  # of the same weights, on training pictures
    overfitting_since_step: int | None = None
    loss_trend: Literal["down", "flat", "up", "unknown"] = "unknown"
    training_seconds: float  # from planning to the last checkpoint, over all sessions
    setup_seconds: float | None = None  # before that: data, captions, networks
    time_limit_seconds: float | None = None
    checkpoints: list[CheckpointRef] = []
    config_sha256: str
    planned_steps: int | None = None
    stop_reason: str = ""
    sessions: int = 1
    processes: int = 1
    device: str = ""
    precision: str = ""
    precision_reason: str = ""
    precision_images_per_second: dict[str, float | None] = {}  # of a few steps before the first
    images_per_second: float | None = None
    peak_memory_gb: float | None = None
    n_train_images: int | None = None
    n_validation_images: int | None = None
    quarantined: dict[str, str] = {}
    warnings: list[str] = []


class SourceInfo(_Model):
    """Which model source made the images."""

    kind: Literal["checkpoint", "artifact", "endpoint", "folder"]
    uri: str
    sha256: str | None = None
    runtime: str = ""
    precision: str = ""
    details: dict[str, str | int | float | bool | None] = {}


class Sampling(_Model):
    """How the images were sampled; part of every generated-image protocol."""

    seed: int
    scheduler: str
    steps: int
    guidance: float
    height: int
    width: int
    n_prompts: int
    replicates: int = 1
    prompts_sha256: str


class AlignmentModelRecord(Record):
    """lit.json: the alignment model that scores images against prompts, and how good it is."""

    kind: Literal["alignment_model"] = "alignment_model"
    image_tower: str
    text_tower: str
    weights_sha256: str
    settings: dict[str, str | int | float | bool | None] = {}
    counts: dict[str, int] = {}
    candidates: list[dict[str, str | int | float | bool | None]] = []
    metrics: dict[str, Measurement] = {}


class CopyingTest(_Model):
    """One one-sided test of samples against held-out pictures; a rank test has no counts."""

    name: Literal["near_copies", "unauthentic", "closer"]
    hits: int | None = None
    n: int
    heldout_hits: int | None = None
    n_heldout: int
    method: str
    p_value: float
    p_adjusted: float
    found: bool


class OverfittingNote(_Model):
    """Whether the model fits its training pictures better than new ones, by what was known."""

    answer: Literal["overfitting", "no sign of overfitting", "cannot tell"]
    reason: str
    closer_to_training: bool | None = None  # samples, than real held-out pictures are
    since_step: int | None = None
    step: int | None = None  # whose losses these are
    train_loss: float | None = None
    validation_loss: float | None = None


class MemorizationVerdict(_Model):
    """Whether samples copy training pictures more than held-out pictures seem to."""

    answer: Literal["copies", "no sign of copying", "cannot tell"]
    reason: str
    rule: str
    alpha: float
    tests: list[CopyingTest] = []
    detectable_rate: float | None = None  # share of copies found with 80 % power
    known_copies: int = 0  # training pictures changed a little, as a control of the features
    known_copies_found: int = 0
    caveats: list[str] = []
    overfitting: OverfittingNote | None = None


class SafetySweepPoint(_Model):
    """Share of images whose score is at or above a threshold, with its 95 % interval."""

    threshold: float
    rate: float
    low: float
    high: float


class SafetySweep(_Model):
    """What other thresholds of the image filter would have flagged.

    `generated` are the evaluated images, `real` the held-out pictures (empty without a manifest),
    in rising order of threshold. The protocol is that of `unsafe_rate`, but for its threshold.
    """

    filter: str
    protocol: str
    method: str
    n: int
    generated: list[SafetySweepPoint]
    highest: float | None = None  # score of any generated image
    n_real: int = 0
    real: list[SafetySweepPoint] = []
    highest_real: float | None = None


class SliceMeasurement(_Model):
    """One metric on the prompts of one slice, against all other prompts.

    Each value is a mean over independent groups of prompts. `verdict` follows from `p_corrected`,
    which is Holm's over all `n_comparisons` of the evaluation; the intervals are not corrected.
    """

    by: str  # a manifest column, "tags" or "words"
    value: str
    metric: str
    verdict: SliceVerdict
    n_groups: int
    n_prompts: int
    inside: Measurement
    rest: Measurement
    difference: Measurement  # inside minus rest
    p_value: float | None = None
    p_corrected: float | None = None
    n_comparisons: int = 0


class EvaluationRecord(Record):
    """evaluations/*.json: how good a model source is and exactly how that was measured."""

    kind: Literal["evaluation"] = "evaluation"
    source: SourceInfo
    sampling: Sampling | None = None
    reference: InputRef | None = None
    metrics: dict[str, Measurement] = {}
    protocols: dict[str, dict[str, Any]] = {}
    files: dict[str, InputRef] = {}
    n_failed_images: int = 0
    memorization: MemorizationVerdict | None = None
    safety_sweep: SafetySweep | None = None
    slices: list[SliceMeasurement] = []


class SignTest(_Model):
    """Exact two-sided sign test over prompts; a prompt goes to whom most of its votes do."""

    prompts_b: int
    prompts_a: int
    prompts_even: int
    p_value: float


class RaterSummary(_Model):
    """What one rater did. `left` counts choices of the left picture; times are in seconds."""

    votes: int = 0
    for_a: int = 0
    for_b: int = 0
    equal: int = 0
    left: int = 0
    shown_twice: int = 0
    same_twice: int = 0
    attention_shown: int = 0
    attention_passed: int = 0
    remaining: int = 0
    median_s: float | None = None
    left_out: str | None = None


class AbTestRecord(Record):
    """abtest.json: what raters who did not know which was which say of B against A."""

    kind: Literal["abtest"] = "abtest"
    question: str
    sources: dict[str, SourceInfo]
    records: dict[str, InputRef]
    n_pairs: int
    n_identical_pairs: int = 0
    n_votes: int = 0
    n_prompts: int = 0
    n_undone: int = 0
    metrics: dict[str, Measurement] = {}
    sign_test: SignTest | None = None
    raters: dict[str, RaterSummary] = {}
    left_out: dict[str, int] = {}
    differences: list[str] = []
    warnings: list[str] = []


class ComparedMetric(_Model):
    """One metric of the second record against the first. `difference` is second minus first."""

    metric: str
    verdict: Literal["better", "worse", "within noise", "not comparable"]
    reason: str
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = ""
    n: int = 0  # prompts behind the difference
    p: float | None = None  # two-sided, of this metric alone
    p_adjusted: float | None = None  # by Holm over all compared metrics
    margin: float | None = None  # how much worse is accepted, in the metric's own unit
    margin_source: Literal["", "asked", "default"] = ""
    within_margin: Literal["yes", "no", "undecided"] | None = None
    detectable: float | None = None  # smallest difference seen with 80 % power at this n
    prompts_needed: int | None = None  # to show with 80 % power that equal sources are within it
    notes: list[str] = []


class ComparisonRecord(Record):
    """comparisons/*.json: what of the second evaluation is better or worse than in the first.

    `answer` is what `modelops compare` exits with: pass 0, fail 3, undecided 4. `metrics` repeats
    each difference, second minus first, as a measurement.
    """

    kind: Literal["comparison"] = "comparison"
    first: SourceInfo
    second: SourceInfo
    answer: Answer
    reasons: list[str] = []
    alpha: float = 0.05
    adjustment: Literal["holm", "none"] = "holm"
    n_better: int = 0
    n_worse: int = 0
    n_within_noise: int = 0
    n_not_comparable: int = 0
    n_margins_missed: int = 0
    n_margins_undecided: int = 0
    comparisons: list[ComparedMetric] = []
    metrics: dict[str, Measurement] = {}
    images: dict[str, Measurement] = {}  # pixel by pixel, between the two sources' images
    warnings: list[str] = []


class ExportedComponent(_Model):
    """One exported graph."""

    name: str
    attribute: str = ""  # the pipeline's name for it; both halves of an autoencoder have one
    role: Literal["", "denoiser", "control", "text_encoder", "encoder", "decoder"] = ""
    file: str
    sha256: str
    bytes: int
    precision: str
    opset: int | None = None
    dynamic_axes: list[str] = []
    quantized_nodes: int = 0
    total_nodes: int = 0
    data: InputRef | None = None  # the file beside the graph with its weights; counted in `bytes`
    shapes: dict[str, list[int]] = {}  # of its inputs at the size it was exported at
    axis_multiples: dict[str, int] = {}  # sizes of an axis must be a multiple of its number


class ParityCheck(_Model):
    """How far an exported component, or the whole pipeline, is from its source."""

    name: str
    measure: Literal[
        "max_abs_error",  # in records of 0.1 only
        "max_scaled_error",  # largest |difference| over largest |value|
        "max_relative_error",  # largest L2 of a row's difference over the row's L2
        "psnr_db",
        "ssim",
        "feature_distance",  # largest 1 - cosine of a pair of pictures in feature space
    ]
    value: float
    bound: float
    passed: bool
    n: int


class ReproductionCheck(_Model):
    """Whether a runtime gives an artifact's numbers on a kind of processor."""

    processor: str
    runtime: str
    precision: str  # of what is not INT8
    error: float  # relative, beside torch; of INT8 the root mean square over the rows
    bound: float  # INT8: 1.1 times the error of exact sums
    passed: bool
    n: int  # rows
    fault: str = ""  # why there is no error to speak of: the runtime crashed
    imitated_by: str = ""  # the variable that narrowed another processor to this kind

    @property
    def answer(self) -> str:
        """ "the same numbers", "OTHER NUMBERS", or what went wrong."""
        return self.fault or ("the same numbers" if self.passed else "OTHER NUMBERS")

    @property
    def distance(self) -> str:
        """ "off by 0.0031 (bound 0.0054)", or "" where there is no error."""
        return "" if self.fault else f"off by {self.error:.3g} (bound {self.bound:.3g})"


class ArtifactRecord(Record):
    """artifact.json: a checkpoint exported for a runtime."""

    kind: Literal["artifact"] = "artifact"
    format: Literal["onnx", "int8", "tensorrt", "torchscript"]
    precision: str
    runtime: str
    components: list[ExportedComponent] = []
    parity: list[ParityCheck] = []
    calibration: dict[str, Any] = {}
    bytes_total: int = 0
    source_bytes_total: int = 0
    speed: dict[str, Measurement] = {}
    error_by_noise: list[dict[str, float]] = []  # of the denoiser, in bands of noise level
    pipeline: str = ""  # class of the diffusers pipeline
    size: list[int] = []  # height and width in pixels it was exported and compared at
    omitted: list[str] = []  # parts of the checkpoint that the artifact leaves out
    lora: dict[str, Any] = {}  # how `inputs["lora"]` went in: fused, scale
    conversion: dict[str, Any] = {}  # half precision: what stays in float32, and why
    execution: dict[str, Any] = {}  # which precision each runtime was seen to run the nodes in
    files: dict[str, InputRef] = {}  # every other file of the artifact, relative to it
    reproduced: list[ReproductionCheck] = []  # where an INT8 artifact gives the same numbers


class Criterion(_Model):
    """One line of a verdict."""

    name: str
    evidence: str
    metric: str
    bound: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    answer: Answer
    reason: str


class Verdict(Record):
    """verdict.json"""

    kind: Literal["verdict"] = "verdict"
    answer: Answer
    policy_sha256: str
    subject_sha256: str | None = None
    criteria: list[Criterion] = []


class SignOff(Record):
    """FILE.signoff-ROLE.json: a person's word on a file, as long as the file stays what it was."""

    kind: Literal["signoff"] = "signoff"
    subject: InputRef
    name: str
    role: str
    statement: str


class PreflightRecord(Record):
    """How far a model is from its own numbers on one machine; `modelops serve preflight`."""

    kind: Literal["preflight"] = "preflight"
    model_sha256: str
    processor: str
    runtime: str = ""  # that would serve it here; "" where none gives its numbers
    reason: str = ""
    reproduced: list[ReproductionCheck] = []
    fallback: bool = False  # the release's other artifact would be served here


class ReleaseFile(_Model):
    sha256: str
    bytes: int


class ReleaseRecord(Record):
    """release.json: everything a release consists of, by digest."""

    kind: Literal["release"] = "release"
    name: str
    version: str
    model: str
    model_sha256: str
    fallback: str | None = None  # folder of an artifact for processors that the model is wrong on
    fallback_sha256: str | None = None
    reproduced: list[ReproductionCheck] = []  # kinds of processor, and how far off the model is
    verdict_sha256: str
    verdict_answer: Answer = "pass"
    allowed_without_pass: bool = False
    policy_sha256: str | None = None
    defaults: dict[str, Any] = {}
    files: dict[str, ReleaseFile]


RecordT = TypeVar("RecordT", bound=Record)

RECORD_KINDS: dict[str, type[Record]] = {
    "dedup": DedupReport,
    "split": SplitReport,
    "smoke": SmokeReport,
    "train": TrainRecord,
    "alignment_model": AlignmentModelRecord,
    "evaluation": EvaluationRecord,
    "comparison": ComparisonRecord,
    "abtest": AbTestRecord,
    "artifact": ArtifactRecord,
    "verdict": Verdict,
    "preflight": PreflightRecord,
    "release": ReleaseRecord,
    "signoff": SignOff,
}


def read_record(path: str | Path, expected: type[RecordT]) -> RecordT:
    """Read and validate one record.

    Raises:
        UsageError: the file is missing, not JSON, of another kind, or does not fit the schema.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a record")
    wanted = expected.model_fields["kind"].default
    if data.get("kind") != wanted:
        raise UsageError(f"{path}: a record of kind {data.get('kind')!r}, expected {wanted!r}")
    try:
        return expected.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "record"
        raise UsageError(f"{path}: {where}: {first['msg']}") from error


def read_stats(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's stats.jsonl, each with its `step`; a last line that a kill cut short is
    left out, and a missing file has none."""
    rows: list[dict[str, Any]] = []
    if not Path(path).is_file():
        return rows
    for line in Path(path).read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_any_record(path: str | Path) -> Record:
    """Read a record of whatever kind the file says it is.

    Raises:
        UsageError: it is not a record of a known kind.
    """
    data = read_json(path)
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in RECORD_KINDS:
        known = ", ".join(sorted(RECORD_KINDS))
        raise UsageError(f"{path}: not a record (kind {kind!r}; known kinds: {known})")
    return read_record(path, RECORD_KINDS[kind])


def is_finite(*values: float | None) -> bool:
    """Whether every given value is a finite number."""
    return all(value is not None and math.isfinite(value) for value in values)
