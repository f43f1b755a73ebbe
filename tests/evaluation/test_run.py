"""A whole evaluation of a real (untrained) checkpoint, killed, resumed, and with faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from modelops.base.errors import EvaluationError, IntegrityError, MissingWeightsError, UsageError
from modelops.base.files import sha256_file
from modelops.cli.main import cli
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.measures import clip, dinov2, diversity, fid
from modelops.evaluation.per_image import read_per_image
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.folder import FolderSource
from modelops.evaluation.sources.open import open_source
from modelops.models.request import ImageRequest
from modelops.models.sources import ModelSource
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record
from modelops.safety.image import OpenNsfwFilter, SafetyFilterError

pytestmark = pytest.mark.xdist_group("run")  # one evaluation for most
CONTRACT_KEYS = {
    "frechet_distance_lite0", "frechet_distance_lite0_floor", "kernel_distance_lite0", "fid",
    "lit_alignment", "lit_alignment_shuffled", "lit_alignment_gain", "lit_heldout_retrieval_top1",
    "lit_heldout_retrieval_top5", "clipscore", "unsafe_rate", "nearest_train_distance",
    "nearest_train_distance_heldout", "nearest_train_distance_gap", "near_copy_rate",
    "near_copy_rate_heldout", "failed_image_rate",
}  # fmt: skip


class Killed(BaseException):
    pass


def settings_of(corpus: Any, **more: Any) -> EvaluationSettings:
    return EvaluationSettings(
        **{
            "manifest": corpus.manifest, "splits": corpus.splits, "lit": corpus.lit,
            "n": 6, "steps": 2, "resamples": 50, **more,
        }
    )  # fmt: skip


def pixels(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.rglob("samples/*/*.png")}


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path) -> Any:
    return open_source(str(tiny_checkpoint), batch_size=4)


@pytest.fixture(scope="module")
def evaluated(
    source: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EvaluationRecord]:
    out = tmp_path_factory.mktemp("evaluations") / "tiny.json"
    return out, evaluate(source, settings_of(corpus), out_path=out)


def test_every_metric_is_measured_or_says_why_not(evaluated: Any, corpus: Any) -> None:
    out, record = evaluated
    assert read_record(out, EvaluationRecord).digest == record.digest
    assert record.status == "ok"
    assert set(record.metrics) >= CONTRACT_KEYS
    unmeasured = {k for k, m in record.metrics.items() if m.value is None}
    needs_more = {*fid.KEYS, *clip.KEYS, *dinov2.KEYS, *diversity.KEYS}  # weights; replicates
    needs_more |= {"frechet_distance_infinity_lite0"}  # images
    assert unmeasured == needs_more | {"blocklist_match_rate", "residual_unsafe_rate"}
    assert "--inception-weights" in (record.metrics["fid"].not_measured or "")
    for name, measured in record.metrics.items():
        if measured.value is not None:
            assert measured.low is not None and measured.high is not None
            assert measured.low <= measured.value <= measured.high, name
            assert measured.n > 0 and measured.method
    assert record.inputs["manifest"].sha256 == sha256_file(corpus.manifest)
    assert any("singular" in w for w in record.metrics["frechet_distance_lite0"].warnings)


def test_the_numbers_are_those_of_the_files_it_names(evaluated: Any) -> None:
    out, record = evaluated
    for entry in record.files.values():
        assert sha256_file(out.parent / entry.path) == entry.sha256
    rows = read_per_image(out, record)
    assert len(rows) == 6
    own = np.mean([row["alignment"] for row in rows])
    assert own == pytest.approx(record.metrics["lit_alignment"].value)
    assert {"grid", "best", "worst", "features", "per_image"} <= set(record.files)


def test_a_protocol_says_everything_that_a_value_depends_on(evaluated: Any) -> None:
    _, record = evaluated
    protocol = record.protocols[record.metrics["frechet_distance_lite0"].protocol]
    assert protocol["features"]["weights_sha256"].startswith("5793")
    assert protocol["ddof"] == 1
    assert protocol["reference"]["n"] == 8
    assert protocol["sampling"]["steps"] == 2


class _Interrupted(ModelSource):
    """A source that is killed after so many images."""

    def __init__(self, inner: Any, after: int) -> None:
        self.inner, self.left = inner, after
        self.info, self.scheduler_name = inner.info, inner.scheduler_name
        self.batch_size = 2

    @property
    def defaults(self) -> ImageRequest:
        return self.inner.defaults  # type: ignore[no-any-return]

    def generate(self, requests: Sequence[ImageRequest]) -> list[np.ndarray]:
        if self.left <= 0:
            raise Killed
        self.left -= len(requests)
        return list(self.inner.generate(requests))


def test_a_killed_evaluation_goes_on_and_gives_the_same_images(
    source: Any, corpus: Any, evaluated: Any, tmp_path: Path
) -> None:
    whole, record = evaluated
    out = tmp_path / "tiny.json"
    with pytest.raises(Killed):
        evaluate(_Interrupted(source, 4), settings_of(corpus), out_path=out)
    half = pixels(tmp_path)
    assert len(half) == 4
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("samples/*/*.png")}
    again = evaluate(_Interrupted(source, 2), settings_of(corpus), out_path=out)
    assert pixels(tmp_path) == pixels(whole.parent)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert again.metrics["lit_alignment"] == record.metrics["lit_alignment"]
    # And a third time nothing is made at all.
    evaluate(_Interrupted(source, 0), settings_of(corpus), out_path=out)


class _Faulty(_Interrupted):
    """A source that cannot draw one of the prompts."""

    def __init__(self, inner: Any, bad: str) -> None:
        super().__init__(inner, 10_000)
        self.bad = bad

    def generate(self, requests: Sequence[ImageRequest]) -> list[np.ndarray]:
        if any(request.prompt == self.bad for request in requests):
            raise EvaluationError("this one cannot be drawn")
        return list(self.inner.generate(requests))


def test_failed_images_count_and_max_failures_decides(
    source: Any, corpus: Any, evaluated: Any, tmp_path: Path
) -> None:
    bad = read_per_image(*evaluated)[3]["prompt"]
    faulty = _Faulty(source, bad)
    with pytest.raises(EvaluationError, match="1 of 6 images failed"):
        evaluate(faulty, settings_of(corpus), out_path=tmp_path / "a.json")
    record = read_record(tmp_path / "a.json", EvaluationRecord)
    assert record.status == "failed"
    assert record.n_failed_images == 1
    assert record.metrics["failed_image_rate"].value == pytest.approx(1 / 6)
    assert record.metrics["lit_retrieval_top1"].n == 6
    assert record.metrics["unsafe_rate"].n == 5

    out = tmp_path / "a.json"
    allowed = evaluate(faulty, settings_of(corpus, max_failures=1), out_path=out)
    assert allowed.status == "ok"
    assert "1 of 6 images failed" in allowed.metrics["frechet_distance_lite0"].warnings
    assert read_per_image(out, allowed)[3]["failure"] == "this one cannot be drawn"


def test_a_broken_filter_fails_the_record_and_is_never_zero(
    source: Any, corpus: Any, evaluated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, images: Any, **_: Any) -> Any:
        raise SafetyFilterError("the filter is broken")

    monkeypatch.setattr(OpenNsfwFilter, "check", broken)
    out = tmp_path / "tiny.json"
    shutil.copytree(evaluated[0].with_suffix(""), out.with_suffix(""))
    with pytest.raises(EvaluationError, match="the filter is broken"):
        evaluate(source, settings_of(corpus), out_path=out)
    record = read_record(out, EvaluationRecord)
    assert record.status == "failed"
    assert record.metrics["unsafe_rate"].value is None
    assert record.metrics["lit_alignment"].value is not None


def test_a_folder_with_an_unreadable_picture(corpus: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted((corpus.manifest.parent / "images").iterdir())[:6]:
        shutil.copy(path, folder)
    (folder / "zz.png").write_bytes(b"no image")
    settings = settings_of(corpus, n=None, max_failures=1)
    record = evaluate(FolderSource(folder), settings, out_path=tmp_path / "folder.json")
    assert record.n_failed_images == 1
    assert record.metrics["failed_image_rate"].n == 7
    assert record.metrics["frechet_distance_lite0"].n == 6
    assert "no prompts" in (record.metrics["lit_alignment"].not_measured or "")


def test_what_cannot_be_used_still_leaves_a_failed_record(
    source: Any, corpus: Any, tmp_path: Path
) -> None:
    out = tmp_path / "bad.json"
    with pytest.raises(UsageError, match="'nowhere'"):
        evaluate(source, settings_of(corpus, split="nowhere"), out_path=out)
    record = read_record(out, EvaluationRecord)
    assert record.status == "failed" and "nowhere" in (record.error or "")
    assert record.metrics == {}


def test_settings_that_make_no_sense_are_refused(corpus: Any) -> None:
    for bad in ({"n": 1}, {"safety": "maybe"}, {"splits": None}, {"resamples": 3}):
        with pytest.raises(UsageError):
            settings_of(corpus, **bad)


def test_without_prompts_a_model_makes_nothing(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which prompts"):
        evaluate(source, EvaluationSettings(), out_path=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_the_alignment_model_is_an_open_clip_checkpoint(corpus: Any) -> None:
    import open_clip
    import torch

    from modelops.data.manifest import read_manifest
    from modelops.models.encoders import images_to_lite0_features
    from modelops.models.lit import load_lit

    model = load_lit(corpus.lit)
    config = json.loads((corpus.lit / "open_clip_config.json").read_text())["model_cfg"]
    theirs, preprocess = open_clip.create_model_from_pretrained(
        f"local-dir:{corpus.lit}",
        text_cfg={**config["text_cfg"], "hf_model_name": str(corpus.lit)},
    )
    tokens = open_clip.get_tokenizer(f"local-dir:{corpus.lit}")(["red heart", "sun"])
    with torch.no_grad():
        text = theirs.eval().encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(model.texts_to_embeddings(["red heart", "sun"]), text, atol=1e-5)
    manifest = read_manifest(corpus.manifest)
    from PIL import Image

    from modelops.base.images import read_image

    paths = [manifest.image_path(row) for row in manifest.rows[:2]]
    images = [read_image(path) for path in paths]
    ours = model.images_to_embeddings(images)
    with torch.no_grad():
        batch = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        pictures = theirs.encode_image(batch, normalize=True).numpy()
    assert (ours * pictures).sum(axis=1).min() > 0.999  # theirs rounds to bytes after resizing
    np.testing.assert_allclose(
        model.features_to_embeddings(images_to_lite0_features(images)), ours, atol=1e-4
    )


def test_a_missing_or_damaged_alignment_model_is_named(corpus: Any, tmp_path: Path) -> None:
    from modelops.models.lit import load_lit

    with pytest.raises(MissingWeightsError, match="not found"):
        load_lit(tmp_path)
    shutil.copytree(corpus.lit, tmp_path / "lit")
    (tmp_path / "lit" / "open_clip_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(IntegrityError, match="cannot load"):
        load_lit(tmp_path / "lit")


def test_prompts_that_the_model_cuts_are_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    long = [f"{'a red heart beside ' * 12} number {k}" for k in range(3)]
    source = open_source(str(tiny_checkpoint))
    assert source.cut(["sun", *long]) == long
    (tmp_path / "prompts.txt").write_text("\n".join(["sun", *long]))
    settings = EvaluationSettings(
        prompts_file=tmp_path / "prompts.txt", steps=1, resamples=20, safety="none"
    )
    record = evaluate(source, settings, out_path=tmp_path / "eval.json")
    said = "3 of 4 prompts are longer than the model reads, and are cut"
    warned = [name for name, metric in record.metrics.items() if said in metric.warnings]
    assert "failed_image_rate" in warned

    result = CliRunner().invoke(
        cli, ["sample", str(tiny_checkpoint), "--prompt", long[0], "--prompt", "sun",
              "--steps", "1", "--out", str(tmp_path / "out"), "--json"],
    )  # fmt: skip
    assert json.loads(result.stdout)["cut"] == long[:1]
    assert "longer than the model reads" in result.stderr
