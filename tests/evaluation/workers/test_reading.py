"""Images read by one process or by several: the same features, verdicts and numbers; to the bit
where each has as many threads."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.base.errors import ModelopsError, ProcessDiedError, UsageError
from modelops.base.images import encode_png, read_image
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.open import open_source
from modelops.evaluation.workers.open import open_with_workers
from modelops.evaluation.workers.pool import WorkerPool
from modelops.evaluation.workers.reading import BLOCK, divide_rows
from modelops.evaluation.workers.tasks import Share
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record
from record_numbers import numbers
from small_checkers import save_classifier

pytestmark = pytest.mark.xdist_group("reading")  # what one process reads is read once
IMAGES = 2 * BLOCK + 9  # two processes take two blocks and one, three one each


@dataclass(frozen=True)
class Material:
    """Images to measure, more than a block of reference images, small DINOv2 weights and filter."""

    folder: Path
    settings: EvaluationSettings


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    from modelops.data.corpora.openmoji import build_corpus
    from modelops.data.manifest import read_manifest

    root = tmp_path_factory.mktemp("reading")
    manifest = build_corpus(root / "data", resolution=32, limit=BLOCK + 26, seed=0)
    rows = read_manifest(manifest)
    ids = [sample.id for sample in rows.rows]
    names = ["train" if i % 6 == 0 else "test" for i in range(len(ids))]
    assert names.count("test") > BLOCK
    splits = root / "splits.parquet"
    pq.write_table(pa.table({"id": ids, "split": names, "group": ids}), splits)
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for index in range(IMAGES):
        picture = read_image(rows.image_path(rows.rows[index % len(ids)]))
        noisy = np.clip(np.rint(picture + generator.normal(0, 25, picture.shape)), 0, 255)
        (root / "images" / f"{index:04}.png").write_bytes(encode_png(noisy.astype(np.uint8)))
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, initializer_range=0.5,
        )
    ).save_pretrained(root / "dinov2")  # fmt: skip
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(root / "dinov2")
    classifier = save_classifier(root / "classifier", ("normal", "nsfw"))
    settings = EvaluationSettings(
        manifest=manifest, splits=splits, dinov2_weights=root / "dinov2", resamples=20,
        jackknife_groups=3, grid=4, known_copies=0, blocklist=root / "images", cache=False,
        safety=f"transformers:{classifier}",
    )  # fmt: skip
    return Material(root / "images", settings)


def shared(folder: Path, processes: int) -> dict[str, Any]:
    """The first arguments of `evaluate` with several processes."""
    opening = {"uri": str(folder), "batch_size": 16, "device": "cpu", "runtime": "auto"}
    source, workers = open_with_workers(opening, processes)
    return {"source": source, "workers": workers}


@pytest.fixture(scope="module")
def alone(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of one process."""
    out = tmp_path_factory.mktemp("alone") / "record.json"
    record = evaluate(open_source(str(material.folder)), material.settings, out_path=out)
    measured = ("frechet_distance_lite0", "frechet_distance_dinov2", "unsafe_rate",
                "blocklist_match_rate")  # fmt: skip
    assert all(record.metrics[name].value is not None for name in measured)
    return out


