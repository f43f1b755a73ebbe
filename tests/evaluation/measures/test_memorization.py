"""The verdict on copying and its page, on real images with known copies among the samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.base.images import encode_png
from modelops.evaluation.measures import memorization
from modelops.evaluation.prompts import PlannedImage, PromptSet
from modelops.evaluation.reference import open_reference
from modelops.evaluation.samples import Samples
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.workbench import Workbench
from modelops.records.base import InputRef
from modelops.records.evaluation import EvaluationRecord, SourceInfo
from modelops.records.export import ArtifactRecord
from modelops.records.read import read_record
from modelops.records.train import CheckpointRef, TrainRecord

Make = Callable[..., Workbench]
HOSTILE = '<script>alert(1)</script> "quoted" \u202e\u0000 <img src=x onerror=alert(2)>'


@pytest.fixture
def make_bench(corpus: Any, tmp_path: Path) -> Make:
    """A workbench whose samples are the given images, one per prompt."""

    def make(
        images: list[np.ndarray], *, prompt: str = "an image", uri: str = "x", **more: Any
    ) -> Workbench:
        settings = EvaluationSettings(
            **{"manifest": corpus.manifest, "splits": corpus.splits, "resamples": 50,
               "known_copies": 6, "closest_pairs": 3, **more}
        )  # fmt: skip
        found = open_reference(
            corpus.manifest, corpus.splits, (settings.split, settings.train_split)
        )
        plan = [PlannedImage(owner=k, prompt=f"{prompt} {k}", replicate=0, seed=k)
                for k in range(len(images))]  # fmt: skip
        samples = Samples(plan)
        for place, image in enumerate(images):
            samples.paths[place] = tmp_path / f"{place}.png"
            samples.paths[place].write_bytes(encode_png(image))
        source = SourceInfo(kind="checkpoint", uri=uri, sha256="ab" * 32)
        return Workbench(
            settings=settings, record=EvaluationRecord(source=source), workdir=tmp_path / "eval",
            prompts=PromptSet(tuple(planned.prompt for planned in plan)), samples=samples,
            sampling={}, reference=found[settings.split], training=found[settings.train_split],
        )  # fmt: skip

    return make


def pictures(corpus: Any, split: str) -> list[np.ndarray]:
    found = open_reference(corpus.manifest, corpus.splits, (split,))
    return [found[split].read(k) for k in range(len(found[split].samples))]


def test_copies_among_samples_are_called_copies(make_bench: Make, corpus: Any) -> None:
    bench = make_bench(pictures(corpus, "train"))
    memorization.measure(bench)
    verdict = bench.record.memorization
    assert verdict is not None and verdict.answer == "copies", verdict
    near = verdict.tests[0]
    assert (near.name, near.hits, near.n, near.n_heldout) == ("near_copies", 24, 24, 8)
    assert near.found and near.p_value < 0.01
    assert verdict.known_copies == 6
    metrics = bench.record.metrics
    assert set(metrics) == set(memorization.KEYS)
    assert metrics["authenticity_lite0"].value == 0.0
    heldout = metrics["authenticity_lite0_heldout"]
    assert heldout.n == 8 and heldout.value is not None and heldout.value > 0.3
    ids = [sample.id for sample in bench.training.samples]  # type: ignore[union-attr]
    assert bench.per_image["nearest_train_id"] == ids
    # The record survives being written and read.
    bench.record.write(bench.workdir / "record.json")
    assert read_record(bench.workdir / "record.json", EvaluationRecord).memorization == verdict


def test_a_few_new_pictures_prove_nothing(make_bench: Make, corpus: Any) -> None:
    bench = make_bench(pictures(corpus, "val"))
    memorization.measure(bench)
    verdict = bench.record.memorization
    assert verdict is not None and verdict.answer == "cannot tell"
    assert verdict.overfitting is not None and "no train record" in verdict.overfitting.reason


def test_held_out_pictures_that_were_trained_on_are_left_out(make_bench: Make, corpus: Any) -> None:
    bench = make_bench(pictures(corpus, "val"), split="train")
    memorization.measure(bench)
    verdict = bench.record.memorization
    assert verdict is not None and verdict.answer == "cannot tell"
    assert verdict.reason == "every held-out image is a training image"
    assert any("24 of 24 held-out" in caveat for caveat in verdict.caveats)


class _Page(HTMLParser):
    """What a browser and assistive technology find in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.targets += [str(values[name]) for name in ("src", "href") if values.get(name)]


