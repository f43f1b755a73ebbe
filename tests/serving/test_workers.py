"""Several workers act as one node: one exposition, one rate per key, one folder of receipts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from modelops.base.errors import ModelopsError, UsageError
from modelops.serving.http import peers as peers_module
from modelops.serving.http.keys import Caller
from modelops.serving.http.limits import RateLimitError, RateLimits, SharedBuckets, Work
from modelops.serving.http.peers import Peers, merge_expositions
from modelops.serving.provenance.receipts import ReceiptLog
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.metrics import NodeMetrics
from modelops.serving.telemetry.segments import LONGEST, SEGMENTS
from modelops.serving.workers import Worker, prepare_workers, this_worker
from waiting import at_once


def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.strip()


# --- which worker, and what is its own ----------------------------------------------------------


def test_the_number_of_workers() -> None:
    assert NodeSettings.from_environment({"MODELOPS_WORKERS": ""}).workers == 1
    assert NodeSettings.from_environment({"MODELOPS_WORKERS": "3"}).workers == 3
    for bad in ("0", "-1", "65", "two", "1.5", "²"):
        with pytest.raises(UsageError, match="MODELOPS_WORKERS"):
            NodeSettings.from_environment({"MODELOPS_WORKERS": bad})


def test_each_worker_takes_a_device_of_its_own(tmp_path: Path) -> None:
    """The mapping only: it has never run on a machine with several GPUs."""
    four = [Worker(index=index, count=4, directory=tmp_path) for index in (1, 2, 3, 4)]
    assert [one.torch_device("cuda", 4) for one in four] == [f"cuda:{k}" for k in range(4)]
    assert [one.torch_device("auto", 2) for one in four] == ["cuda:0", "cuda:1"] * 2
    assert [one.cuda_number("cpu", 2) for one in four] == [0, 1, 0, 1]  # an artifact's runtime
    assert {one.torch_device("cuda:1", 2) for one in four} == {"cuda:1"}  # as it was said
    assert {one.torch_device("auto", 0) for one in four} == {"cpu"}
    assert Worker().torch_device("mps", 0) == "mps"
    with pytest.raises(UsageError, match="no CUDA device"):
        four[0].torch_device("cuda", 0)
    with pytest.raises(UsageError, match="2 CUDA devices are visible"):
        four[0].torch_device("cuda:2", 2)


def test_the_cores_are_divided(tmp_path: Path) -> None:
    two = Worker(index=2, count=2, directory=tmp_path)
    assert (two.threads(0, 16), two.threads(0, 1), two.threads(3, 16)) == (8, 1, 3)
    assert (Worker().threads(0, 16), Worker().threads(5, 16)) == (None, 5)


def test_a_worker_started_again_has_its_predecessors_number(tmp_path: Path) -> None:
    settings = NodeSettings(workers=2, run_directory=str(tmp_path))
    numbers = [this_worker(number, settings).index for number in (1, 2, 3, 4)]
    assert numbers == [1, 2, 1, 2]  # BentoML counts on while it replaces all of them
    assert this_worker(1, NodeSettings()) == this_worker(None, NodeSettings()) == Worker()
    with pytest.raises(ModelopsError, match="no directory in common"):
        this_worker(1, NodeSettings(workers=2))


# --- the run directory --------------------------------------------------------------------------

PREPARE = """
import os, sys
from modelops.serving.settings import NodeSettings
from modelops.serving.workers import prepare_workers
environment = dict(os.environ)
directory = prepare_workers(NodeSettings.from_environment(), environment)
print(directory, oct(directory.stat().st_mode & 0o777), environment["OMP_NUM_THREADS"],
      environment["MODELOPS_RUN_DIRECTORY"] == str(directory), flush=True)