@pytest.mark.parametrize(("processes", "blocked"), [(3, False), (2, True)])
def test_what_is_read_does_not_depend_on_the_processes(
    material: Material, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    processes: int, blocked: bool,
) -> None:  # fmt: skip
    """Where the features of reference images cannot be kept beside them, they go to the
    evaluation's own folder, and are not read a second time."""
    handed: list[list[Share]] = []
    read = WorkerPool.read

    def spy(self: WorkerPool, shares: Any, own: Any) -> None:
        handed.append(list(shares))
        read(self, shares, own)

    monkeypatch.setattr(WorkerPool, "read", spy)
    both, out = shared(material.folder, processes), tmp_path / "record.json"
    with no_cache_beside(material) if blocked else contextlib.nullcontext():
        evaluate(settings=replace(material.settings, cache=blocked), out_path=out, **both)
    assert numbers(out) == numbers(alone)
    assert not both["workers"]._running, "its workers have ended"
    assert not list((tmp_path / "record" / "cache").glob("*.*-*.*")), "no part is left"
    # Lite0, DINOv2 of the images; the image filter and the block-list; DINOv2 of the reference.
    kinds = [share[0].reader.get("extractor", share[0].reader.get("filter")) for share in handed]
    assert sorted(kind.split(":")[0] for kind in kinds) == [
        "blocklist", "dinov2", "dinov2", "lite0", "transformers",
    ]  # fmt: skip
    for shares in handed:
        blocks = -(-sum(len(share.paths) for share in shares) // BLOCK)
        assert len(shares) == min(processes, blocks)


@contextlib.contextmanager
def no_cache_beside(material: Material) -> Iterator[None]:
    """A file is where the folder of the reference images' features would be."""
    assert material.settings.manifest is not None
    blocked = material.settings.manifest.parent / ".cache" / "reference"
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("not a folder", "utf-8")
    yield
    blocked.unlink()


@pytest.mark.slow
def test_streamed_features_are_those_of_one_process(material: Material, tmp_path: Path) -> None:
    settings = replace(material.settings, stream=True, safety="none", blocklist=None)
    records = [tmp_path / "one.json", tmp_path / "two.json"]
    evaluate(open_source(str(material.folder)), settings, out_path=records[0])
    evaluate(settings=settings, out_path=records[1], **shared(material.folder, 2))
    assert numbers(records[0]) == numbers(records[1])


def test_a_reader_that_is_killed_gives_one_line_and_the_next_run_goes_on(
    material: Material, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, out = shared(material.folder, 2), tmp_path / "record.json"
    workers = both["workers"]
    read = WorkerPool.read

    def kill_while_reading(self: WorkerPool, shares: Any, own: Any) -> None:
        def own_then_kill(share: Share) -> Any:
            os.kill(workers._running[1]._child.pid, signal.SIGKILL)
            return own(share)

        read(self, shares, own_then_kill)

    with monkeypatch.context() as patched:
        patched.setattr(WorkerPool, "read", kill_while_reading)
        with pytest.raises(ProcessDiedError, match="process 2 of 2 was killed by SIGKILL while it"):
            evaluate(settings=material.settings, out_path=out, **both)
    assert read_record(out, EvaluationRecord).status == "failed"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "record").rglob("*.*-*.npy")}
    assert kept, "what the other process read is kept"
    both = shared(material.folder, 2)
    seen: dict[Path, int] = {}

    def look(self: WorkerPool, shares: Any, own: Any) -> None:
        read(self, shares, own)
        seen.update({s.out: s.out.stat().st_mtime_ns for s in shares if s.out in kept})

    monkeypatch.setattr(WorkerPool, "read", look)
    evaluate(settings=material.settings, out_path=out, **both)
    assert numbers(out) == numbers(alone)
    assert seen == kept


def test_an_image_that_nobody_can_read_is_named(material: Material, tmp_path: Path) -> None:
    from modelops.evaluation.workers.reading import failure_of

    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    reader = {"extractor": "lite0", "weights": ".", "device": "cpu"}
    workers = WorkerPool(2, {})
    good = sorted(material.folder.iterdir())[:2]
    shares = [Share(reader, tuple(good), tmp_path / "a.npy"),
              Share(reader, (bad,), tmp_path / "b.npy")]  # fmt: skip
    try:
        with pytest.raises(ModelopsError, match=r"bad\.png"):
            workers.read(shares, failure_of)
        with pytest.raises(ModelopsError, match=r"bad\.png"):  # by this process
            workers.read(shares[::-1], failure_of)
    finally:
        workers.close()
    assert not (tmp_path / "b.npy").exists()


