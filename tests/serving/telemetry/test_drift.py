"""The drift log of a node under real traffic, and `modelops monitor` on what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from click.testing import CliRunner

import disks
import drift_parts
import live_node
from drift_parts import count, open_log, picture
from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import sha256_file, sha256_tree
from modelops.cli.main import cli
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.open import open_source
from modelops.metrics.features import Lite0Extractor
from modelops.monitoring.log import read_log
from modelops.monitoring.reference import release_files
from modelops.monitoring.rows import PREFIX, text_to_features
from modelops.monitoring.scripts import script_shares
from modelops.releases.build import build_release
from modelops.releases.verify import RECORD_FILE
from modelops.serving.node.golden import make_golden
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.drift import evaluation_cadence
from project_records import CRITERIA, verdict_on

SECRET = "a zebra that nobody shall read about"


@pytest.fixture(scope="module")
def monitored(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with a real evaluation of 24 images, its reference, and a cadence of 9 days."""
    folder = tmp_path_factory.mktemp("drift")
    model = sha256_tree(tiny_checkpoint)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a small thing number {index}" for index in range(24)))
    manifest = _real_pictures(folder)
    settings = EvaluationSettings(
        manifest=manifest / "manifest.parquet", splits=manifest / "splits.parquet",
        prompts_file=prompts, steps=2, guidance=1.0, known_copies=0, resamples=20, grid=4,
    )  # fmt: skip
    evaluate(open_source(str(tiny_checkpoint)), settings, out_path=folder / "final.json")
    (folder / "policy.yaml").write_text(
        "monitoring: {evaluate_every_days: 9, min_n: 20}\n" + CRITERIA
    )
    rules = sha256_file(folder / "policy.yaml")
    verdict_on(model, policy_sha256=rules).write(folder / "v.json")
    files, remark = release_files(
        [folder / "final.json"], model_sha256=model, folder=folder / "reference"
    )
    assert "24 images of final.json" in remark
    golden = make_golden(tiny_checkpoint, folder / "golden.png")
    build_release(
        folder / "release", model_dir=tiny_checkpoint, verdict=folder / "v.json",
        records=[folder / "final.json"], policy=folder / "policy.yaml", name="tiny", version="0.1",
        defaults={"golden": golden},
        extra_files={"golden.png": folder / "golden.png", **files},
    )  # fmt: skip
    return folder / "release"


