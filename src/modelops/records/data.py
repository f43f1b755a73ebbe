"""Records of the data commands: deduplication, split and smoke reports."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from modelops.records.base import (
    Amount,
    Count,
    InputRef,
    Measurement,
    Record,
    RecordPart,
    Share,
)
from modelops.records.ranges import SHARE, check_measured


class DuplicateCluster(RecordPart):
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
    neighbours: Count
    n_images: Count
    n_candidate_pairs: Count
    n_exact_duplicates: Count
    clusters: list[DuplicateCluster]
    quarantined: dict[str, str] = {}
    removable: list[str] = []
    components: list[list[str]] = []
    chaining: dict[str, float | int] = {}
    calibration: dict[str, Measurement] = {}
    files: dict[str, InputRef] = {}
    warnings: list[str] = []

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.calibration)
        return self


class SplitReport(Record):
    """split.json, beside splits.parquet (id, split, group)."""

    kind: Literal["split"] = "split"
    counts: dict[str, Count]
    n_groups: Count
    leakage: dict[str, Measurement] = {}
    fractions: dict[str, Share] = {}
    group_counts: dict[str, Count] = {}
    strategy: str = ""
    warnings: list[str] = []
    files: dict[str, InputRef] = {}

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.leakage, allowed=SHARE)
        return self


class SmokeReport(Record):
    """smoke.json: the DataLoader smoke test over the shards."""

    kind: Literal["smoke"] = "smoke"
    verdict: Literal["pass", "fail"]
    reasons: list[str] = []
    n_samples: Count
    n_shards: Count
    images_per_second: Amount
    slowest_batch_over_median: Amount
    measurements: dict[str, Measurement] = {}

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        check_measured(self.measurements)
        return self