def test_a_filter_whose_process_dies_ends_the_evaluation(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(material.settings, dinov2_weights=None, blocklist=None)
    both = shared(material.folder, 2)
    workers = both["workers"]
    read = WorkerPool.read

    def kill_the_filter(self: WorkerPool, shares: Any, own: Any) -> None:
        def own_then_kill(share: Share) -> Any:
            if "filter" in share.reader:
                os.kill(workers._running[1]._child.pid, signal.SIGKILL)
            return own(share)

        read(self, shares, own_then_kill)

    monkeypatch.setattr(WorkerPool, "read", kill_the_filter)
    with pytest.raises(ProcessDiedError, match="was killed by SIGKILL while it read images"):
        evaluate(settings=settings, out_path=tmp_path / "record.json", **both)


@pytest.mark.slow
def test_threads_change_what_is_read_by_rounding_at_most(
    material: Material, alone: Path, tmp_path: Path
) -> None:
    """Each of many processes has fewer threads, and networks sum in another order then."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        evaluate(
            open_source(str(material.folder)), material.settings, out_path=tmp_path / "record.json"
        )
    finally:
        torch.set_num_threads(before)
    found, expected = numbers(tmp_path / "record.json"), numbers(alone)
    for row, then in zip(found["rows"], expected["rows"], strict=True):
        assert all(alike(row[key], then[key], 1e-4) for key in then), (row, then)
    for name, then in expected["metrics"].items():
        measured = found["metrics"][name]
        for key in ("value", "low", "high"):
            assert alike(measured[key], then[key], 1e-3), (name, measured, then)


def alike(found: Any, expected: Any, tolerance: float) -> bool:
    if type(found) is type(expected) is float:
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=1e-6)
    return bool(found == expected)


def test_other_weights_on_another_machine_are_not_mixed_in(
    material: Material, tmp_path: Path
) -> None:
    from modelops.evaluation.workers.reading import failure_of

    reader = {"extractor": "lite0", "weights": ".", "device": "cpu", "protocol": "0" * 12}
    share = Share(reader, tuple(sorted(material.folder.iterdir())[:2]), tmp_path / "a.npy")
    failure = failure_of(share)
    assert failure and "other weights" in failure.message and failure.kind == "IntegrityError"
    assert not share.out.exists()


@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_rows_are_divided_in_whole_blocks(count: int, processes: int) -> None:
    runs = divide_rows(count, processes)
    assert [row for run in runs for row in run] == list(range(count))
    assert all(run.start % BLOCK == 0 and len(run) for run in runs) and len(runs) <= processes
    sizes = [-(-len(run) // BLOCK) for run in runs]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_a_device_that_is_not_there_is_named(material: Material, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    alone = {"source": open_source(str(material.folder))}
    for name, message, given in (
        ("cuda", "0 CUDA devices are visible", shared(material.folder, 2)),
        ("gpu", "no such name", alone),
    ):
        settings = replace(material.settings, extractor_device=name)
        with pytest.raises(UsageError, match=message) as caught:
            evaluate(settings=settings, out_path=tmp_path / "out.json", **given)
        assert caught.value.hint


@pytest.mark.slow
def test_the_ranks_of_a_launcher_read_their_shares(material: Material, tmp_path: Path) -> None:
    settings = material.settings
    command = [
        "modelops.cli.main", "eval", str(material.folder), "--manifest", str(settings.manifest),
        "--splits", str(settings.splits), "--dinov2-weights", str(settings.dinov2_weights),
        "--blocklist", str(settings.blocklist), "--safety", settings.safety, "--resamples", "20",
        "--no-cache", "--no-report",
    ]  # fmt: skip
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "3", "--module"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for before, out in (([], "one.json"), (launcher, "three.json")):
        done = subprocess.run(
            [sys.executable, "-m", *before, *command, "--out", str(tmp_path / out)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(tmp_path / "three.json") == numbers(tmp_path / "one.json")
    assert not list((tmp_path / "three" / "cache").glob("*.*-*.*")), "no part is left"
