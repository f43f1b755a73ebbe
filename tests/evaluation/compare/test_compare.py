"""Comparisons of real evaluations: real images with little and with much noise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from modelops.base.errors import IntegrityError, UsageError
from modelops.cli.main import main
from modelops.evaluation.compare.compare import compare_records
from modelops.evaluation.compare.margins import Margin, parse_margins
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.folder import FolderSource
from modelops.gates.decide import decide
from modelops.metrics.frechet import features_to_frechet_distance
from modelops.metrics.protocol import protocol_id
from modelops.records.base import Measurement
from modelops.records.comparison import ComparedMetric, ComparisonRecord
from modelops.records.evaluation import EvaluationRecord, Sampling, SourceInfo
from modelops.records.read import read_any_record, read_record

pytestmark = pytest.mark.xdist_group("compare")  # two evaluations for all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with data/ and the records good.json and noisy.json. Read only."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from modelops.base.images import read_image
    from modelops.data.corpora.openmoji import build_corpus
    from modelops.data.manifest import read_manifest

    root = tmp_path_factory.mktemp("compare")
    manifest = build_corpus(root / "data", resolution=32, limit=40, seed=0)
    rows = read_manifest(manifest).rows
    names = ["test" if i % 4 else "train" for i in range(len(rows))]
    splits = root / "data" / "splits.parquet"
    ids = [row.id for row in rows]
    pq.write_table(pa.table({"id": ids, "split": names, "group": ids}), splits)
    tests = [row for row, name in zip(rows, names, strict=True) if name == "test"]
    (root / "prompts.txt").write_text("".join(f"{row.id} {row.caption}\n" for row in tests))
    generator = np.random.default_rng(0)
    for name, noise in (("good", 12.0), ("noisy", 90.0)):
        (root / name).mkdir()
        for index, row in enumerate(tests):
            pixels = read_image(read_manifest(manifest).image_path(row)).astype(float)
            pixels += generator.normal(size=pixels.shape) * noise
            image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
            image.save(root / name / f"{index:03}.png")
        settings = EvaluationSettings(
            manifest=manifest, splits=splits, prompts_file=root / "prompts.txt", n=len(tests),
            resamples=50, grid=4, safety="none",
        )  # fmt: skip
        evaluate(FolderSource(root / name), settings, out_path=root / f"{name}.json")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; the records still name the first place of the data."""
    for name in ("good", "noisy"):
        shutil.copy(made / f"{name}.json", tmp_path)
        shutil.copytree(made / name, tmp_path / name, ignore=shutil.ignore_patterns("0*.png"))
    return tmp_path


def row_of(record: ComparisonRecord, name: str) -> ComparedMetric:
    return next(row for row in record.comparisons if row.metric == name)


@pytest.fixture(scope="module")
def compared(made: Path) -> ComparisonRecord:
    return compare_records(made / "good.json", made / "noisy.json", resamples=200)


def test_noise_is_worse_and_the_distances_are_paired(
    made: Path, compared: ComparisonRecord
) -> None:
    sides = [read_record(made / f"{name}.json", EvaluationRecord) for name in ("good", "noisy")]
    for name in ("frechet_distance_lite0", "kernel_distance_lite0"):
        row = row_of(compared, name)
        assert row.verdict == "worse", row
        assert row.method.startswith("paired over prompts: delete-")
        values = [side.metrics[name].value for side in sides]
        assert row.difference == pytest.approx(values[1] - values[0], rel=1e-6)
        assert row.n == 30 and row.detectable and row.low < row.difference < row.high
    assert compared.answer == "fail"
    assert any("frechet_distance_lite0 is worse" in reason for reason in compared.reasons)


def test_a_paired_interval_is_narrower_than_that_of_the_records(
    made: Path, compared: ComparisonRecord
) -> None:
    sides = [read_record(made / f"{name}.json", EvaluationRecord) for name in ("good", "noisy")]
    row = row_of(compared, "kernel_distance_lite0")
    apart = np.hypot(*(m.high - m.low for m in (s.metrics[row.metric] for s in sides)))
    assert row.high - row.low < apart


def test_rates_are_paired_and_what_was_not_measured_is_not_compared(
    compared: ComparisonRecord,
) -> None:
    assert "McNemar" in row_of(compared, "near_copy_rate").method
    assert "subsets of 40%" in row_of(compared, "precision_lite0").method
    assert "McNemar" in row_of(compared, "failed_image_rate").method
    fid = row_of(compared, "fid")
    assert fid.verdict == "not comparable" and "--inception-weights" in fid.reason
    assert "frechet_distance_lite0_floor" not in {row.metric for row in compared.comparisons}


