"""Faults in real nodes, seen by a real Prometheus: each fires its alert, and no other.

One node is `bentoml serve` in its own process, the other one runs here, so that it can be broken.
The rules are those of `modelops serve scaffold` with all durations divided by 40. The tests share
the Prometheus and run in this order.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import uvicorn

from modelops.base.files import sha256_tree
from modelops.records.evaluation import EvaluationRecord, SourceInfo
from modelops.releases.build import build_release
from modelops.serving.deploy.launch import RunningServer, free_port, start_server, stop_server
from modelops.serving.deploy.scaffold import ScaffoldOptions, write_scaffold
from modelops.serving.http.app import create_app
from modelops.serving.node.golden import make_golden
from modelops.serving.node.node import InferenceNode
from modelops.serving.rollout.rollout import Rollout, open_rollout
from modelops.serving.rollout.trial import CanaryRules
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.logs import configure_logging
from project_records import verdict_on

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here"),
]
SCALE = 1 / 40
BUDGET_S = 5.0
PATIENCE_S = 120.0


def get(url: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def post(url: str, timeout_s: float = 30.0, **body: Any) -> int:
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        json.dumps({"prompt": "sun", "steps": 1, "guidance": 1.0} | body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code
    except OSError:
        return 0


def ask(url: str, *, pause_s: float, **body: Any) -> None:
    post(url, **body)
    time.sleep(pause_s)


@dataclass
class Lab:
    """Prometheus, the two nodes, and a little traffic to both; `near` stands in `rollout`."""

    prometheus: str
    far: RunningServer
    near: InferenceNode
    near_url: str
    rollout: Rollout
    began: float = field(default_factory=time.monotonic)
    busy: dict[str, bool] = field(default_factory=lambda: {"far": True, "near": True})
    ended: threading.Event = field(default_factory=threading.Event)

    def query(self, expression: str) -> list[dict[str, Any]]:
        text = urllib.parse.urlencode({"query": expression})
        status, body = get(f"{self.prometheus}/api/v1/query?{text}")
        assert status == 200, body
        return list(json.loads(body)["data"]["result"])

    def firing(self) -> set[str]:
        _, body = get(f"{self.prometheus}/api/v1/alerts")
        listed = json.loads(body)["data"]["alerts"]
        return {one["labels"]["alertname"] for one in listed if one["state"] == "firing"}

    def fired_since(self, moment: float) -> set[str]:
        seconds = int(time.monotonic() - moment) + 1
        found = self.query(f'count_over_time(ALERTS{{alertstate="firing"}}[{seconds}s])')
        return {one["metric"]["alertname"] for one in found}

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}; firing: {sorted(self.firing())}"
            time.sleep(0.2)

    @contextlib.contextmanager
    def fault(self, *expected: str) -> Iterator[None]:
        """From quiet, through what happens inside, just these alerts fire."""
        self.wait(lambda: not self.firing(), "it was not quiet before the fault")
        time.sleep(2.5)  # `fired_since` looks back in whole seconds
        began = time.monotonic()
        yield
        fired = self.fired_since(began)
        assert fired == set(expected)

    def until(self, *expected: str) -> None:
        """Wait until these alerts fire, and a little longer for others to join them."""
        self.wait(lambda: self.firing() >= set(expected), f"{expected} did not fire")
        time.sleep(3.0)

    def quiet(self) -> None:
        self.wait(lambda: not self.firing(), "the alert stays after the fault is healed")


@pytest.fixture(scope="module")
def release(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny release that holds a fresh evaluation of its model; `next` beside it is its twin."""
    folder = tmp_path_factory.mktemp("live")
    model = sha256_tree(tiny_checkpoint)
    verdict_on(model).write(folder / "v.json")
    source = SourceInfo(kind="checkpoint", uri="model", sha256=model)
    EvaluationRecord(source=source).write(folder / "final.json")
    golden = make_golden(tiny_checkpoint, folder / "golden.png")
    for name, version in (("release", "0.1"), ("next", "0.2")):
        build_release(
            folder / name,
            model_dir=tiny_checkpoint,
            verdict=folder / "v.json",
            records=[folder / "final.json"],
            name="tiny",
            version=version,
            defaults={"golden": golden, "steps": 4, "guidance": 3.0},
            extra_files={"golden.png": folder / "golden.png"},
        )
    return folder / "release"


