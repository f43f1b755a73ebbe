"""Slices, diversity and CLIP scores of whole evaluations of folders of real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from modelops.base.errors import UsageError
from modelops.base.images import encode_png, read_image
from modelops.cli.eval import evaluate as eval_command
from modelops.data.corpora.openmoji import build_corpus
from modelops.data.manifest import read_manifest
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.measures.slices import (
    check_slice_options,
    prompt_to_words,
    slice_metrics,
    slice_rows,
    slice_summary,
)
from modelops.evaluation.per_image import read_per_image
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.open import open_source
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record

pytestmark = pytest.mark.xdist_group("slices")  # one evaluation of them
KEPT = 40


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """80 drawings, half of them for training, with a column that says on which side a held-out one
    of distinct groups lies."""
    from dataclasses import replace

    from modelops.data.manifest import write_manifest

    root = tmp_path_factory.mktemp("slices")
    manifest = build_corpus(root, resolution=32, limit=80, seed=3)
    samples = read_manifest(manifest).rows
    marked = [
        replace(s, extra={"group": s.id, "side": "left" if i % 4 == 0 else "right"})
        for i, s in enumerate(samples)
    ]
    write_manifest(manifest, marked)
    names = ["test" if i % 2 == 0 else "train" for i in range(len(marked))]
    splits = root / "splits.parquet"
    ids = [sample.id for sample in marked]
    pq.write_table(pa.table({"id": ids, "split": names, "group": ids}), splits)
    return manifest, splits


@pytest.fixture(scope="module")
def folder(drawn: tuple[Path, Path]) -> tuple[Path, Path]:
    """(folder of an image for each held-out caption, the captions): the left side's are copies of
    training images, the right side's the held-out ones with noise."""
    manifest = read_manifest(drawn[0])
    folder = drawn[0].parent / "made"
    folder.mkdir()
    random = np.random.default_rng(0)
    training = [manifest.image_path(s) for s in manifest.rows[1::2]]
    captions = []
    for index, sample in enumerate(manifest.rows[::2][:KEPT]):
        if sample.extra["side"] == "left":
            image = read_image(training[index])
        else:
            noise = random.integers(-60, 60, (32, 32, 3))
            image = np.clip(read_image(manifest.image_path(sample)) + noise, 0, 255)
        (folder / f"{index:03d}.png").write_bytes(encode_png(image.astype(np.uint8)))
        captions.append(sample.caption)
    prompts = drawn[0].parent / "prompts.txt"
    prompts.write_text("\n".join(captions))
    return folder, prompts


@pytest.fixture(scope="module")
def sliced(drawn: Any, folder: Any) -> tuple[Path, EvaluationRecord]:
    settings = EvaluationSettings(
        manifest=drawn[0], splits=drawn[1], prompts_file=folder[1], resamples=50,
        slice_by=("side", "tags", "words"), known_copies=0, jackknife_groups=4, neighbours=2,
    )  # fmt: skip
    out = drawn[0].parent / "sliced.json"
    return out, evaluate(open_source(str(folder[0])), settings, out_path=out)


def test_a_real_difference_is_found_and_others_are_not_claimed(sliced: Any) -> None:
    out, record = sliced
    assert read_record(out, EvaluationRecord).slices == record.slices
    found = {(s.by, s.value, s.metric): s for s in record.slices}
    copies = found["side", "left", "nearest_train_distance"]
    assert copies.verdict == "differs"
    assert copies.difference.value is not None and copies.difference.value < -0.05
    assert copies.inside.value == pytest.approx(0.0, abs=1e-4)
    rows = read_per_image(out, record)
    others = [r["nearest_train_distance"] for i, r in enumerate(rows) if i % 2]
    assert copies.rest.value == pytest.approx(np.mean(others))
    mirrored = found["side", "right", "nearest_train_distance"]
    assert mirrored.p_value == copies.p_value
    assert mirrored.difference.value == pytest.approx(-copies.difference.value)
    for side in ("left", "right"):
        assert found["side", side, "failed_image_rate"].verdict == "within noise"
        assert found["side", side, "failed_image_rate"].inside.high > 0.05  # 0 of 20 allows that


def test_small_slices_are_counted_and_not_judged(sliced: Any) -> None:
    _, record = sliced
    few = [s for s in record.slices if s.n_groups < 10]
    assert few and all(s.verdict == "too few" and s.p_corrected is None for s in few)
    assert all("fewer than 10" in (s.difference.not_measured or "") for s in few)
    assert all(s.inside.value is not None for s in few)