def test_a_record_against_itself_is_within_noise_of_itself(made: Path) -> None:
    same = compare_records(made / "good.json", made / "good.json", resamples=50)
    assert same.answer == "pass" and same.n_better == same.n_worse == 0
    assert same.warnings == ["both records are the same file"]
    frechet = row_of(same, "frechet_distance_lite0")
    assert (frechet.difference, frechet.low, frechet.high) == (0.0, 0.0, 0.0)
    assert any("no width" in note for note in frechet.notes)


def test_the_comparison_record_is_evidence_for_a_gate(made: Path, tmp_path: Path) -> None:
    for name in ("good", "noisy"):
        shutil.copy(made / f"{name}.json", tmp_path)
    for second in ("good", "noisy"):
        record = compare_records(made / "good.json", made / f"{second}.json", resamples=50)
        record.write(tmp_path / "comparison.json")
        assert read_any_record(tmp_path / "comparison.json") == record
        assert set(record.inputs) >= {"first", "second", "manifest", "splits"}
        policy = {
            "version": 1, "subject": "final",
            "evidence": {"final": f"{second}.json", "comparison": "comparison.json"},
            "criteria": [
                {"name": "not worse", "evidence": "comparison", "field": "answer",
                 "equals": "pass"},
                {"name": "nothing worse", "evidence": "comparison", "field": "n_worse",
                 "at_most": 0},
            ],
        }  # fmt: skip
        (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
        verdict = decide(
            tmp_path / "policy.yaml", root=tmp_path, out_path=tmp_path / "verdict.json"
        )
        assert verdict.answer == ("pass" if second == "good" else "fail")


def test_features_that_differ_from_their_digest_are_refused(root: Path) -> None:
    path = root / "noisy" / "features.npz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=r"features.npz: differs from the digest"):
        compare_records(root / "good.json", root / "noisy.json")


def test_without_features_the_interval_is_that_of_independent_values(root: Path) -> None:
    (root / "noisy" / "features.npz").unlink()
    row = row_of(compare_records(root / "good.json", root / "noisy.json"), "kernel_distance_lite0")
    assert row.verdict == "worse" and "Newcombe" in row.method
    assert any("not paired" in note and "features are not there" in note for note in row.notes)


def test_the_reference_is_found_by_digest_or_named(made: Path, root: Path) -> None:
    for name in ("good", "noisy"):  # as on another machine
        record = read_record(root / f"{name}.json", EvaluationRecord)
        for key in ("manifest", "splits"):
            entry = record.inputs[key]
            record.inputs[key] = entry.model_copy(update={"path": f"gone/{Path(entry.path).name}"})
        record.write(root / f"{name}.json")
    records = root / "good.json", root / "noisy.json"
    row = row_of(compare_records(*records), "kernel_distance_lite0")
    assert any("name it with --manifest" in note for note in row.notes)
    data = made / "data"
    named = compare_records(
        *records, manifest=data / "manifest.parquet", splits=data / "splits.parquet"
    )
    assert "jackknife" in row_of(named, "kernel_distance_lite0").method
    with pytest.raises(IntegrityError, match="not the manifest"):
        compare_records(*records, manifest=data / "splits.parquet", splits=data / "splits.parquet")


def test_features_that_do_not_give_the_recorded_value_are_not_used(root: Path) -> None:
    record = read_record(root / "noisy.json", EvaluationRecord)
    stated = record.metrics["kernel_distance_lite0"]
    stated.value, stated.high = 2 * stated.value, 3 * stated.high
    record.write(root / "noisy.json")
    row = row_of(compare_records(root / "good.json", root / "noisy.json"), "kernel_distance_lite0")
    assert "Newcombe" in row.method
    assert any("its files give" in note for note in row.notes)


def test_features_of_other_extractors_come_from_the_cache(root: Path) -> None:
    """As FID's do: Inception's weights are not here, so half of Lite0's features stand in."""
    from modelops.base.files import sha256_json
    from modelops.evaluation.reference import open_reference
    from modelops.metrics.features import write_arrays

    records = {n: read_record(root / f"{n}.json", EvaluationRecord) for n in ("good", "noisy")}
    inputs = records["good"].inputs
    pictures = open_reference(
        Path(inputs["manifest"].path), Path(inputs["splits"].path), ("test",)
    )["test"]
    features = {"extractor": "inception", "weights_sha256": "ab" * 32}
    real = pictures.features[:, ::2]
    values = {}

    def cache(name: str, digests: list[str], array: np.ndarray) -> None:
        key = sha256_json({"protocol": protocol_id(features), "images": digests})
        write_arrays(root / name / "cache" / f"{key}.npz", features=array)

    cache("good", [sample.sha256 for sample in pictures.samples], real)
    for name, record in records.items():
        import json

        rows = json.loads((root / name / "per_image.json").read_text())
        with np.load(root / name / "features.npz") as stored:
            array = stored["features"][:, ::2]
        cache(name, [row["image_sha256"] for row in rows], array)
        values[name] = features_to_frechet_distance(array, real)
        protocol = {"metric": "fid", "features": features, "sampling": {}, "ddof": 1}
        record.protocols["p"] = protocol
        record.metrics["fid"] = Measurement(
            value=values[name], low=0.0, high=1e6, n=30, method="m", higher_is_better=False,
            protocol="p",
        )  # fmt: skip
        record.write(root / f"{name}.json")
    row = row_of(compare_records(root / "good.json", root / "noisy.json"), "fid")
    assert "jackknife" in row.method
    assert row.difference == pytest.approx(values["noisy"] - values["good"], rel=1e-9)


def record_of(path: Path, metrics: dict[str, tuple[float, float]], **more: Any) -> Path:
    """A record of values with half-widths, whose lower values are better; nothing beside it."""
    protocol = {"metric": "a number", "sampling": {"seed": 0}}
    EvaluationRecord(
        source=SourceInfo(kind="endpoint", uri="somewhere"),
        sampling=Sampling(
            seed=0, scheduler="", steps=1, guidance=1.0, height=8, width=8, n_prompts=100,
            prompts_sha256="",
        ),
        protocols={"p": protocol},
        metrics={
            name: Measurement(
                value=value, low=value - half, high=value + half, n=100, method="m",
                higher_is_better=False, protocol="p",
            )
            for name, (value, half) in metrics.items()
        },
        **more,
    ).write(path)  # fmt: skip
    return path


def test_rates_of_several_images_a_prompt_are_paired_by_prompt(tmp_path: Path) -> None:
    """Prompt 0 has two unsafe images on one side; the others agree, prompt by prompt."""
    from modelops.base.files import sha256_file, write_json
    from modelops.records.base import InputRef

    protocol = {"metric": "unsafe images", "filter": {"threshold": 0.5}, "sampling": {"seed": 0}}
    for name, first_prompt in (("a", 0.1), ("b", 0.9)):
        scores = [[first_prompt] * 2, *([0.7, 0.2] for _ in range(9)), *([0.1, 0.2],) * 30]
        rows = [
            {"prompt": f"p{prompt}", "replicate": replicate, "failure": None, "nsfw_score": score}
            for prompt, pair in enumerate(scores)
            for replicate, score in enumerate(pair)
        ]
        path = record_of(tmp_path / f"{name}.json", {"unsafe_rate": (0.0, 0.0)})
        write_json(tmp_path / name / "per_image.json", rows)
        record = read_record(path, EvaluationRecord)
        record.protocols["p"] = protocol
        rate = sum(row["nsfw_score"] >= 0.5 for row in rows) / 80
        record.metrics["unsafe_rate"] = record.metrics["unsafe_rate"].model_copy(
            update={"value": rate, "low": 0.0, "high": 1.0}
        )
        entry = InputRef(
            path=f"{name}/per_image.json", sha256=sha256_file(tmp_path / name / "per_image.json")
        )
        record.files["per_image"] = entry
        record.write(path)
    row = row_of(compare_records(tmp_path / "a.json", tmp_path / "b.json"), "unsafe_rate")
    assert (row.first, row.second) == (9 / 80, 11 / 80)
    assert "sign-flip" in row.method and row.n == 40
    assert row.p == 1.0  # one prompt disagrees, however many images it has
    assert row.verdict == "within noise"


def test_many_metrics_do_not_make_one_worse_by_chance(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(12)]
    a = record_of(tmp_path / "a.json", dict.fromkeys(names, (10.0, 1.0)))
    b = record_of(tmp_path / "b.json", {n: (11.8 if n == "m3" else 10.0, 1.0) for n in names})
    holm = compare_records(a, b)
    assert holm.answer == "pass" and holm.n_worse == 0
    row = row_of(holm, "m3")
    assert row.p == pytest.approx(0.0126, abs=5e-4) and row.p_adjusted == pytest.approx(12 * row.p)
    assert "is clear of zero" in row.reason and "12 metrics" in row.reason
    assert compare_records(a, b, adjust=False).n_worse == 1
    certain = record_of(tmp_path / "c.json", {n: (20.0 if n == "m3" else 10.0, 1.0) for n in names})
    assert row_of(compare_records(a, certain), "m3").verdict == "worse"


def test_a_margin_decides_in_place_of_the_verdict(tmp_path: Path) -> None:
    a = record_of(tmp_path / "a.json", {"m": (10.0, 0.1)})
    b = record_of(tmp_path / "b.json", {"m": (10.4, 0.1)})  # difference 0.4 +- 0.14
    assert compare_records(a, b).answer == "fail"
    expected = {"0.6": ("yes", "pass"), "0.2": ("no", "fail"), "0.4": ("undecided", "undecided"),
                "6%": ("yes", "pass"), "2%": ("no", "fail")}  # fmt: skip
    for margin, (within, answer) in expected.items():
        record = compare_records(a, b, margins=parse_margins([f"m={margin}"]))
        row = row_of(record, "m")
        assert (row.verdict, row.within_margin, record.answer) == ("worse", within, answer), margin
    back = compare_records(b, a, margins={"m": Margin(0.0, relative=False)})
    assert (row_of(back, "m").within_margin, back.answer) == ("yes", "pass")


def test_default_margins_are_shown_and_decide_only_if_asked(tmp_path: Path) -> None:
    a = record_of(tmp_path / "a.json", {"m": (10.0, 1.0)})
    b = record_of(tmp_path / "b.json", {"m": (10.1, 1.0)})
    shown = compare_records(a, b)
    row = row_of(shown, "m")
    assert (row.margin, row.margin_source, row.within_margin) == (0.5, "default", "undecided")
    assert shown.answer == "pass"
    assert compare_records(a, b, default_margins=True).answer == "undecided"
    assert row.prompts_needed == pytest.approx(
        100 * (2.8016 * np.sqrt(2) / 1.95996 / 0.5) ** 2, abs=1
    )


def test_a_share_of_about_nothing_is_no_default_margin(tmp_path: Path) -> None:
    a = record_of(tmp_path / "a.json", {"m": (0.01, 1.0)})
    row = row_of(compare_records(a, a), "m")
    assert row.margin is None and row.within_margin is None
    assert any("not clear of zero" in note for note in row.notes)


@pytest.mark.parametrize("text", ["m", "m=", "=1", "m=-1", "m=much", "m=nan", "m=1%%"])
def test_margins_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="METRIC=VALUE"):
        parse_margins([text])


