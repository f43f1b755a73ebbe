"""Records refuse values that their measures cannot have."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from modelops.records.base import Measurement
from modelops.records.comparison import ComparedMetric
from modelops.records.data import SplitReport
from modelops.records.evaluation import EvaluationRecord, SliceMeasurement, SourceInfo
from modelops.records.export import ArtifactRecord, ParityCheck
from modelops.records.ranges import check_measured
from modelops.records.read import read_any_record

PUBLISHED = Path(__file__).parents[2] / "cards" / "openmoji-pilot"


def of(value: float, unit: str = "", spread: float = 0.0) -> Measurement:
    return Measurement(value=value, low=value - spread, high=value + spread, n=9, unit=unit)


@pytest.mark.parametrize(
    ("name", "unit", "impossible", "possible"),
    [
        ("authenticity_lite0", "rate", (-0.1, 1.5), (0, 1)),
        ("lit_retrieval_top5", "rate", (-0.1, 1.5), (0.5,)),
        ("lit_heldout_retrieval_top1", "", (-0.1, 1.5), (1,)),
        ("anything", "rate", (-0.1, 1.5), (1,)),
        ("precision_lite0", "", (-0.1, 1.1), (0, 1)),
        ("recall_lite0", "", (-0.1, 1.1), (0, 1)),
        ("coverage_lite0", "", (-0.1, 1.1), (0, 1)),
        ("unsafe_rate", "", (-0.1, 1.1), (0, 1)),
        ("density_lite0", "", (-0.1,), (0, 3)),
        ("fid_clean", "", (-1,), (0, 300)),
        ("frechet_distance_infinity_lite0", "", (), (-1, 300)),
        ("kernel_distance_lite0", "", (), (-0.01,)),
        ("lit_alignment", "cosine", (-1.1, 1.1), (-0.2, 1.0000001)),
        ("lit_alignment_gain", "cosine", (2.1,), (-1.5,)),
        ("nearest_train_distance_gap", "1 - cosine", (2.1,), (-0.4,)),
        ("clip_score", "100 cosine", (101,), (30,)),
        ("pair_psnr", "dB", (-1,), (40,)),
    ],
)
def test_a_measure_has_a_range_by_its_unit_or_name(
    name: str, unit: str, impossible: tuple[float, ...], possible: tuple[float, ...]
) -> None:
    for value in possible:
        check_measured({name: of(value, unit)})
    source = SourceInfo(kind="folder", uri="samples")
    for value in impossible:
        with pytest.raises(ValidationError, match=f"{name}: {value:g} is impossible"):
            EvaluationRecord(source=source, metrics={name: of(value, unit)})


def test_the_interval_of_a_share_is_within_0_and_1() -> None:
    with pytest.raises(ValueError, match=r"precision_lite0: -0\.1 is impossible"):
        check_measured({"precision_lite0": of(0.1, spread=0.2)})
    check_measured({"fid": of(1, spread=2)})


def test_slices_and_comparisons_allow_negative_differences_only() -> None:
    def slice_of(inside: float, difference: float) -> SliceMeasurement:
        return SliceMeasurement(
            by="tags", value="sun", metric="near_copy_rate", verdict="differs", n_groups=9,
            n_prompts=9, inside=of(inside, "rate"), rest=of(0.9, "rate"),
            difference=of(difference, "rate"),
        )  # fmt: skip

    source = SourceInfo(kind="folder", uri="samples")
    EvaluationRecord(source=source, slices=[slice_of(0.1, -0.8)])
    for bad in (slice_of(-0.1, -0.8), slice_of(0.1, -1.8)):
        with pytest.raises(ValidationError, match="near_copy_rate: -"):
            EvaluationRecord(source=source, slices=[bad])
    named = {"metric": "recall_lite0", "verdict": "worse", "reason": "less"}
    ComparedMetric(**named, first=0.9, second=0.1, difference=-0.8)
    with pytest.raises(ValidationError, match="recall_lite0"):
        ComparedMetric(**named, first=1.9, second=0.1, difference=-0.8)


def test_leakage_fractions_speed_and_parity_are_possible_or_refused() -> None:
    counts = {"train": 8, "val": 1, "test": 1}
    with pytest.raises(ValidationError, match=r"val_in_train: -0\.5"):
        SplitReport(counts=counts, n_groups=9, leakage={"val_in_train": of(-0.5)})
    with pytest.raises(ValidationError, match="fractions"):
        SplitReport(counts=counts, n_groups=9, fractions={"train": -1})
    with pytest.raises(ValidationError, match="over_torch_eager: -2"):
        ArtifactRecord(
            format="onnx", precision="float32", runtime="onnxruntime",
            speed={"denoiser_batch1_over_torch_eager": of(-2, "x")},
        )  # fmt: skip
    for measure, value in (("ssim", 1.5), ("ssim", -1.5), ("psnr_db", -1)):
        with pytest.raises(ValidationError, match=measure):
            ParityCheck(name="i", measure=measure, value=value, bound=0.9, passed=True, n=1)  # type: ignore[arg-type]


def test_the_published_records_are_still_read() -> None:
    names = ("data/split.json", "data/dedup_report.json", "data/smoke.json",
             "runs/pilot/train.json", "evaluations/final.json",
             "artifacts/pilot/int8/artifact.json")  # fmt: skip
    for name in names:
        assert read_any_record(PUBLISHED / name).status == "ok"