@contextlib.contextmanager
def near_node(release: Path) -> Iterator[tuple[Rollout, str]]:
    settings = NodeSettings(max_rows=2, queue_limit=2, releases=str(release.parent))
    rollout = open_rollout(release, settings, lambda path: InferenceNode(path, settings=settings))
    rollout.stable.start()
    assert rollout.stable.readiness() == []
    config = uvicorn.Config(
        create_app(rollout=rollout), host="127.0.0.1", port=0, log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield rollout, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        rollout.close(drain=False, timeout_s=10)


@contextlib.contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    write_scaffold(
        folder,
        ScaffoldOptions(latency_budget_s=BUDGET_S, time_scale=SCALE, targets=targets),
    )
    config = folder / "prometheus" / "prometheus.yaml"
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
             f"--web.listen-address={address}", "--log.level=warn"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                if get(f"http://{address}/-/ready")[0] == 200:
                    break
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def lab(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.ExitStack() as stack:
        environment = {"OMP_NUM_THREADS": "1"}
        far = stack.enter_context(
            start_server(release, log_path=folder / "far.log", environment=environment)
        )
        rollout, near_url = stack.enter_context(near_node(release))
        targets = [url.removeprefix("http://") for url in (far.url, near_url)]
        url = stack.enter_context(prometheus(folder, targets))
        made = Lab(prometheus=url, far=far, near=rollout.stable, near_url=near_url, rollout=rollout)

        def traffic(name: str, target: str) -> None:
            while not made.ended.wait(0.3):
                if made.busy[name]:
                    post(target, timeout_s=10)

        def probes() -> None:  # an orchestrator's; they make a red filter be tried again
            while not made.ended.wait(1.0):
                for target in (far.url, near_url):
                    with contextlib.suppress(OSError):
                        get(f"{target}/readyz")

        stack.callback(made.ended.set)
        for work in (
            lambda: traffic("far", far.url), lambda: traffic("near", near_url), probes
        ):  # fmt: skip
            threading.Thread(target=work, daemon=True).start()
        made.wait(
            lambda: len(made.query('modelops_ready{job="modelops"} == 1')) == 2, "not scraped"
        )
        made.quiet()  # before the first scrape no node is ready
        time.sleep(2.0)
        yield made


@contextlib.contextmanager
def slow_steps(lab: Lab, seconds: float) -> Iterator[None]:
    """A device that is slow: each network evaluation takes this much longer."""
    pipeline = lab.near.engine.pipeline
    evaluate = pipeline.predict_velocity

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return evaluate(*arguments)

    pipeline.predict_velocity = slow
    try:
        yield
    finally:
        pipeline.predict_velocity = evaluate


@contextlib.contextmanager
def clients(number: int, work: Callable[[], Any]) -> Iterator[None]:
    """So many clients, each asking again as soon as it is answered."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            work()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)


def test_a_healthy_pair_is_quiet(lab: Lab) -> None:
    began = time.monotonic()
    time.sleep(20)
    assert lab.fired_since(began) == set()
    states = {one["metric"]["instance"] for one in lab.query('up{job="modelops"} == 1')}
    assert len(states) == 2
    (rate,) = lab.query('sum(rate(modelops_steps_total{job="modelops"}[10s]))')
    assert float(rate["value"][1]) > 0


def test_filter_raises(lab: Lab) -> None:
    inner = lab.near.image_guard._filter
    check = inner.check

    def raises(images: Any) -> Any:
        raise RuntimeError("the weights are gone")

    with lab.fault("ModelopsFilterFailing"):
        inner.check = raises
        try:
            lab.until("ModelopsFilterFailing")
        finally:
            inner.check = check
        lab.quiet()
    assert lab.near.readiness() == []


def test_requests_fail(lab: Lab) -> None:
    """The text encoder raises: every request of this node ends with 500."""
    model: Any = lab.near.engine.model
    encode = model._encode

    def raises(texts: Any) -> Any:
        raise MemoryError

    with lab.fault("ModelopsErrorRate"):
        model._encode = raises
        try:
            lab.until("ModelopsErrorRate")
        finally:
            model._encode = encode
        lab.quiet()


def test_queue_is_full(lab: Lab) -> None:
    with lab.fault("ModelopsQueueSaturated"):
        with (
            slow_steps(lab, 0.1),
            clients(8, lambda: ask(lab.near_url, pause_s=0.1, steps=3)),
        ):
            lab.until("ModelopsQueueSaturated")
        lab.quiet()


def test_requests_are_slow(lab: Lab) -> None:
    lab.busy |= {"far": False, "near": False}
    try:
        with lab.fault("ModelopsLatencyHigh"):
            with slow_steps(lab, 1.1), clients(2, lambda: post(lab.near_url, steps=5)):
                lab.until("ModelopsLatencyHigh")
            lab.busy |= {"far": True, "near": True}
            lab.quiet()
    finally:
        lab.busy |= {"far": True, "near": True}


def test_clients_hang_up(lab: Lab) -> None:
    host, port = lab.near_url.removeprefix("http://").split(":")
    body = b'{"prompt": "sun", "steps": 200, "guidance": 1.0}'

    def hang_up() -> None:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.1\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            time.sleep(0.5)

    with lab.fault("ModelopsWastedSteps"):
        with slow_steps(lab, 0.02), clients(1, hang_up):
            lab.until("ModelopsWastedSteps")
        lab.quiet()


def test_log_disk_is_full(lab: Lab) -> None:
    import logging

    logger = logging.getLogger("modelops")
    before = logger.handlers[:], logger.level, logger.propagate
    with lab.fault("ModelopsLogLinesLost"):
        lost = lab.near.metrics.log_lost
        writer = configure_logging(NodeSettings(log_file="/dev/full"), on_lost=lost.inc)
        try:
            lab.until("ModelopsLogLinesLost")
        finally:
            writer.close()
            logger.handlers[:], logger.level, logger.propagate = before
        assert post(lab.near_url) == 200
        lab.quiet()


def test_engine_stands_still(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network evaluation that never ends, as of a hung device."""
    go_on = threading.Event()
    pipeline = lab.near.engine.pipeline
    evaluate = pipeline.predict_velocity

    def hang(*arguments: Any) -> Any:
        go_on.wait(PATIENCE_S)
        return evaluate(*arguments)

    monkeypatch.setattr(
        lab.near, "settings", lab.near.settings.model_copy(update={"stalled_s": 1.0})
    )
    with lab.fault("ModelopsEngineStopped"):
        pipeline.predict_velocity = hang
        try:
            lab.until("ModelopsEngineStopped")
        finally:
            pipeline.predict_velocity = evaluate
            go_on.set()
        lab.quiet()


def test_golden_image_is_another(lab: Lab) -> None:
    with lab.fault("ModelopsGoldenImageWrong"):
        lab.near._golden.problem = "golden image: 80 grey levels off"
        try:
            lab.until("ModelopsGoldenImageWrong")
        finally:
            lab.near._golden.problem = None
        lab.quiet()


def test_evaluation_is_overdue(lab: Lab) -> None:
    with lab.fault("ModelopsEvaluationOverdue"):
        lab.near.metrics.cadence.set(1)
        try:
            lab.until("ModelopsEvaluationOverdue")
        finally:
            lab.near.metrics.cadence.set(30 * 86400)
        lab.quiet()


@contextlib.contextmanager
def canary(lab: Lab, **rules: Any) -> Iterator[Any]:
    """The image filter of the twin, which gets half of the requests; it is gone in the end.

    A scrape may be late while this process loads it, which is no fault of the canary's.
    """
    lab.rollout.start_canary("next", CanaryRules(share=0.5, **rules))
    lab.wait(lambda: lab.rollout.canary is not None, "no canary")
    node = lab.rollout.canary
    assert node is not None
    try:
        yield node.image_guard._filter
    finally:
        if lab.rollout.canary is not None:
            lab.rollout.roll_back()
        lab.wait(lambda: not lab.rollout.status()["draining"], "it still drains")


@pytest.mark.parametrize("auto", [False, True])
def test_a_canary_is_worse(lab: Lab, auto: bool) -> None:
    """Its image filter stops every image. A person rolls it back, or nobody has to."""
    with canary(lab, auto=auto) as image_filter, lab.fault("ModelopsCanaryWorse"):
        check = image_filter.check
        image_filter.check = lambda images: [replace(one, blocked=True) for one in check(images)]
        with clients(1, lambda: ask(lab.near_url, pause_s=0.1)):
            lab.until("ModelopsCanaryWorse")
        assert (lab.rollout.canary is None) == auto
        if not auto:
            lab.rollout.roll_back(by="a test")
        lab.quiet()
    ended = [entry["event"] for entry in lab.rollout.status()["events"]]
    assert ended[-2:] == ["rolled_back_worse" if auto else "rolled_back", "drained"]
    assert lab.rollout.stable is lab.near


def test_a_canary_turns_red(lab: Lab) -> None:
    """Its filter raises; the stable release makes what it failed, so no request does."""

    def raises(images: Any) -> Any:
        raise RuntimeError("the weights are gone")

    with canary(lab) as image_filter, lab.fault("ModelopsCanaryFailed"):
        image_filter.check = raises
        lab.until("ModelopsCanaryFailed")
        assert lab.rollout.canary is None
        lab.quiet()


def test_worker_is_killed(lab: Lab) -> None:
    """kill -9 of BentoML's worker; its arbiter starts another one."""

    def workers() -> list[psutil.Process]:
        family = psutil.Process(lab.far.process.pid).children(recursive=True)
        return [one for one in family if "worker.service" in " ".join(one.cmdline())]

    with lab.fault("ModelopsWorkerDied"):
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGKILL)
        lab.until("ModelopsWorkerDied")
        lab.wait(lambda: _ready(lab.far.url), "no new worker")
        assert worker.pid not in {one.pid for one in workers()}
        lab.quiet()


def _ready(url: str) -> bool:
    with contextlib.suppress(OSError):
        return get(f"{url}/readyz")[0] == 200
    return False


def test_somebody_probes_the_prompt_filter(lab: Lab) -> None:
    """By now there are minutes of harmless prompts to compare with."""
    lab.busy |= {"far": False, "near": False}
    try:
        with lab.fault("ModelopsFilterTriggerJump"):
            with clients(1, lambda: ask(lab.near_url, pause_s=0.3, prompt="porn")):
                lab.until("ModelopsFilterTriggerJump")
            lab.busy |= {"far": True, "near": True}
            lab.quiet()
    finally:
        lab.busy |= {"far": True, "near": True}


def test_memory_grows(lab: Lab) -> None:
    """Compared with two hours ago, which are three minutes here."""
    lab.wait(lambda: time.monotonic() - lab.began > 7200 * SCALE + 30, "clock")
    with lab.fault("ModelopsMemoryGrowth"):
        # Not from malloc, which would keep the memory (see tests/conftest.py).
        held = mmap.mmap(-1, psutil.Process().memory_info().rss)
        np.frombuffer(held, np.uint8)[:] = 1
        lab.until("ModelopsMemoryGrowth")
        assert held[-1] == 1
        held.close()
        lab.quiet()


def test_no_node_is_ready(lab: Lab) -> None:
    """One node shuts down, the other one is gone; the last test of this file."""
    with lab.fault("ModelopsWorkerDied", "ModelopsNoReadyNode"):
        stop_server(lab.far.process)
        lab.until("ModelopsWorkerDied")
        assert lab.firing() == {"ModelopsWorkerDied"}
        lab.near.begin_shutdown()
        lab.until("ModelopsNoReadyNode")