def test_a_margin_of_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    a = record_of(tmp_path / "a.json", {"unsafe_rate": (0.1, 0.05)})
    with pytest.raises(UsageError) as error:
        compare_records(a, a, margins=parse_margins(["unsafe_rat=1"]))
    assert error.value.hint == "did you mean unsafe_rate?"
    with pytest.raises(UsageError, match="already"):
        parse_margins(["m=1", "m=2%"])


def test_other_protocols_and_failed_records_decide_nothing(tmp_path: Path) -> None:
    a = record_of(tmp_path / "a.json", {"m": (10.0, 1.0)})
    other = read_record(a, EvaluationRecord)
    other.protocols["p"] = {"metric": "a number", "sampling": {"seed": 1}}
    other.write(tmp_path / "b.json")
    record = compare_records(a, tmp_path / "b.json")
    assert (record.answer, record.reasons) == ("undecided", ["nothing could be compared"])
    assert row_of(record, "m").reason == "sampling.seed: 0 against 1"
    failed = record_of(tmp_path / "c.json", {"m": (10.0, 1.0)}, status="failed", error="no filter")
    record = compare_records(a, failed)
    assert record.answer == "undecided" and "no filter" in record.warnings[0]


def test_an_asked_margin_that_cannot_be_compared_is_undecided(tmp_path: Path) -> None:
    a = record_of(tmp_path / "a.json", {"m": (10.0, 1.0), "k": (1.0, 0.1)})
    record = read_record(a, EvaluationRecord)
    record.metrics["k"] = Measurement.missing("no time")
    record.write(tmp_path / "b.json")
    less = compare_records(a, tmp_path / "b.json")
    assert (less.answer, less.reasons) == (
        "undecided", ["k was measured in the first record alone"]
    )  # fmt: skip
    del record.metrics["k"]
    record.write(tmp_path / "c.json")
    assert compare_records(a, tmp_path / "c.json").reasons == less.reasons
    assert compare_records(tmp_path / "c.json", a).answer == "pass"  # more is fine
    asked = compare_records(a, tmp_path / "b.json", margins=parse_margins(["k=1"]))
    assert (asked.answer, asked.reasons) == ("undecided", ["k is not comparable"])
    loose = {"m": Margin(5.0, relative=False)}
    lost = compare_records(a, tmp_path / "b.json", margins=loose, default_margins=True)
    assert (lost.answer, lost.reasons) == ("undecided", ["k is not comparable"])
    neither = compare_records(
        tmp_path / "b.json", tmp_path / "b.json", margins=loose, default_margins=True
    )
    assert neither.answer == "pass", "what neither measured decides nothing"


