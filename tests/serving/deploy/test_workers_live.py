"""`bentoml serve` with two real workers: traffic to both, sums, rates, a killed one, nothing left.

The tests share the server and run in this order.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelops.serving.deploy.launch import RunningServer, start_server
from modelops.serving.http.keys import create_key

# One pair of workers is asked, broken and counted from test to test: all in one process.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pair")]
PATIENCE_S = 120.0


@dataclass
class Pair:
    """A server of two workers."""

    server: RunningServer
    folder: Path
    keys: dict[str, str]
    answered: int = 0

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.server.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:  # a worker that was killed had taken the connection
            return 0, str(error)

    def ask(self, key: str = "free", **body: Any) -> tuple[int, Any]:
        """(status, answer) of an image request over a connection of its own; 0 is a broken one."""
        request = urllib.request.Request(
            f"{self.server.url}/v1/images/generations",
            json.dumps({"prompt": "sun", "steps": 1, "guidance": 1.0} | body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.keys[key]}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                self.answered += 1
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError as error:
            return 0, str(error)

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """Values by worker."""
        status, text = self.get("/metrics")
        assert status == 200
        return {
            sample.labels["worker"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    def images(self) -> dict[str, float]:
        return self.metric("modelops_images_total", output_format="png")

    def processes(self) -> list[psutil.Process]:
        """The workers, by when they were started."""
        return sorted(
            psutil.Process(self.server.process.pid).children(), key=lambda one: one.create_time()
        )

    def until(self, status: int) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while (got := self.get("/readyz"))[0] != status:
            assert time.monotonic() < deadline, got
            time.sleep(0.1)
        return got[1]


@pytest.fixture(scope="module")
def pair(tiny_release: Path) -> Iterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="mo-"))  # short: it holds sockets
    keys = {
        "free": create_key(folder / "keys.json", "free"),
        "slow": create_key(folder / "keys.json", "slow", requests_per_minute=20),
    }
    (folder / "tmp").mkdir()
    environment = {
        "TMPDIR": str(folder / "tmp"),
        "OMP_NUM_THREADS": "1",
        "MODELOPS_WORKERS": "2",
        "MODELOPS_API_KEYS_FILE": str(folder / "keys.json"),
        "MODELOPS_CACHE": str(folder / "cache"),
        "MODELOPS_RECEIPTS": str(folder / "receipts"),
        "MODELOPS_LOG_FILE": str(folder / "node.log"),
        "BENTOML_CONTAINERIZED": "true",  # with it BentoML would start no dead worker again
    }
    try:
        with start_server(tiny_release, environment=environment) as server:
            yield Pair(server, folder, keys)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_both_workers_answer_and_every_scrape_counts_everything(pair: Pair) -> None:
    answers = [pair.ask(seed=7) for _ in range(40)]
    assert {status for status, _ in answers} == {200}
    for _ in range(6):  # whoever takes the scrape
        images = pair.images()
        assert set(images) == {"1", "2"} and sum(images.values()) == pair.answered == 40
        assert min(images.values()) > 0
    receipts = [answer["data"][0]["x_modelops"] for _, answer in answers]
    assert len({receipt["pixels_sha256"] for receipt in receipts}) == 1
    assert len({receipt["signature"]["key_id"] for receipt in receipts}) == 1
    assert pair.metric("modelops_worker_up") == {"1": 1.0, "2": 1.0}
    assert pair.metric("modelops_ready") == {"1": 1.0, "2": 1.0}


def test_receipts_and_log_of_both_are_whole(pair: Pair) -> None:
    assert {pair.ask()[0] for _ in range(20)} == {200}
    files = list((pair.folder / "receipts").glob("*.jsonl"))
    assert len(files) == 2
    kept = [json.loads(line)["id"] for file in files for line in file.read_text().splitlines()]
    assert len(set(kept)) == len(kept) == pair.answered
    deadline = time.monotonic() + PATIENCE_S
    by_worker: Counter[int] = Counter()
    while sum(by_worker.values()) < pair.answered:  # lines are written after the answer
        assert time.monotonic() < deadline, by_worker
        lines = [json.loads(line) for line in (pair.folder / "node.log").read_text().splitlines()]
        by_worker = Counter(line["worker"] for line in lines if line.get("status") == 200)
    assert set(by_worker) == {1, 2}


def test_a_keys_rate_holds_over_both(pair: Pair) -> None:
    before = pair.images()
    began = time.monotonic()
    answers = [pair.ask("slow") for _ in range(60)]
    minutes = (time.monotonic() - began) / 60
    counted = Counter(status for status, _ in answers)
    assert set(counted) == {200, 429}
    assert 20 <= counted[200] <= 20 * (1 + minutes) + 1
    assert all(pair.images()[worker] > before[worker] for worker in ("1", "2"))
    assert all("20 requests a minute" in a["error"]["message"] for s, a in answers if s == 429)


def test_a_killed_worker_turns_readiness_red_until_there_is_another(pair: Pair) -> None:
    """Under load: only what it had in progress is lost, the other goes on, and a new one comes."""
    lost: list[float] = []
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            status, _ = pair.ask(steps=2)
            statuses[status] += 1
            if status == 0:
                lost.append(time.monotonic())

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1.0)
        first, second = pair.processes()
        killed_at = time.monotonic()
        os.kill(first.pid, signal.SIGKILL)
        said = pair.until(503)
        assert json.loads(said)["problems"] == [
            "worker 1 does not answer: it died, hangs or is starting"
        ]
        assert pair.get("/livez")[0] == 200  # it is being started again; do not kill the rest
        up = pair.metric("modelops_worker_up")
        assert up == {"1": 0.0, "2": 1.0} and set(pair.images()) == {"2"}
        before = statuses[200]
        time.sleep(1.0)
        assert statuses[200] > before  # the other one goes on
        pair.until(200)
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert set(statuses) <= {0, 200} and statuses[0] <= len(threads)
    assert all(moment - killed_at < 5.0 for moment in lost)
    again = pair.processes()
    assert len(again) == 2 and second in again and first not in again
    deadline = time.monotonic() + PATIENCE_S
    while len(images := pair.images()) < 2 or not images["1"]:  # it takes its share again
        assert time.monotonic() < deadline
        assert pair.ask()[0] == 200
    assert images["2"] > images["1"]


def test_a_worker_that_hangs_turns_readiness_red(pair: Pair) -> None:
    _, process = pair.processes()
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert "does not answer" in pair.until(503)
        assert 0.0 in pair.metric("modelops_worker_up").values()
    finally:
        os.kill(process.pid, signal.SIGCONT)
    pair.until(200)


def test_nothing_is_left_at_the_end(pair: Pair) -> None:
    """The rest of the fixture stops the server; stopping it here shows what it leaves."""
    temporary = pair.folder / "tmp"
    (shared,) = temporary.glob("modelops-run-*")
    names = {path.name for path in shared.iterdir()}
    assert {"lock", "1.sock", "2.sock"} <= names
    assert shared.stat().st_mode & 0o777 == 0o700
    workers = pair.processes()
    pair.server.process.terminate()
    assert pair.server.process.wait(60) == 0
    assert not any(one.is_running() for one in workers)
    assert not list(temporary.glob("modelops-run-*"))