def test_the_page_is_whole_and_escapes_what_others_wrote(make_bench: Make, corpus: Any) -> None:
    images = [*pictures(corpus, "val"), np.zeros((300, 500, 3), np.uint8)]
    bench = make_bench(images, prompt=HOSTILE, uri="runs/<b>x")
    memorization.measure(bench)
    path = bench.pages["closest"]
    assert path.parent == bench.workdir
    text = path.read_text("utf-8")
    page = _Page(text)
    assert "script" not in page.tags and "b" not in page.tags and "link" not in page.tags
    assert "\u202e" not in text and "\x00" not in text
    # Three pairs a side, every image inside the page and with words for it.
    assert len(page.images) == 12
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert all(image.get("alt") for image in page.images)
    assert all(target.startswith("data:") for target in page.targets)
    assert sum("Training image: " in str(image["alt"]) for image in page.images) == 6
    assert sum("Held-out image: " in str(image["alt"]) for image in page.images) == 3
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.ids) == len(set(page.ids))
    closest = max(1.0 - d for d in bench.per_image["nearest_train_distance"])
    assert f"<strong>{closest:.3f}</strong>" in text


def test_the_runs_losses_up_to_the_checkpoint_enter_the_note(
    make_bench: Make, corpus: Any, tmp_path: Path
) -> None:
    run, images = tmp_path / "run", pictures(corpus, "val")
    checkpoint = run / "checkpoints" / "step-80"
    checkpoint.mkdir(parents=True)
    losses = [(s, 0.2 + 0.01 * max(0, s - 40) / 10, 0.5 - 0.005 * s) for s in range(0, 100, 10)]
    rows = [{"step": s, "validation_loss": v, "train_probe_loss": t} for s, v, t in losses]
    (run / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{cut")

    def note(step: int, sha256: str = "ab" * 32) -> Any:
        ref = CheckpointRef(step=step, images_seen=step, path="p", sha256=sha256)
        TrainRecord(
            run_name="r", parameters=1, effective_batch=1, steps=90, images_seen=90,
            training_seconds=1.0, checkpoints=[ref], config_sha256="0" * 64,
        ).write(run / "train.json")  # fmt: skip
        bench = make_bench(images, uri=str(checkpoint))
        memorization.measure(bench)
        assert bench.record.memorization is not None
        return bench.record, bench.record.memorization.overfitting

    record, found = note(80)
    assert found.answer == "overfitting" and found.since_step == 40 and found.step == 80
    assert found.train_loss == pytest.approx(0.1) and found.validation_loss == pytest.approx(0.24)
    assert "train" in record.inputs
    _, found = note(20)  # an early checkpoint of the same run
    assert found.step == 20 and found.since_step is None
    assert found.answer == "no sign of overfitting"
    record, found = note(80, sha256="cd" * 32)  # a record of other weights says nothing
    assert found.step is None and "another checkpoint" in found.reason
    assert "train" not in record.inputs


def test_an_artifact_follows_its_checkpoint_to_the_run(
    make_bench: Make, corpus: Any, tmp_path: Path
) -> None:
    """Losses are found through artifact.json's input, or the note says whose are missing."""
    named = "runs/a/checkpoints/step-20"
    artifact = tmp_path / "artifacts" / "int8"
    ArtifactRecord(
        format="int8", precision="int8", runtime="openvino",
        inputs={"checkpoint": InputRef(path=named, sha256="cd" * 32)},
    ).write(artifact / "artifact.json")  # fmt: skip
    bench = make_bench(pictures(corpus, "val"), uri=str(artifact))
    bench.record.source = SourceInfo(kind="artifact", uri=str(artifact), sha256="ab" * 32)

    def note() -> str:
        memorization.measure(bench)
        assert bench.record.memorization and bench.record.memorization.overfitting
        return bench.record.memorization.overfitting.reason

    assert note().endswith(f"no train record of {named}, which was exported")
    run = TrainRecord(
        run_name="a", parameters=1, effective_batch=1, steps=20, images_seen=20,
        final_train_loss=0.1, config_sha256="0" * 64, training_seconds=1.0,
        final_validation_loss=0.2, final_train_probe_loss=0.1,
        checkpoints=[CheckpointRef(step=20, images_seen=20, path=named, sha256="cd" * 32)],
    )  # fmt: skip
    run.write(tmp_path / "runs/a/train.json")
    assert "the loss is 0.1000 on training and 0.2000 on held-out" in note()
    assert note().endswith(f"losses are those of {named}, which was exported")
    assert "train" in bench.record.inputs
    other = run.checkpoints[0].model_copy(update={"sha256": "ef" * 32})
    run.model_copy(update={"checkpoints": [other]}).write(tmp_path / "runs/a/train.json")
    assert note().endswith("the train record beside it names another checkpoint")
