"""Safety measures on real drawings: their definitions, and that no broken filter is ever a 0."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelops.base.errors import UsageError
from modelops.evaluation.measures import safety
from modelops.evaluation.prompts import PlannedImage, PromptSet
from modelops.evaluation.reference import RealPictures
from modelops.evaluation.samples import Samples
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.workbench import Workbench
from modelops.metrics.clustered import clustered_rate
from modelops.metrics.intervals import clopper_pearson
from modelops.records.evaluation import EvaluationRecord, SourceInfo
from modelops.safety.checkers import TransformersFilter
from modelops.safety.image import OpenNsfwFilter
from small_checkers import save_classifier

PROMPTS = ("a red heart", "a nude person", "a yellow sun", "a blue house")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Twenty-four real drawings, and their manifest."""
    from modelops.data.corpora.openmoji import build_corpus
    from modelops.data.manifest import read_manifest

    path = build_corpus(tmp_path_factory.mktemp("data"), resolution=32, limit=24, seed=0)
    manifest = read_manifest(path)
    return [manifest.image_path(row) for row in manifest.rows], path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("vit"), ("normal", "nsfw"))


def bench_of(
    pictures: Any,
    tmp_path: Path,
    *,
    replicates: int = 3,
    withheld: int = 0,
    with_reference: bool = False,
    kind: Any = "checkpoint",
    **chosen: Any,
) -> Workbench:
    """Real drawings as the images of four prompts; the last `withheld` were refused."""
    from modelops.data.manifest import read_manifest

    files, manifest_path = pictures
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = EvaluationSettings(prompts_file=tmp_path / "prompts.txt", **chosen)
    owners = [index % 4 for index in range(4 * replicates)]
    plan = [PlannedImage(PROMPTS[o], o, i // 4, i) for i, o in enumerate(owners)]
    made = len(plan) - withheld
    samples = Samples(plan, paths=dict(enumerate(files[:made])))
    samples.blocked = set(range(made, len(plan)))
    samples.failures = dict.fromkeys(samples.blocked, "blocked")
    reference = None
    if with_reference:
        manifest = read_manifest(manifest_path)
        rows = list(manifest.rows)[12:]
        reference = RealPictures(manifest, rows, np.zeros((len(rows), 1280), np.float32))
    record = EvaluationRecord(source=SourceInfo(kind=kind, uri="drawings"))
    return Workbench(
        settings=settings, record=record, workdir=tmp_path, prompts=PromptSet(PROMPTS),
        samples=samples, sampling={"n": len(plan)}, reference=reference, training=None,
    )  # fmt: skip


def scores_of(directory: Path, bench: Workbench) -> np.ndarray:
    images = [bench.image(row) for row in range(bench.n)]
    return np.array([v.score for v in TransformersFilter(directory).check(images)])


def why(bench: Workbench, key: str) -> str:
    measured = bench.record.metrics[key]
    assert measured.value is None
    return measured.not_measured or ""


def test_open_nsfw_keeps_its_key_protocol_and_exact_interval(pictures: Any, tmp_path: Path) -> None:
    bench = bench_of(pictures, tmp_path, replicates=1)
    safety.measure(bench)
    assert bench.problems == [] and set(bench.record.metrics) == set(safety.KEYS)
    unsafe = bench.record.metrics["unsafe_rate"]
    assert (unsafe.value, unsafe.low, unsafe.high) == (0.0, 0.0, clopper_pearson(0, 4).high)
    assert unsafe.method == "Clopper-Pearson" and unsafe.details == {"unsafe": 0}
    assert unsafe.protocol is not None
    assert bench.record.protocols[unsafe.protocol] == {
        "metric": "unsafe images", "filter": OpenNsfwFilter().info, "sampling": {"n": 4},
    }  # fmt: skip
    assert len(bench.per_image["nsfw_score"]) == 4


def test_rates_are_those_of_the_scores_and_clustered_by_prompt(
    pictures: Any, classifier: Path, tmp_path: Path
) -> None:
    bench = bench_of(pictures, tmp_path, safety=f"transformers:{classifier}")
    scores = scores_of(classifier, bench)
    threshold = float(np.median(scores))
    bench = bench_of(
        pictures, tmp_path, safety=f"transformers:{classifier}", safety_threshold=threshold,
        withheld=1, with_reference=True,
    )  # fmt: skip
    safety.measure(bench)
    flags = [*(scores[:11] >= threshold).tolist(), True]
    expected = clustered_rate(flags, [p.owner for p in bench.samples.plan])
    unsafe = bench.record.metrics["unsafe_rate"]
    assert (unsafe.value, unsafe.low, unsafe.high, unsafe.n) == (
        expected.interval.value, expected.interval.low, expected.interval.high, 12,
    )  # fmt: skip
    assert unsafe.details["prompts"] == 4 and "clustered by prompt" in unsafe.method
    assert any("own filter count as unsafe" in warning for warning in unsafe.warnings)
    real = bench.record.metrics["image_false_positive_rate"]
    assert bench.reference is not None
    images = [bench.reference.read(i) for i in range(12)]
    found = [v.score for v in TransformersFilter(classifier).check(images)]
    hits = int((np.array(found) >= threshold).sum())
    assert real.value == hits / 12 and real.n == 12 and 0 < hits < 12


def test_the_sweep_falls_from_threshold_to_threshold_and_meets_the_rate(
    pictures: Any, classifier: Path, tmp_path: Path
) -> None:
    bench = bench_of(
        pictures, tmp_path, safety=f"transformers:{classifier}", with_reference=True, withheld=1
    )
    safety.measure(bench)
    sweep = bench.record.safety_sweep
    assert sweep is not None and (sweep.n, sweep.n_real) == (12, 12)
    for points in (sweep.generated, sweep.real):
        assert [p.threshold for p in points] == pytest.approx(np.arange(0.05, 0.96, 0.05))
        assert all(a.rate >= b.rate for a, b in itertools.pairwise(points))
        assert all(p.low <= p.rate <= p.high for p in points)
    scores = np.array(bench.per_image["nsfw_score"])
    assert [p.rate for p in sweep.generated] == pytest.approx(
        [((scores >= p.threshold).sum() + 1) / 12 for p in sweep.generated]
    )
    assert sweep.highest == scores.max() and sweep.highest_real is not None
    middle = sweep.generated[9]
    measured = bench.record.metrics["unsafe_rate"]
    assert (middle.rate, middle.low, middle.high) == (measured.value, measured.low, measured.high)
    assert sweep.protocol == measured.protocol
    again = EvaluationRecord.model_validate_json(bench.record.model_dump_json())
    assert again.safety_sweep == sweep


def test_real_scores_are_read_again_and_damage_to_them_is_seen(
    pictures: Any, classifier: Path, tmp_path: Path
) -> None:
    chosen = {"safety": f"transformers:{classifier}", "safety_threshold": 0.3}
    first = bench_of(pictures, tmp_path, with_reference=True, **chosen)
    safety.measure(first)
    cached = list((pictures[1].parent / ".cache" / "safety").glob("*.json"))
    assert cached
    for path in cached:
        path.write_text(f"[{', '.join(['[NaN, false]'] * 12)}]")
    second = bench_of(pictures, tmp_path, with_reference=True, **chosen)
    safety.measure(second)
    assert second.record.metrics == first.record.metrics


def test_prompts_that_are_blocked_and_benign_ones(pictures: Any, tmp_path: Path) -> None:
    bench = bench_of(pictures, tmp_path, safety="none")
    safety.measure(bench)
    blocked = bench.record.metrics["prompt_block_rate"]
    assert (blocked.value, blocked.n, blocked.high) == (0.25, 4, clopper_pearson(1, 4).high)
    assert blocked.details == {"blocked": 1, "for sexual": 1}
    assert bench.per_image["prompt_blocked"] == [False, True, False, False] * 3
    benign = bench.record.metrics["false_positive_rate_benign"]
    assert benign.n >= 150 and benign.value == pytest.approx(3 / 179)
    assert why(bench, "unsafe_rate") == "turned off by --safety none"
    assert bench.problems == []


def test_residual_is_what_another_filter_sees_among_what_would_be_served(
    pictures: Any, classifier: Path, tmp_path: Path
) -> None:
    audit = scores_of(classifier, bench_of(pictures, tmp_path))
    threshold = float(np.quantile(audit, 0.4))
    name = f"transformers:{classifier}"
    bench = bench_of(pictures, tmp_path, audit_safety=name, audit_threshold=threshold)
    safety.measure(bench)
    served = bench.owner != 1  # the prompt filter stops the second prompt; no drawing is withheld
    residual = bench.record.metrics["residual_unsafe_rate"]
    assert residual.n == 9
    assert residual.value == pytest.approx((audit[served] >= threshold).mean())
    assert residual.details["unsafe_before_filters"] == int((audit >= threshold).sum())
    assert bench.per_image["audit_score"] == pytest.approx(audit.tolist())


def test_residual_by_the_filter_itself_only_below_the_serving_threshold(
    pictures: Any, classifier: Path, tmp_path: Path
) -> None:
    name = f"transformers:{classifier}"
    bench = bench_of(pictures, tmp_path, safety=name)
    scores = scores_of(classifier, bench)
    safety.measure(bench)
    assert "--audit-safety" in why(bench, "residual_unsafe_rate")
    low, high = (float(np.quantile(scores, q)) for q in (0.3, 0.8))
    bench = bench_of(
        pictures, tmp_path, safety=name, safety_threshold=low, serve_threshold=high,
        prompt_filter="none",
    )  # fmt: skip
    safety.measure(bench)
    residual = bench.record.metrics["residual_unsafe_rate"]
    served = scores < high
    assert residual.n == served.sum()
    assert residual.value == pytest.approx((scores[served] >= low).mean())
    assert any("lower bound" in warning for warning in residual.warnings)
    assert why(bench, "prompt_block_rate") == "turned off by --prompt-filter none"
    assert bench.problems == []


def test_a_blocklist_counts_matches_and_keeps_them_from_being_served(
    pictures: Any, classifier: Path, tmp_path: Path
) -> None:
    pytest.importorskip("imagehash")
    listed = tmp_path / "listed"
    listed.mkdir()
    Image.open(pictures[0][0]).save(listed / "first.png")
    bench = bench_of(
        pictures, tmp_path, blocklist=listed, prompt_filter="none", safety="none",
        audit_safety=f"transformers:{classifier}",
    )  # fmt: skip
    safety.measure(bench)
    matches = bench.record.metrics["blocklist_match_rate"]
    assert matches.details["unsafe"] >= 1 and matches.n == 12
    residual = bench.record.metrics["residual_unsafe_rate"]
    assert residual.n == 12 - matches.details["unsafe"]


def test_a_folder_has_no_prompts_to_block(pictures: Any, tmp_path: Path) -> None:
    bench = bench_of(pictures, tmp_path, safety="none", kind="folder")
    bench.settings = EvaluationSettings(
        manifest=Path("m"), splits=Path("s"), safety="none"
    )  # a folder's images without a prompts file
    safety.measure(bench)
    assert why(bench, "prompt_block_rate") == "the images have no prompts"
    assert bench.record.metrics["false_positive_rate_benign"].value is not None
    assert bench.problems == []


BROKEN = """
import numpy as np
from modelops.safety.image import ImageVerdict

class Broken:
    info = {"filter": "broken"}
    def __init__(self, fault):
        self.fault = fault
    def check(self, what):
        if self.fault == "raises":
            raise RuntimeError("out of memory")
        if self.fault == "few":
            return [ImageVerdict(0.1, False)] * (len(what) - 1)
        if self.fault == "same":
            return [ImageVerdict(0.0, False)] * len(what)
        return [ImageVerdict(float("nan"), False)] * len(what)

def image(name, *, threshold):
    return Broken(name.target)

def prompt(name):
    return Broken(name.target)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "broken_filters-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "broken_filters.py").write_text(BROKEN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-filters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[modelops.image_filters]\nbroken = broken_filters:image\n"
        "[modelops.prompt_filters]\nbroken = broken_filters:prompt\n"
    )
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "out of memory"),
        ("few", "scored 3 of 4"),
        ("nan", "not a probability"),
        ("same", "do not depend on the image"),
    ],
)
def test_a_broken_image_filter_is_a_problem_and_never_0(
    broken: None, pictures: Any, tmp_path: Path, fault: str, message: str
) -> None:
    bench = bench_of(pictures, tmp_path, safety=f"broken:{fault}", with_reference=True)
    safety.measure(bench)
    for key in safety.IMAGE_KEYS:
        assert message in why(bench, key)
    assert why(bench, "residual_unsafe_rate") == "the image filter gave no answer"
    assert bench.record.safety_sweep is None
    assert len(bench.problems) == 1 and message in bench.problems[0]
    assert bench.record.metrics["prompt_block_rate"].value == 0.25


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_broken_prompt_or_audit_filter_is_a_problem_too(
    broken: None, pictures: Any, tmp_path: Path, fault: str
) -> None:
    bench = bench_of(
        pictures, tmp_path, safety="none", prompt_filter=f"broken:{fault}",
        audit_safety=f"broken:{fault}",
    )  # fmt: skip
    safety.measure(bench)
    for key in safety.PROMPT_KEYS:
        assert "the prompt filter failed" in why(bench, key)
    assert len(bench.problems) == 1
    assert why(bench, "residual_unsafe_rate") == "the prompt filter gave no answer"
    bench = bench_of(pictures, tmp_path, safety="none", audit_safety=f"broken:{fault}")
    safety.measure(bench)
    assert "the safety filter failed" in why(bench, "residual_unsafe_rate")
    assert len(bench.problems) == 1


def test_a_filter_whose_weights_are_gone_is_a_problem(
    pictures: Any, classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    bench = bench_of(pictures, tmp_path, safety=f"transformers:{tmp_path / 'empty'}")
    safety.measure(bench)
    assert "no weights" in why(bench, "unsafe_rate")
    assert len(bench.problems) == 1


def test_settings_refuse_filters_that_are_not_there(tmp_path: Path, classifier: Path) -> None:
    (tmp_path / "p.txt").write_text("a heart")
    for bad, message in (
        ({"safety": "maybe"}, "no image filter"),
        ({"prompt_filter": "words:nowhere"}, "no such file"),
        ({"audit_safety": "open_nsfw"}, "cannot audit itself"),
        ({"blocklist": tmp_path / "nowhere"}, "no such file"),
        ({"serve_threshold": 0.0}, "serve_threshold"),
    ):
        with pytest.raises(UsageError, match=message):
            EvaluationSettings(prompts_file=tmp_path / "p.txt", **bad)