def test_the_correction_is_over_all_distinct_comparisons(sliced: Any) -> None:
    _, record = sliced
    judged = [s for s in record.slices if s.p_value is not None]
    assert len({s.n_comparisons for s in judged}) == 1
    assert all(s.p_value <= s.p_corrected for s in judged)
    assert judged[0].n_comparisons < len(judged)  # left and right are one, and rates of 0 none
    text = slice_summary(record.slices)
    assert f"Holm over {judged[0].n_comparisons} tests" in text
    rows = slice_rows(record.slices)
    assert len(rows[0]) == 2 + len(slice_metrics(record.slices))
    assert any("differs by -" in cell for row in rows for cell in row)


def test_words_are_read_like_tags() -> None:
    assert prompt_to_words("woman astronaut: medium-dark skin tone") == (
        "gender:woman", "skin-tone:medium-dark",
    )  # fmt: skip
    assert prompt_to_words("A dark-skinned boy") == ("gender:man", "skin-tone:dark")
    assert prompt_to_words("manual, dark chocolate, medium") == ()


def test_columns_that_cannot_be_sliced_by_are_refused_before_sampling(drawn: Any) -> None:
    check_slice_options(drawn[0], ("tags", "words", "side", "license"))
    check_slice_options(None, ("words",))
    for name, message in (("colour", "no column 'colour'"), ("id", "too many to slice by")):
        with pytest.raises(UsageError, match=message):
            check_slice_options(drawn[0], (name,))
    with pytest.raises(UsageError, match="need a manifest"):
        check_slice_options(None, ("tags",))


def test_the_command_refuses_an_unknown_column(drawn: Any, folder: Any, tmp_path: Path) -> None:
    arguments = [str(folder[0]), "--manifest", drawn[0], "--splits", drawn[1], "--prompts",
                 folder[1], "--slice-by", "colour", "--out", tmp_path / "x.json"]  # fmt: skip
    result = CliRunner().invoke(eval_command, [str(a) for a in arguments])
    assert isinstance(result.exception, UsageError) and "colour" in result.exception.message
    assert not (tmp_path / "x.json").exists()


def test_diversity_and_clip_scores_of_replicates(drawn: Any, folder: Any, tmp_path: Path) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    weights = tmp_path / "clip"
    weights.mkdir()
    tower = {"layers": 1, "width": 32}
    config = {
        "embed_dim": 16,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (weights / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    state = open_clip.CLIP(**config).state_dict()  # type: ignore[arg-type]
    save_file(
        {k: v.contiguous() for k, v in state.items()}, weights / "open_clip_model.safetensors"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n" * 14)  # a line for each image

    def run(name: str, **more: Any) -> EvaluationRecord:
        settings = EvaluationSettings(
            prompts_file=prompts, safety="none", clip_weights=weights, resamples=50, **more
        )
        return evaluate(open_source(str(folder[0])), settings, out_path=tmp_path / name)

    record = run("seven.json", n=7)
    assert record.metrics["diversity_lite0"].n == 3
    between = record.metrics["diversity_lite0_between"].value
    assert between is not None and 0 < between < 2
    rows = read_per_image(tmp_path / "seven.json", record)
    by_prompt = [
        np.mean([r["clipscore"] for r in rows if r["prompt"] == p]) for p in ("one", "two", "three")
    ]
    assert record.metrics["clipscore"].value == pytest.approx(np.mean(by_prompt))
    # torchmetrics averages over images, and "one" has three of the seven.
    mean = np.mean([r["clip_score_torchmetrics"] for r in rows])
    assert record.metrics["clip_score_torchmetrics"].value == pytest.approx(max(0.0, mean))
    assert record.metrics["clip_retrieval_top5"].value == 1.0
    assert "no real images" in (record.metrics["cmmd"].not_measured or "")
    real = run("real.json", n=7, manifest=Path(drawn[0]), splits=Path(drawn[1]))
    assert "ViT-L/14-336" in (real.metrics["cmmd"].not_measured or "")
    for key in ("gaussian_mmd_clip", "frechet_distance_clip"):
        assert (real.metrics[key].value or 0) > 0
    single = run("three.json", n=3)
    assert "--replicates 2" in (single.metrics["diversity_lite0"].not_measured or "")
    assert single.slices == []