def ask(live: live_node.LiveNode, prompt: str, **options: Any) -> Any:
    settings = {"steps": 2, "guidance": 1.0, **options}
    n = settings.pop("n", 1)
    return live.client().images.generate(prompt=prompt, n=n, extra_body=settings)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = "".join(path.read_text() for path in sorted(folder.glob(f"{PREFIX}*.jsonl")))
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.xdist_group("monitored")
def test_traffic_to_a_verdict(monitored: Path, tmp_path: Path) -> None:
    settings = NodeSettings(drift_log=str(tmp_path / "log"), drift_sample=1.0, profile_s=0)
    with live_node.served(monitored, settings) as live:
        for index in range(24):
            ask(live, f"a small thing number {index}", seed=1000 + index)
        ask(live, SECRET, seed=1, n=2, steps=4, guidance=2.0)
        with pytest.raises(openai.BadRequestError):
            ask(live, "explicit hardcore porn")
        image = ask(live, "a small thing number 3", seed=77)
        assert live.node.drift is not None
        live.node.drift.flush(120)
        text = live.node.metrics.text().decode()
        assert 'modelops_drift_rows_total{result="written"} 54.0' in text
        assert 'modelops_drift_rows_total{result="dropped"} 0.0' in text
        assert "modelops_evaluation_cadence_seconds 777600.0" in text  # of the released policy
    rows = rows_of(tmp_path / "log")
    requests = [row for row in rows if row["kind"] == "request"]
    images = [row for row in rows if row["kind"] == "image"]
    assert len(requests) == 27 and len(images) == 27
    assert [row["blocked"] for row in requests].count(True) == 1
    secret = requests[24]
    assert secret["characters"] == len(SECRET) and secret["scripts"] == {"latin": 1.0}
    assert secret["tokens"] == 9
    pair = [row for row in images if row["prompt"] == secret["prompt"]]
    assert [(row["steps"], row["guidance"]) for row in pair] == [(4, 2.0)] * 2
    # The same prompt has the same tag, and each request another.
    assert requests[3]["prompt"] == requests[26]["prompt"]
    assert len({row["request"] for row in requests}) == 27
    for row in images:
        assert {"queue", "denoise", "image_filter", "total"} <= set(row["seconds"])
        assert row["seconds"]["denoise"] <= row["seconds"]["total"]
        assert row["release"] == sha256_file(monitored / RECORD_FILE)
    # The features are those that an evaluation of the very image sent would take.
    import base64
    import io

    from PIL import Image

    sent = np.array(Image.open(io.BytesIO(base64.b64decode(image.data[0].b64_json))))
    expected = Lite0Extractor().images_to_features([sent])[0]
    logged = text_to_features(images[-1]["features"], 1280)
    assert logged is not None and np.abs(logged - expected).max() < 0.01
    for path in (tmp_path / "log").iterdir():
        assert "zebra" not in path.read_text() and path.stat().st_mode & 0o077 == 0

    command = ["monitor", str(tmp_path / "log"), "--release", str(monitored)]
    done = CliRunner().invoke(cli, [*command, "--json"], standalone_mode=False)
    record = json.loads(done.output.splitlines()[0])
    assert done.return_value == {"keep": 0, "undecided": 4}.get(record["answer"], 3)
    assert record["reference"] == "evaluation" and record["n_images"] == 27
    found = {test["name"]: test for test in record["tests"]}
    # 24 prompts each, of the same length and script; the guided pair is left out.
    assert found["feature_mean"]["n_window"] == found["feature_mean"]["n_reference"] == 24
    assert found["feature_mean"]["outcome"] == "not found"
    assert found["image_filter_rate"]["p"] == 1.0
    assert found["script_mix"]["outcome"] == "not found"
    assert any("other steps or guidance" in warning for warning in record["warnings"])
    asked = subprocess.run(
        [sys.executable, "-m", "modelops.cli.main", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert asked.returncode == done.return_value, asked.stderr
    assert "feature_covariance" in asked.stdout


def test_no_folder_no_log(tiny_release: Path) -> None:
    node = InferenceNode(tiny_release, settings=NodeSettings(profile_s=0))
    assert node.drift is None
    assert "modelops_drift" not in node.metrics.text().decode()
    node.close(drain=False)


def test_without_an_evaluation_there_are_no_features_and_the_node_says_so(
    tiny_release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = NodeSettings(drift_log=str(tmp_path), drift_sample=1.0, profile_s=0)
    with caplog.at_level("WARNING", "modelops"), live_node.served(tiny_release, settings) as live:
        ask(live, "red heart", steps=1)
        assert live.node.drift is not None
        live.node.drift.flush(120)
    assert "the release holds no evaluation of its model" in caplog.text
    (row,) = [row for row in rows_of(tmp_path) if row["kind"] == "image"]
    assert row.get("features") is None and row["score"] >= 0


@pytest.mark.parametrize("options", [{"drift_sample": 1.5}, {"drift_log_mb": 0}])
def test_settings_out_of_range_are_refused(
    tiny_release: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        InferenceNode(tiny_release, settings=NodeSettings(drift_log=str(tmp_path), **options))


def test_a_folder_that_cannot_be_written_ends_the_start(tiny_release: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = NodeSettings(drift_log=str(tmp_path / "file"))
    with pytest.raises(ModelopsError, match="drift log cannot be kept here"):
        InferenceNode(tiny_release, settings=settings)


@pytest.mark.xdist_group("monitored")
def test_the_nodes_own_cadence_comes_first(monitored: Path, tiny_release: Path) -> None:
    assert evaluation_cadence(monitored, NodeSettings()) == 9
    assert evaluation_cadence(monitored, NodeSettings(evaluate_every_days=3)) == 3
    assert evaluation_cadence(tiny_release, NodeSettings()) == 30
    assert NodeSettings.from_environment({"MODELOPS_EVALUATE_EVERY_DAYS": "0"}) == NodeSettings()


# --- the log itself -------------------------------------------------------------------------------


class SlowExtractor:
    """Lite0's interface; holds every image until it is let go."""

    protocol = Lite0Extractor().protocol
    dim = 1280

    def __init__(self) -> None:
        self.go = threading.Event()

    def images_to_features(self, images: Any, *, on_progress: Any = None) -> np.ndarray:
        self.go.wait()
        return np.ones((len(images), 1280), np.float32)


@pytest.mark.parametrize("side", [8, 4000])  # many small ones, or few that fill the memory allowed
def test_a_log_that_falls_behind_drops_rows_and_no_request_waits(tmp_path: Path, side: int) -> None:
    extractor = SlowExtractor()
    log, registry = open_log(tmp_path, extractor=extractor)
    image = picture(side)
    for index in range(200):  # ends although the extractor holds the first one
        log.note_images(f"r{index}", [image], [0.1], [False], {"total": 1.0})
    dropped = count(registry, "dropped")
    assert dropped >= (200 - 66 if side == 8 else 197)
    extractor.go.set()
    log.close()
    assert count(registry, "written") + dropped == 200
    log.note_images("late", [picture()], [0.1], [False], {"total": 1.0})
    assert count(registry, "dropped") == dropped + 1


def test_the_sample_is_a_share_of_the_ids_and_all_of_a_request(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path, sample=0.25)
    taken = [f"id-{index}" for index in range(4000) if log.takes(f"id-{index}")]
    assert 870 < len(taken) < 1130  # 1000 expected, 4.7 standard deviations
    assert all(log.takes(name) for name in taken)
    log.close()


def test_a_full_disk_loses_rows_and_leaves_no_half_line(tmp_path: Path) -> None:
    """In a process of its own whose files may not grow beyond 20 kB."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(drift_parts.__file__).parent)!r})
import resource, signal
from drift_parts import open_log, count
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log, registry = open_log(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for index in range(60):
    log.note_request(f"r{{index}}", "x" * 40, tokens=3, blocked=False)
log.flush(); log.note_request("r", "x", tokens=1, blocked=False); log.close()
print(int(count(registry, "written")), int(count(registry, "failed")))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(drift_parts.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    written, failed = map(int, done.stdout.split())
    assert failed > 0 and written + failed == 61
    (file,) = tmp_path.glob("*.jsonl")
    assert len(file.read_bytes()) <= 20_000 and file.read_bytes().endswith(b"\n")
    found = read_log(tmp_path, release_sha256="a" * 64, model_sha256="b" * 64)
    assert len(found.requests) == written and not found.refused


def test_a_node_whose_drift_log_has_no_room_goes_on_serving(
    tiny_release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def waiting(name: str, at_least: float) -> None:
        """Ask until so many rows have ended so; what is left of a page takes a few."""
        for _ in range(40):
            if rows(name) >= at_least:
                return
            assert ask(live, "red heart", steps=1).data[0].b64_json
            drift.flush(120)
        raise AssertionError(f"no rows {name}")

    def rows(name: str) -> float:
        return live.metric(f'modelops_drift_rows_total{{result="{name}"}}')

    with disks.small_disk(tmp_path / "disk") as place, caplog.at_level("WARNING", "modelops"):
        settings = NodeSettings(drift_log=str(place / "log"), drift_sample=1.0, profile_s=0)
        with live_node.served(tiny_release, settings) as live:
            assert live.node.drift is not None
            drift = live.node.drift
            waiting("written", 2)
            ballast = disks.fill(place)
            waiting("failed", 8)
            assert live.node.readiness() == []
            ballast.unlink()
            waiting("written", rows("written") + 2)
            written = rows("written")
            assert rows("dropped") == 0
        digests = {"release_sha256": live.node.release_sha256,
                   "model_sha256": live.node.release.model_sha256}  # fmt: skip
        found = read_log(place / "log", **digests)
        assert len(found.requests) + len(found.images) == written and not found.refused
        assert all(file.read_bytes().endswith(b"\n") for file in (place / "log").iterdir())
    said = [record.getMessage() for record in caplog.records if "drift log can" in record.message]
    assert len(said) == 2 and "No space left" in said[0] and "written again" in said[1]


def test_what_waits_when_the_log_is_closed_is_counted(tmp_path: Path) -> None:
    extractor = SlowExtractor()
    log, registry = open_log(tmp_path, extractor=extractor)
    for index in range(9):
        log.note_images(f"r{index}", [picture()], [0.1], [False], {"total": 1.0})
    log.close(timeout_s=0.05)
    assert count(registry, "dropped") >= 8  # the first one may be in progress
    extractor.go.set()
    assert log._thread is not None
    log._thread.join(60)
    assert count(registry, "dropped") + count(registry, "written") == 9


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ModelopsError("a bad image")])
def test_an_extractor_that_fails_now_and_then_costs_these_rows_their_features_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    class Broken(SlowExtractor):
        made = 0

        def images_to_features(self, images: Any, *, on_progress: Any = None) -> np.ndarray:
            self.made += 1
            if self.made in (1, 2, 7):
                raise error
            return np.full((1, 4), 0.5, np.float32)

    log, registry = open_log(tmp_path, extractor=Broken())
    for index in range(10):
        log.note_images(f"r{index}", [picture()], [0.1], [False], {"total": 1.0})
    log.close()
    assert count(registry, "written") == 10 and count(registry, "failed") == 0
    with_features = [number for number, row in enumerate(rows_of(tmp_path), 1) if "features" in row]
    assert with_features == [3, 4, 5, 6, 8, 9, 10]
    assert caplog.text.count("features of the drift log cannot be written") == 1


def test_the_folder_stays_within_its_limit(tmp_path: Path) -> None:
    log, registry = open_log(tmp_path, max_bytes=300_000)
    for start in range(0, 1500, 30):
        for index in range(start, start + 30):
            log.note_request(f"r{index}", "x", tokens=1, blocked=False)
        log.flush()
    assert count(registry, "written") == 1500
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 300_000
    log.close()
    assert len(read_log(tmp_path, release_sha256="a" * 64, model_sha256="b" * 64).requests) > 100


def test_a_killed_node_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(drift_parts.__file__).parent)!r})
from drift_parts import open_log
from pathlib import Path
log, _ = open_log(Path({str(tmp_path)!r}))
print("ready", flush=True)
number = 0
while True:
    number += 1
    log.note_request(f"r{{number}}", "x" * 2000, tokens=1, blocked=False); log.flush()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        while sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) < 20_000:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    newest = max(tmp_path.glob("*.jsonl"))
    with newest.open("ab") as handle:  # as a power cut would leave it
        handle.write(b'{"kind":"request","schema_ver')
    found = read_log(tmp_path, release_sha256="a" * 64, model_sha256="b" * 64)
    assert len(found.requests) > 50 and not found.refused


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("red heart", {"latin": 1.0}), ("", {"none": 1.0}), ("42 🎈!", {"none": 1.0}),
        ("красное", {"cyrillic": 1.0}), ("ab日本", {"han": 0.5, "latin": 0.5}),
        ("ひらカタ", {"kana": 1.0}), ("한국어", {"hangul": 1.0}),
        ("ʘლ", {"latin": 0.5, "other": 0.5}),
        ("\ud800", {"none": 1.0}),
    ],
)  # fmt: skip
def test_scripts(text: str, shares: dict[str, float]) -> None:
    assert script_shares(text) == shares


def _real_pictures(folder: Path) -> Path:
    """A manifest of 16 real drawings and their splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from modelops.data.corpora.openmoji import build_corpus
    from modelops.data.manifest import read_manifest

    manifest = build_corpus(folder / "data", resolution=32, limit=16, seed=0)
    ids = [sample.id for sample in read_manifest(manifest).rows]
    splits = ["test" if index % 2 else "train" for index in range(len(ids))]
    pq.write_table(
        pa.table({"id": ids, "split": splits, "group": ids}), folder / "data/splits.parquet"
    )
    return folder / "data"
