"""Real images that come as a folder, or as statistics that others have published."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modelops.base.errors import EvaluationError, UsageError
from modelops.base.files import sha256_file
from modelops.data.manifest import COLUMNS
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.reference import open_reference
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.open import open_source
from modelops.metrics.frechet import features_to_statistics, frechet_distance
from modelops.metrics.known import KnownStatistics, known_interval, read_statistics
from modelops.models.encoders import Lite0, images_to_lite0_features


def folder_of(path: Path, n: int, seed: int, bright: int = 0) -> Path:
    path.mkdir()
    generator = np.random.default_rng(seed)
    for k in range(n):
        noise = generator.integers(0, 150, (6, 6, 3), np.uint8) + np.uint8(bright)
        Image.fromarray(noise).resize((32, 32), Image.Resampling.NEAREST).save(path / f"{k}.png")
    return path


def test_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    made = folder_of(tmp_path / "made", 12, seed=1)
    real = folder_of(tmp_path / "real", 16, seed=2, bright=100)
    (real / "._3.png").write_bytes(b"of macOS")
    before = sorted(real.iterdir())
    settings = EvaluationSettings(reference=real, resamples=20, prompt_filter="none")
    record = evaluate(open_source(str(made)), settings, out_path=tmp_path / "eval.json")

    images = [
        [np.array(Image.open(folder / f"{k}.png")) for k in range(count)]
        for folder, count in ((made, 12), (real, 16))
    ]
    expected = frechet_distance(
        *(features_to_statistics(images_to_lite0_features(each, network=Lite0()))
          for each in images)
    )  # fmt: skip
    distance = record.metrics["frechet_distance_lite0"]
    assert distance.value == pytest.approx(expected, rel=1e-4)
    assert distance.low is not None and distance.low < expected < (distance.high or 0)
    assert record.reference is not None and record.reference.path == str(real)
    assert record.metrics["image_false_positive_rate"].n == 16
    assert record.metrics["near_copy_rate"].value is None
    assert sorted(real.iterdir()) == before  # nothing is written into somebody's images

    (real / "3.png").write_bytes((made / "0.png").read_bytes())
    again = evaluate(open_source(str(made)), settings, out_path=tmp_path / "again.json")
    assert again.reference is not None and again.reference.sha256 != record.reference.sha256
    assert again.metrics["frechet_distance_lite0"].value != distance.value


def test_all_real_images_may_be_held_out(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 4, seed=3)
    with (tmp_path / "manifest.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(COLUMNS)
        for k in range(4):
            name = f"images/{k}.png"
            rows.writerow([k, name, f"noise {k}", "CC0-1.0", "here", sha256_file(tmp_path / name),
                           0, "", "2026-01-01"])  # fmt: skip
    splits = tmp_path / "splits.parquet"
    pq.write_table(pa.table({"id": list("0123"), "split": ["test"] * 4}), splits)
    found = open_reference(tmp_path / "manifest.csv", splits, ("test", "train"))
    assert list(found) == ["test"] and len(found["test"].samples) == 4
    pq.write_table(pa.table({"id": list("0123"), "split": ["test"] * 3 + ["val"]}), splits)
    with pytest.raises(UsageError, match="0 usable images in split 'train'"):
        open_reference(tmp_path / "manifest.csv", splits, ("test", "train"))


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_the_distance_to_statistics_is_frechets(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(500, 24))
    fake = generator.normal(0.3, 1.2, size=(200, 24))
    statistics = features_to_statistics(real)
    path = save(tmp_path / "s.npz", mu=statistics.mean, sigma=statistics.covariance)
    found = known_interval(fake, read_statistics(path), seed=0)
    assert found.value == pytest.approx(
        frechet_distance(features_to_statistics(fake), statistics), rel=1e-9
    )
    assert found.low < found.value < found.high
    # Singular statistics, of fewer images than dimensions, are what they are.
    few = features_to_statistics(real[:10])
    path = save(tmp_path / "few.npz", mu=few.mean, sigma=few.covariance)
    assert known_interval(fake, read_statistics(path), seed=0).value == pytest.approx(
        frechet_distance(features_to_statistics(fake), few), rel=1e-6
    )


def test_the_interval_holds_other_draws_of_the_images() -> None:
    """The reference is fixed, and only the images are drawn anew."""
    generator = np.random.default_rng(1)
    real = features_to_statistics(generator.normal(size=(2000, 8)))
    known = KnownStatistics(Path("x"), "", real.mean, real.covariance)

    def draw() -> np.ndarray:
        return generator.normal(0.4, 1.0, size=(120, 8))

    mean = np.mean([frechet_distance(features_to_statistics(draw()), real) for _ in range(400)])
    held = [
        found.low < mean < found.high
        for found in (known_interval(draw(), known, seed=k, groups=12) for k in range(100))
    ]
    assert 88 <= sum(held) <= 100


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mean": np.zeros(4)}, "no mu and sigma in it, but mean"),
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, "do not fit"),
        ({"mu": np.zeros((4, 4)), "sigma": np.eye(4)}, "do not fit"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "is not finite"),
        ({"mu": np.zeros(4), "sigma": -np.eye(4)}, "is no covariance"),
        ({"mu": np.zeros(4), "sigma": np.triu(np.ones((4, 4)))}, "is no covariance"),
        ({"mu": np.array(["a"] * 4), "sigma": np.eye(4)}, "not an .npz file of statistics"),
        ({"mu": np.array([{}] * 4), "sigma": np.eye(4)}, "not an .npz file of statistics"),
    ],
)  # fmt: skip
def test_what_is_no_statistics_is_one_line(
    tmp_path: Path, arrays: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_statistics(save(tmp_path / "s.npz", **arrays))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, data in (("empty.npz", b""), ("text.npz", b"mu"), ("zip.npz", b"PK\x03\x04 cut")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=r"not an \.npz file of statistics"):
            read_statistics(tmp_path / name)
    with pytest.raises(UsageError, match=r"nothing\.npz"):
        read_statistics(tmp_path / "nothing.npz")
    with pytest.raises(EvaluationError, match="statistics of 4 dimensions, the features have 8"):
        known_interval(
            np.zeros((9, 8)), KnownStatistics(Path("x"), "", np.zeros(4), np.eye(4)), seed=0
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reference": Path("real"), "manifest": Path("m"), "splits": Path("s")},
         "the real images come from one of them"),
        ({"reference": Path("s.npz")}, "no Inception weights"),
        ({"split": "val"}, "a split without a manifest has no effect"),
    ],
)  # fmt: skip
def test_references_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EvaluationSettings(**options)  # type: ignore[arg-type]