def test_what_the_second_measured_otherwise_is_undecided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A filter of another threshold finds fewer unsafe images; so does any other protocol."""
    a = record_of(tmp_path / "a.json", {"m": (10.0, 1.0), "unsafe_rate": (0.2, 0.1)})
    record = read_record(a, EvaluationRecord)
    for name, threshold in (("a", 0.5), ("b", 0.99)):
        record.protocols["f"] = {"filter": {"threshold": threshold}, "sampling": {"seed": 0}}
        record.metrics["unsafe_rate"].protocol = "f"
        record.write(tmp_path / f"{name}.json")
    record.metrics["unsafe_rate"] = Measurement.missing("no filter")
    record.write(tmp_path / "none.json")
    loose = {"m": Margin(5.0, relative=False)}
    for margins in ({}, loose):
        made = compare_records(a, tmp_path / "b.json", margins=margins)
        assert row_of(made, "unsafe_rate").reason == "filter.threshold: 0.5 against 0.99"
        assert (made.answer, made.reasons) == ("undecided", ["unsafe_rate is not comparable"])
    assert compare_records(tmp_path / "none.json", a).answer == "pass"  # more is fine
    assert main(["compare", str(a), str(tmp_path / "b.json")]) == 4
    assert "unsafe_rate is not comparable" in " ".join(capsys.readouterr().out.split())


def test_farther_from_the_training_pictures_is_not_better(tmp_path: Path) -> None:
    def gap(name: str, value: float) -> Path:
        path = record_of(tmp_path / name, {"nearest_train_distance_gap": (value, 0.01)})
        record = read_record(path, EvaluationRecord)
        record.metrics["nearest_train_distance_gap"].higher_is_better = True
        record.write(path)
        return path

    far, near, copies = gap("far.json", 0.4), gap("near.json", 0.1), gap("copies.json", -0.1)
    verdicts = {
        (a.stem, b.stem): compare_records(a, b).comparisons[0].verdict
        for a, b in ((far, near), (near, far), (near, copies), (copies, near))
    }
    assert list(verdicts.values()) == ["within noise", "within noise", "worse", "better"]


def test_authenticity_is_guarded_by_that_of_real_pictures(root: Path) -> None:
    """Noise is farthest from all training images; less far than noise is not worse. Below what
    real held-out images get it is."""
    found = {}
    for first, second, base in (
        (1.0, 0.9, 0.8),
        (1.0, 0.9, 0.95),
        (0.9, 1.0, 0.8),
        (0.7, 1.0, 0.8),
    ):
        for name, value in (("good", first), ("noisy", second)):
            record = read_record(root / f"{name}.json", EvaluationRecord)
            protocols = {"p": {"metric": "authenticity", "sampling": {}}}
            metrics = {
                key: Measurement(value=v, low=v - 0.01, high=min(v + 0.01, 1), method="m", n=100,
                                 higher_is_better=True, protocol="p")
                for key, v in (("authenticity_lite0", value), ("authenticity_lite0_heldout", base))
            }  # fmt: skip
            changed = {"metrics": metrics, "protocols": protocols}
            record.model_copy(update=changed).write(root / f"{name}.json")
        made = compare_records(root / "good.json", root / "noisy.json", resamples=20)
        found[first, second, base] = row_of(made, "authenticity_lite0")
    assert [row.verdict for row in found.values()] == [
        "within noise", "worse", "within noise", "better",
    ]  # fmt: skip
    assert "real held-out images' value that this metric guards" in found[1.0, 0.9, 0.8].reason
    assert "p < 0.0001, < 0.0001 by Holm over 1 metrics" in found[1.0, 0.9, 0.95].reason