(directory / "1.sock").touch()
sys.stdin.readline() if "wait" in sys.argv else None
"""


def test_the_run_directory_goes_with_its_process(short_folder: Path) -> None:
    output = ended(start(PREPARE, MODELOPS_WORKERS="64", TMPDIR=str(short_folder)))
    directory, mode, threads, told = output.split()
    assert Path(directory).parent == short_folder
    assert (mode, threads, told) == ("0o700", "1", "True")
    assert list(short_folder.iterdir()) == []


def test_an_abandoned_one_goes_at_the_next_start(short_folder: Path) -> None:
    temporary = str(short_folder)
    killed, alive = (
        start(PREPARE + "import time; time.sleep(60)", MODELOPS_WORKERS="2", TMPDIR=temporary)
        for _ in range(2)
    )
    try:
        assert killed.stdout is not None and alive.stdout is not None
        lost, held = (Path(one.stdout.readline().split()[0]) for one in (killed, alive))
        killed.kill()
        killed.wait()
        for directory in (lost, held):
            os.utime(directory, (0, 0))
        ended(start(PREPARE, MODELOPS_WORKERS="2", TMPDIR=temporary))
        assert not lost.exists() and held.is_dir()
    finally:
        alive.kill()
        alive.wait()


def test_one_worker_shares_nothing(tmp_path: Path) -> None:
    environment = {"MODELOPS_RUN_DIRECTORY": str(tmp_path), "BENTOML_CONTAINERIZED": "true"}
    assert prepare_workers(NodeSettings(), environment) is None
    assert environment == {"BENTOML_CONTAINERIZED": "true"}


# --- metrics ------------------------------------------------------------------------------------


def exposition(count: float, label: str) -> str:
    registry = CollectorRegistry()
    Counter("made", "Things\nmade \\ counted", ["what"], registry=registry).labels(label).inc(count)
    Gauge("level", "No label", registry=registry).set(count)
    Histogram("took", "Seconds", buckets=(1, 2), registry=registry).observe(count)
    return generate_latest(registry).decode()


def test_a_merged_exposition_keeps_every_sample() -> None:
    """Read back by Prometheus' own parser; label values hold whatever would trip a reader up."""
    nasty = 'a "quoted" {brace} \\ back, new\nline # HELP x # TYPE =\u2028end'
    texts = {2: exposition(2, nasty), 1: exposition(1, nasty), 3: exposition(3, "other")}
    merged = merge_expositions(texts)
    lines = merged.split("\n")
    for kind in ("HELP", "TYPE"):
        names = [line.split()[2] for line in lines if line.startswith(f"# {kind}")]
        assert len(names) == len(set(names)) >= 3

    def samples(text: str, worker: int | None) -> dict[tuple[str, Any], float]:
        return {
            (sample.name, tuple(sorted(({"worker": str(worker)} if worker else {}).items()
             | sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
        }  # fmt: skip

    expected = {}
    for worker, text in texts.items():
        expected |= samples(text, worker)
    assert samples(merged, None) == expected
    assert merge_expositions({1: texts[1]}).count("made_total{") == 1


def test_a_nodes_own_metrics_merge(tmp_path: Path) -> None:
    text = NodeMetrics().text().decode()
    merged = merge_expositions({1: text, 2: text})
    assert merged.count("\nmodelops_") == 2 * (text.count("\nmodelops_"))
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "check", "metrics"], input=merged, text=True, check=False)
        assert done.returncode == 0


class Node:
    """As much of a node as its peers ask for."""

    def __init__(self, name: str) -> None:
        self.metrics = NodeMetrics()
        self.metrics.on_images("png", len(name))
        self.trouble: list[str] = []
        self.is_alive = True

    def readiness(self) -> list[str]:
        return self.trouble

    def alive(self) -> bool:
        return self.is_alive


def test_whoever_is_asked_answers_for_all(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real sockets; then one worker is in trouble, one hangs, one is gone."""
    nodes = [Node("a"), Node("bb")]

    async def play() -> None:
        one, two = (
            Peers(
                Worker(index=number, count=2, directory=short_folder), timeout_s=0.4,
                node=lambda node=node: node, text=node.metrics.text,
            )
            for number, node in enumerate(nodes, start=1)
        )  # fmt: skip
        await one.start()
        assert await one.problems() == ["worker 2 does not answer: it died, hangs or is starting"]
        assert await one.alive()  # it has never been there
        await two.start()
        for answer in [*await asyncio.gather(*(p.exposition() for p in (one, two) * 8))]:
            text = answer.decode()
            assert 'modelops_images_total{worker="1",output_format="png"} 1.0' in text
            assert 'modelops_images_total{worker="2",output_format="png"} 2.0' in text
            assert 'worker_up{worker="1"} 1.0' in text and 'worker_up{worker="2"} 1.0' in text
        assert await one.problems() == await two.problems() == []
        assert (short_folder / "1.sock").stat().st_mode & 0o777 == 0o600

        nodes[1].trouble, nodes[1].is_alive = ["golden image: off"], False
        assert await one.problems() == ["worker 2: golden image: off"]
        assert not await one.alive() and await two.alive()  # its own state is told elsewhere
        nodes[1].trouble, nodes[1].is_alive = [], True

        two.close()
        (short_folder / "2.sock").unlink()
        mute = await asyncio.start_unix_server(lambda reader, writer: None, short_folder / "2.sock")
        text = (await one.exposition()).decode()
        assert (
            'modelops_worker_up{worker="2"} 0.0' in text and 'images_total{worker="2"' not in text
        )
        assert len(await one.problems()) == 1
        assert await one.alive()  # for now
        monkeypatch.setattr(peers_module, "MUTE_S", 0.0)
        assert not await one.alive()  # a process that does not end by itself
        monkeypatch.setattr(peers_module, "_exists", lambda process: False)
        assert await one.alive()  # BentoML starts it again
        mute.close()

        async def cut_short(reader: Any, writer: asyncio.StreamWriter) -> None:
            writer.write(b"modelops_images_total{output_for")  # killed meanwhile
            writer.close()

        (short_folder / "2.sock").unlink()
        half = await asyncio.start_unix_server(cut_short, short_folder / "2.sock")
        text = (await one.exposition()).decode()
        assert list(text_string_to_metric_families(text)) and 'worker="2",' not in text
        half.close()
        one.close()

    asyncio.run(play())


def test_a_worker_that_waits_for_its_health_still_tells_its_metrics(short_folder: Path) -> None:
    """A red filter is tried again when it is asked for, and may hang."""
    nodes, asked, held = [Node("a"), Node("bb")], threading.Semaphore(0), threading.Event()

    def hangs() -> list[str]:
        asked.release()
        held.wait(60)
        return []

    async def play() -> None:
        one, two = (
            Peers(
                Worker(index=number, count=2, directory=short_folder),
                node=lambda node=node: node, text=node.metrics.text,
            )
            for number, node in enumerate(nodes, start=1)
        )  # fmt: skip
        nodes[1].readiness = hangs  # type: ignore[method-assign]
        await one.start()
        await two.start()
        probes = [asyncio.ensure_future(one.problems()) for _ in range(3)]
        await asyncio.to_thread(asked.acquire)
        assert 'modelops_worker_up{worker="2"} 1.0' in (await one.exposition()).decode()
        held.set()
        await asyncio.gather(*probes)
        one.close()
        two.close()

    asyncio.run(play())


# --- rates --------------------------------------------------------------------------------------

TAKE = """
import asyncio, sys
from pathlib import Path
from modelops.serving.http.keys import Caller
from modelops.serving.http.limits import RateLimitError, RateLimits, SharedBuckets, Work
store = SharedBuckets(Path(sys.argv[1]))
limits = RateLimits(images_per_minute=100, store=store, clock=lambda: 1.0)
passed = 0
for _ in range(300):
    try:
        asyncio.run(limits.take(Caller(name="alice"), Work()))
        passed += 1
    except RateLimitError as error:
        assert error.wait_s is not None and error.wait_s <= 1.0
print(passed)
"""


def test_a_rate_holds_for_all_workers_together(tmp_path: Path) -> None:
    """Four processes at once, in a minute that does not pass: exactly the rate comes through."""
    processes = [start(TAKE, str(tmp_path / "limits")) for _ in range(4)]
    passed = [int(ended(process)) for process in processes]
    assert sum(passed) == 100


def test_shared_buckets_do_what_own_ones_do(tmp_path: Path) -> None:
    now = 1000.0
    alice, free = Caller(name="alice", requests_per_minute=6, images_per_minute=4), Caller(name="x")

    def make() -> RateLimits:
        return RateLimits(store=SharedBuckets(tmp_path / "limits"), clock=lambda: now)

    def wait(limits: RateLimits, images: int) -> float | None:
        with pytest.raises(RateLimitError) as error:
            at_once(limits.take(alice, Work(images)))
        return error.value.wait_s

    one, two = make(), make()
    at_once(one.take(alice, Work(3)))
    assert wait(two, 2) == pytest.approx(15.0) and wait(two, 5) is None
    at_once(two.give_back_images(alice, 1))
    at_once(one.take(alice, Work(2)))
    assert wait(one, 1) == wait(two, 1) == pytest.approx(15.0)
    now += 15.0
    at_once(two.take(alice, Work()))
    at_once(one.take(free, Work(10**9)))
    assert len(list((tmp_path / "limits").iterdir())) == 1  # a caller without a rate costs nothing
    assert wait(make(), 1) is not None  # a worker that was started again knows


HOLD = """
import sys
from pathlib import Path
from modelops.serving.http.limits import SharedBuckets
with SharedBuckets(Path(sys.argv[1])).of("alice"):
    print("held", flush=True)
    sys.stdin.readline()
    import time; time.sleep(60)
"""


def test_a_worker_that_hangs_or_dies_with_the_lock(tmp_path: Path) -> None:
    alice = Caller(name="alice", images_per_minute=5)
    limits = RateLimits(requests_per_minute=5, store=SharedBuckets(tmp_path))
    holder = start(HOLD, str(tmp_path))
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"

        async def meanwhile() -> None:
            """Others are let in while a held one waits: nothing blocks the event loop."""
            waiting = asyncio.ensure_future(limits.take(Caller(name="alice"), Work()))
            back = asyncio.ensure_future(limits.give_back_images(alice, 1))
            for index in range(20):
                await limits.take(Caller(name=f"bob-{index}"), Work())
                await asyncio.sleep(0)
            assert not waiting.done() and not back.done()
            with pytest.raises(RateLimitError, match="cannot be told") as error:
                await waiting  # not let in uncounted
            assert error.value.wait_s == 1.0
            await back

        asyncio.run(meanwhile())
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    at_once(limits.take(alice, Work()))


def test_without_a_place_for_the_files_each_worker_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    limits = RateLimits(requests_per_minute=1, store=SharedBuckets(tmp_path / "file"))
    at_once(limits.take(Caller(name="alice"), Work()))
    with pytest.raises(RateLimitError, match="1 requests a minute"):
        at_once(limits.take(Caller(name="alice"), Work()))
    assert caplog.text.count("counted by each worker") == 1


# --- files that several write -------------------------------------------------------------------

WRITE = """
import logging, os, sys
from modelops.serving.telemetry.logs import configure_logging
from modelops.serving.provenance.receipts import ReceiptLog
from modelops.serving.settings import NodeSettings
from modelops.serving.workers import Worker, WorkerField
lines = configure_logging(NodeSettings.from_environment())
lines.addFilter(WorkerField(Worker(index=int(sys.argv[2]), count=2)))
receipts = ReceiptLog(sys.argv[1], max_bytes=10_000_000, writers=2)
for number in range(400):
    logging.getLogger("modelops.serving").info("x" * 2000, extra={"fields": {"number": number}})
    assert receipts.write({"id": f"{sys.argv[2]}-{number}", "padding": "y" * 1000})
lines.close(timeout_s=30)
assert lines.lost == 0
"""


def test_a_log_and_a_receipts_folder_of_two_workers(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    for process in [
        start(WRITE, str(tmp_path / "receipts"), str(k), MODELOPS_LOG_FILE=str(log)) for k in (1, 2)
    ]:
        ended(process)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["worker"], line["number"]) for line in lines} == {
        (worker, number) for worker in (1, 2) for number in range(400)
    }
    files = list((tmp_path / "receipts").glob("*.jsonl"))
    kept = [json.loads(line)["id"] for file in files for line in file.read_text().splitlines()]
    assert sorted(kept) == sorted(f"{w}-{n}" for w in (1, 2) for n in range(400))


def test_a_busy_worker_may_delete_a_quiet_ones_oldest_file(tmp_path: Path) -> None:
    """The quiet one goes on in a new file, and the folder stays within its limit."""
    limit = 2 * SEGMENTS * LONGEST
    quiet, busy = (ReceiptLog(tmp_path, max_bytes=limit, writers=2) for _ in range(2))
    with contextlib.closing(quiet), contextlib.closing(busy):
        assert quiet.write({"id": "first"})
        for number in range(400):
            assert busy.write({"id": f"busy-{number}", "padding": "y" * 4000})
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= limit
        assert "first" not in "".join(file.read_text() for file in tmp_path.iterdir())
        assert quiet.write({"id": "second"})
        assert "second" in "".join(file.read_text() for file in tmp_path.iterdir())


SIGN = """
import sys
from modelops.serving.provenance.signing import development_key
print("ready", flush=True)
sys.stdin.readline()
print(development_key(sys.argv[1]).key_id)
"""


def test_workers_that_make_a_development_key_at_once_have_the_same(tmp_path: Path) -> None:
    processes = [start(SIGN, str(tmp_path)) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert len({ended(process) for process in processes}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["development.pem"]
