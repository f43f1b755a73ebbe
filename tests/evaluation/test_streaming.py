"""Features in files or in memory, the reference cached or not: the same record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.base.images import encode_png
from modelops.evaluation.compare.agreement import pairwise_measures
from modelops.evaluation.compare.compare import compare_records
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.reference import open_reference
from modelops.evaluation.settings import STREAM_FROM, EvaluationSettings
from modelops.evaluation.sources.folder import FolderSource
from modelops.metrics.dinov2 import Dinov2Extractor
from modelops.records.evaluation import EvaluationRecord

IMAGES = 30  # more than twice DINOv2's 8 dimensions here, so that its statistics are streamed

CLOSE = {"rel": 1e-6, "abs": 1e-7}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2's class with small random weights."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    directory = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        initializer_range=0.5,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(directory)
    crop = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def folder(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy held-out images, and prompts beside them for two images each."""
    root = tmp_path_factory.mktemp("noisy")
    real = open_reference(corpus.manifest, corpus.splits, ("test",))["test"]
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for index in range(IMAGES):
        picture = real.read(index % len(real.samples))
        noisy = np.clip(np.rint(picture + generator.normal(0, 30, picture.shape)), 0, 255)
        (root / "images" / f"{index:03}.png").write_bytes(encode_png(noisy.astype(np.uint8)))
    (root / "prompts.txt").write_text("".join(f"drawing {i}\n" for i in range(IMAGES // 2)) * 2)
    return root


def run(corpus: Any, folder: Path, dinov2: Path, out: Path, **more: Any) -> EvaluationRecord:
    settings = EvaluationSettings(
        manifest=corpus.manifest, splits=corpus.splits, lit=corpus.lit,
        prompts_file=folder / "prompts.txt", n=IMAGES, dinov2_weights=dinov2, resamples=50,
        jackknife_groups=4, safety="none", known_copies=2, **more,
    )  # fmt: skip
    return evaluate(FolderSource(folder / "images"), settings, out_path=out)


def numbers(out: Path, record: EvaluationRecord) -> dict[str, Any]:
    """Everything that was measured."""
    rows = json.loads((out.with_suffix("") / "per_image.json").read_text("utf-8"))
    kept = {"metrics", "protocols", "memorization", "slices"}
    return {**record.model_dump(mode="json", include=kept), "rows": rows}


@pytest.fixture(scope="module")
def plain(
    corpus: Any, folder: Path, dinov2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EvaluationRecord]:
    out = tmp_path_factory.mktemp("plain") / "a.json"
    return out, run(corpus, folder, dinov2, out, stream=False, cache=False)


def test_streamed_features_give_the_same_record(
    plain: tuple[Path, EvaluationRecord], corpus: Any, folder: Path, dinov2: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b.json"
    record = run(corpus, folder, dinov2, out, stream=True)
    cache = open_reference(corpus.manifest, corpus.splits, ("test",))["test"].cache_dir
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".npz"}
    assert record.files["features"].path.endswith(".npy")
    assert not (out.with_suffix("") / "features.npz").exists()
    expected = plain[1]
    assert record.protocols == expected.protocols and record.memorization == expected.memorization
    assert list(record.metrics) == list(expected.metrics)
    assert sum(measured.value is not None for measured in record.metrics.values()) > 20
    for name, measured in record.metrics.items():
        other = expected.metrics[name]
        for end in ("value", "low", "high"):
            wanted, found = getattr(other, end), getattr(measured, end)
            same = found is None if wanted is None else found == pytest.approx(wanted, **CLOSE)
            assert same, (name, end, found, wanted)
        assert (measured.method, measured.n) == (other.method, other.n)
    rows, others = numbers(out, record)["rows"], numbers(*plain)["rows"]
    for row, other in zip(rows, others, strict=True):
        assert row.pop("image") and other.pop("image")
        assert row.keys() == other.keys()
        for key, value in row.items():
            is_number = isinstance(value, float)
            assert value == (pytest.approx(other[key], **CLOSE) if is_number else other[key]), key
    again = compare_records(plain[0], out, resamples=20)
    assert again.n_not_comparable == sum(row.first is None for row in again.comparisons)
    assert (again.n_better, again.n_worse) == (0, 0)
    assert pairwise_measures(plain[0], out)["pair_cosine_lite0"].value == pytest.approx(1.0)


@pytest.mark.slow
def test_a_second_evaluation_does_not_extract_the_reference_again(
    plain: tuple[Path, EvaluationRecord], corpus: Any, folder: Path, dinov2: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Counted by the extractor itself; with and without cache the numbers are equal."""
    seen: list[int] = []
    extract = Dinov2Extractor.images_to_features

    def counting(self: Dinov2Extractor, images: Any, **more: Any) -> Any:
        features = extract(self, images, **more)
        seen.append(len(features))
        return features

    monkeypatch.setattr(Dinov2Extractor, "images_to_features", counting)
    reference = plain[1].metrics["frechet_distance_dinov2"].details["n_reference"]

    def extracted(name: str, **more: Any) -> int:
        seen.clear()
        out = tmp_path / f"{name}.json"
        record = run(corpus, folder, dinov2, out, **more)
        if not more.get("stream"):
            assert numbers(out, record) == numbers(*plain)
        return sum(seen)

    cache = corpus.manifest.parent / ".cache" / "reference"
    for path in cache.glob("*"):
        path.unlink()
    assert extracted("none", cache=False) == IMAGES + reference
    assert not cache.exists() or not list(cache.iterdir())
    assert extracted("first") == IMAGES + reference
    assert [path.suffix for path in cache.iterdir()] == [".npy"]
    assert extracted("second") == IMAGES
    assert extracted("streamed", stream=True) == IMAGES
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".npz"}
    assert extracted("off", cache=False) == IMAGES + reference


def test_many_images_are_streamed_unless_told_otherwise() -> None:
    from modelops.evaluation.workbench import Workbench

    def streams(n: int, stream: bool | None) -> bool:
        settings = EvaluationSettings(prompts_file=Path("p"), stream=stream)
        bench = Workbench.__new__(Workbench)
        object.__setattr__(bench, "settings", settings)
        object.__setattr__(bench, "samples", type("Made", (), {"paths": range(n)}))
        return bench.streams

    assert not streams(STREAM_FROM, None) and streams(STREAM_FROM + 1, None)
    assert streams(5, True) and not streams(STREAM_FROM + 1, False)
