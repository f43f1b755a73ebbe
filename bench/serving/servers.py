"""Each server in a process of its own, by the real `bentoml serve`, one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from modelops.serving.deploy.launch import (
    free_port,
    serve_environment,
    start_server,
    stop_server,
)
from serving import pass_all
from serving.mix import Wanted

BENCH = Path(__file__).resolve().parents[1]
NODE, ONE_BY_ONE = "node", "stock one by one"
BATCHING = {way: f"stock batching, {way}" for way in ("longest", "groups", "dropped")}
SERVERS = (NODE, ONE_BY_ONE, *BATCHING.values())
READY_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What is served: the release, and the checkpoint its artifact was made of."""

    release: Path
    checkpoint: Path
    model: str  # the release's model, a path in it

    @property
    def artifact(self) -> Path:
        return self.release / self.model


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that is ready."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    start_s: float
    log: Path

    @property
    def generate(self) -> str:
        """Where images are asked for."""
        return self.url + ("/v1/images/generations" if self.name == NODE else "/generate")

    def body(self, wanted: Wanted, **more: object) -> str:
        """The request's JSON for this server."""
        fields = {**wanted.fields, **more}
        return json.dumps({"requests": [fields]} if self.name in BATCHING.values() else fields)

    def tree(self) -> list[psutil.Process]:
        """Its processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def batch_rows(self) -> tuple[float, float]:
        """(rows, forward passes) so far, by the node's own metrics; zeros elsewhere."""
        if self.name != NODE:
            return 0.0, 0.0
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        rows, passes = (found.get(f"modelops_batch_rows_{end}", 0) for end in ("sum", "count"))
        return float(rows), float(passes)

    def rss_mb(self) -> float:
        """Resident megabytes of all its processes."""
        return sum(_of(process, lambda p: p.memory_info().rss) for process in self.tree()) / 1e6

    def cpu_s(self) -> float:
        """Processor seconds of all its processes so far."""
        return sum(_of(process, lambda p: sum(p.cpu_times()[:2])) for process in self.tree())


def _of(process: psutil.Process, read: Callable[[psutil.Process], float]) -> float:
    with contextlib.suppress(psutil.Error):
        return float(read(process))
    return 0.0


@contextlib.contextmanager
def serve(
    name: str, paths: Paths, *, filtered: bool = True, extra: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, yield it when it is ready, end it.

    Args:
        filtered: with the image filter. The node without it takes a filter of the bench's own that
            passes everything; its C2PA manifests and receipts stay.
        extra: more environment variables.
    """
    with tempfile.TemporaryDirectory(prefix="serving-bench-") as folder:
        environment = {"PYTHONPATH": os.pathsep.join([str(BENCH), folder]), **(extra or {})}
        if name == NODE:
            if not filtered:
                pass_all.register(Path(folder))
                environment["MODELOPS_IMAGE_FILTER"] = pass_all.NAME
            with (
                _nobody_left() as family,
                start_server(paths.release, environment=environment) as running,
            ):
                server = Server(name=name, url=running.url, process=running.process,
                                start_s=running.start_s, log=running.log)  # fmt: skip
                try:
                    yield server
                finally:
                    family.extend(server.tree())
            return
        way = next((way for way, label in BATCHING.items() if label == name), "")
        environment |= {
            "BENCH_CHECKPOINT": str(paths.checkpoint), "BENCH_ARTIFACT": str(paths.artifact),
            "BENCH_FILTER": str(int(filtered)), "BENCH_WAY": way, "BENTOML_HOME": folder,
        }  # fmt: skip
        service = f"serving.stock:{'Batching' if way else 'OneByOne'}"
        full = serve_environment(paths.release, extra=environment)
        with _nobody_left() as family, _bentoml(name, service, full, folder) as server:
            try:
                yield server
            finally:
                family.extend(server.tree())


@contextlib.contextmanager
def _nobody_left() -> Iterator[list[psutil.Process]]:
    """End what is still alive of the listed processes: BentoML's workers lead sessions of their
    own, and one that is busy outlives a parent that was killed, on the next server's cores."""
    family: list[psutil.Process] = []
    try:
        yield family
    finally:
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil looks at the start time too: never another's process
        psutil.wait_procs(family, timeout=10)


@contextlib.contextmanager
def _bentoml(name: str, service: str, environment: dict[str, str], folder: str) -> Iterator[Server]:
    port, log = free_port(), Path(folder) / "server.log"
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    command = [sys.executable, "-m", "bentoml", "serve", service,
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        while not _ready(url):
            if process.poll() is not None or time.monotonic() - began > READY_S:
                raise SystemExit(f"{service} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield Server(name=name, url=url, process=process, log=log,
                     start_s=time.monotonic() - began)  # fmt: skip
    finally:
        stop_server(process, timeout_s=5)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
