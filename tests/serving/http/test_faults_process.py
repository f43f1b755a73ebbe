"""Real `bentoml serve` processes: crowds, kill -9, SIGTERM, full disks, changed files, pairs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from disks import fill
from disks import small_disk as mount_small
from modelops.serving.deploy.check import get
from modelops.serving.deploy.launch import (
    DRAIN_S,
    RunningServer,
    free_port,
    serve_command,
    serve_environment,
    start_server,
)

PATH = "/v1/images/generations"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: 127.1\r\nContent-Type: application/json\r\n".encode()
FAST = {"OMP_NUM_THREADS": "1", "MODELOPS_PROFILE_S": "0"}


def ask(url: str, **fields: Any) -> str:
    """`whole` for a 200 with whole images, an error's code, or `cut` without an answer.

    Anything else, such as half an answer, fails.
    """
    body = json.dumps({"prompt": "sun", "steps": 2, **fields}).encode()
    request = urllib.request.Request(url + PATH, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        code: str = json.loads(error.read())["error"]["code"]
        return code
    except OSError:
        return "cut"
    for picture in json.loads(content)["data"]:
        with Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))) as image:
            image.load()
    return "whole"


def metric(url: str, name: str) -> float:
    for line in get(f"{url}/metrics")[1].splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("did not happen")


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def worker_of(server: RunningServer) -> psutil.Process:
    (worker,) = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if any("worker.service" in word for word in child.cmdline())
    ]
    return worker


@contextlib.contextmanager
def load(url: str, callers: int, **fields: Any) -> Iterator[Counter[str]]:
    """Clients that ask again and again; what came of it."""
    outcomes: Counter[str] = Counter()
    problems: list[BaseException] = []
    over = threading.Event()

    def call() -> None:
        while not over.is_set():
            try:
                outcome = ask(url, **fields)
            except BaseException as error:
                problems.append(error)
                return
            outcomes[outcome] += 1
            if outcome == "cut":
                time.sleep(0.1)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        over.set()
        for thread in threads:
            thread.join(130)
    assert not problems, problems[0]


def leftovers(folder: Path) -> dict[str, list[str]]:
    """What lies in a server's folder for temporary files, and in it."""
    return {
        path.name: [inner.name for inner in path.iterdir()] if path.is_dir() else ["a file"]
        for path in folder.iterdir()
        if path.name != ".ses"  # onnxruntime writes this one file when imported
    }


# --- crowds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    environment = {**FAST, "MODELOPS_CLIENT_TIMEOUT_S": "4"}
    log = tmp_path_factory.mktemp("server") / "server.log"
    with start_server(tiny_release, log_path=log, environment=environment) as running:
        yield running
    assert "Traceback" not in log.read_text(), "something failed that should not have"


def raw(server: RunningServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":")[-1])), 60) as caller:
        with contextlib.suppress(OSError):  # it may answer and close before it has all
            caller.sendall(data)
        answer, missing = b"", 1
        while missing > 0 and (piece := caller.recv(65536)):
            answer += piece
            head, _, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            missing = int(length[1]) - len(body) if length else 1
        return answer


def test_what_bentoml_passes_on_is_refused_in_openais_shape(server: RunningServer) -> None:
    end = b" HTTP/1.1\r\nHost: 127.1\r\n\r\n"
    for data, status, code in (
        (b"GET http://elsewhere.example/v1/models" + end, b"404", b"not_found"),
        (b"OPTIONS *" + end, b"404", b"not_found"),
        (b"CONNECT elsewhere.example:443" + end, b"404", b"not_found"),
        (b"PUT /v1/models" + end, b"405", b"method_not_allowed"),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400",
         b"ambiguous_length"),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n" + b"x" * 2**21, b"413",
         b"body_too_large"),
        (HEAD + b"Content-Length: 5\r\n\r\n{", b"408", b"body_timeout"),
    ):  # fmt: skip
        answer = raw(server, data)
        assert answer.split()[1] == status and code in answer, data[:60]
    websocket = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    answer = raw(server, b"GET /v1/models HTTP/1.1\r\nHost: 127.1\r\n" + websocket + key)
    assert answer.split()[1] in (b"403", b"200", b"404"), "no websockets here"
    assert metric(server.url, 'modelops_errors_total{code="internal_error"}') == 0


def test_a_thousand_connections_keep_nobody_out_and_are_closed(server: RunningServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2_000:
        if hard not in (resource.RLIM_INFINITY,) and hard < 2_000:
            pytest.skip(f"this machine lets a process open {hard} files only")
        resource.setrlimit(resource.RLIMIT_NOFILE, (2_000, hard))
    port = int(server.url.rsplit(":")[-1])
    worker = worker_of(server)
    before = worker.num_fds(), worker.num_threads()
    states = (b"", HEAD[:40], HEAD + b"Content-Length: 500\r\n\r\n{",
              b"GET /livez HTTP/1.1\r\nHost: 127.1\r\n\r\nGET /")  # fmt: skip
    with contextlib.ExitStack() as stack:
        callers = []
        for index in range(1_000):
            caller = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
            caller.sendall(states[index % 4])
            callers.append(caller)
        assert [ask(server.url) for _ in range(3)] == ["whole"] * 3
        assert is_ready(server.url)

        def ended(caller: socket.socket) -> bool:
            with contextlib.suppress(ConnectionError):
                while caller.recv(65536):
                    pass
            return True

        assert all(ended(caller) for caller in callers), "each is closed by the server"
    until(lambda: worker.num_fds() <= before[0] + 5)
    assert worker.num_threads() <= before[1] + 8  # asyncio's pool, up to its bound
    # 750 of them, but uvicorn's own keep-alive clock may be first with one that was answered.
    assert metric(server.url, 'modelops_connections_closed_total{reason="head"}') >= 700
    assert ask(server.url) == "whole"


# --- deaths ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_killed_under_load_comes_back_and_leaves_nothing(
    tiny_release: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**FAST, "TMPDIR": str(temporary), "MODELOPS_RECEIPTS": str(tmp_path / "kept")}
    shared = set(Path("/dev/shm").iterdir())
    port = free_port()
    with start_server(tiny_release, port, environment=environment) as server:
        with load(server.url, 6, steps=20) as outcomes:
            for kill in range(2):
                until(lambda n=kill: outcomes["whole"] >= 6 * (n + 1))  # type: ignore[misc]
                worker = worker_of(server)
                worker.kill()
                until(lambda w=worker: not w.is_running())  # type: ignore[misc]
                before = outcomes["whole"]
                assert not is_ready(server.url), "red while there is no worker"
                until(lambda: is_ready(server.url))
                until(lambda b=before: outcomes["whole"] >= b + 6)  # type: ignore[misc]
                assert worker_of(server).pid != worker.pid
        assert set(outcomes) <= {"whole", "cut", "not_ready"}, outcomes
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert not [child for child in children if child.status() == psutil.STATUS_ZOMBIE]
        assert ask(server.url) == "whole"
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
    assert not any(leftovers(temporary).values()), "nothing but BentoML's own empty folders"
    assert set(Path("/dev/shm").iterdir()) <= shared
    for line in (line for path in (tmp_path / "kept").glob("receipts-*") for line in path.open()):
        assert json.loads(line)["kind"] == "receipt"
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_was_let_in(tiny_release: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**FAST, "TMPDIR": str(temporary)}
    with start_server(tiny_release, environment=environment) as server:
        outcomes: list[str] = []
        callers = [
            threading.Thread(target=lambda: outcomes.append(ask(server.url, steps=200)))
            for _ in range(8)
        ]
        for caller in callers:
            caller.start()
        # Idle ones and slow ones must not hold up the end either.
        port = int(server.url.rsplit(":")[-1])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in idle[10:]:
            connection.sendall(HEAD[:50])
        until(lambda: metric(server.url, "modelops_running_requests")
              + metric(server.url, "modelops_queue_depth") >= 8)  # fmt: skip
        began = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        until(lambda: not is_ready(server.url), 10)
        assert ask(server.url) in ("cut", "not_ready"), "new ones are refused"
        for caller in callers:
            caller.join(120)
        assert outcomes == ["whole"] * 8
        assert server.process.wait(DRAIN_S) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < DRAIN_S
        for connection in idle:
            connection.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
    assert leftovers(temporary) == {}


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KB."""
    with mount_small(tmp_path / "disk") as place:
        yield place


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["send", "refuse"])
def test_a_full_disk_is_answered_as_the_setting_says(
    tiny_release: Path, small_disk: Path, setting: str
) -> None:
    environment = {
        **FAST,
        "MODELOPS_RECEIPTS": str(small_disk / "receipts"),
        "MODELOPS_RECEIPTS_FAILURE": setting,
        "MODELOPS_LOG_FILE": str(small_disk / "node.log"),
    }
    with start_server(tiny_release, environment=environment) as server:
        assert ask(server.url) == "whole"
        ballast = fill(small_disk)
        wanted = "whole" if setting == "send" else "receipt_unavailable"
        until(lambda: ask(server.url) == wanted)  # a file's last page may have had some room
        failed = 'modelops_receipts_total{result="failed"}'
        for name in ("modelops_log_lines_lost_total", failed):
            until(lambda n=name: ask(server.url) == wanted and metric(server.url, n) >= 3)  # type: ignore[misc]
        assert metric(server.url, 'modelops_errors_total{code="internal_error"}') == 0
        assert is_ready(server.url)
        ballast.unlink()
        until(lambda: ask(server.url) == "whole")

        def whole_again() -> bool:
            """A line that the full disk cut stays so; what is logged next begins a new one."""
            with contextlib.suppress(ValueError):
                return bool(json.loads((small_disk / "node.log").read_text().splitlines()[-1]))
            return False

        until(whole_again)


# --- files that change ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_release_that_changes_under_a_node_is_not_opened_again(
    tiny_release: Path, tmp_path: Path
) -> None:
    """What is in memory was verified, and goes on; a new worker verifies, and refuses."""
    copy = shutil.copytree(tiny_release, tmp_path / "release")
    log = tmp_path / "server.log"
    with start_server(copy, log_path=log, environment=FAST) as server:
        weights = max(copy.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        weights.chmod(0o644)
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        assert ask(server.url) == "whole" and is_ready(server.url)
        worker_of(server).kill()
        until(lambda: re.search(rf"{weights.name}.*(changed|digest)", log.read_text()) is not None)
        assert not is_ready(server.url)
        with contextlib.suppress(urllib.error.HTTPError), contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/v1/models", timeout=5)
            raise AssertionError("it answers from a release that was changed")


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["MODELOPS_SIGNING_KEY", "MODELOPS_API_KEYS_FILE"])
def test_what_is_wrong_at_the_start_is_one_line(
    tiny_release: Path, tmp_path: Path, variable: str
) -> None:
    """One is read before BentoML starts a worker, the other where it imports the service; the rest
    of what is refused there is deploy/test_start's."""
    broken = tmp_path / "broken"
    broken.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    extra = {"BENTOML_HOME": str(tmp_path), variable: str(broken)}
    environment = serve_environment(tiny_release, extra=extra)
    ended = subprocess.run(
        serve_command("127.0.0.1", free_port()),
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ended.stderr and "AAAA" not in ended.stderr, line


# --- two at once ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_servers_on_one_machine(tiny_release: Path, tmp_path: Path) -> None:
    """As two shells would start them: the same release, home, temporary and receipts' folders."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **FAST,
        "BENTOML_HOME": str(home),
        "TMPDIR": str(home),
        "MODELOPS_RECEIPTS": str(tmp_path / "receipts"),
    }
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(start_server(tiny_release, environment=environment))
        with start_server(tiny_release, environment=environment) as other:
            assert [ask(one.url) for _ in range(3)] == ["whole"] * 3
            assert ask(other.url) == "whole"
            images = 'modelops_images_total{output_format="png"}'
            assert (metric(one.url, images), metric(other.url, images)) == (3, 1)
            workers = psutil.Process(other.process.pid).children(recursive=True)
            os.killpg(other.process.pid, signal.SIGKILL)
            other.process.wait(30)
            # Workers lead groups of their own; left behind, they would hold the port.
            assert psutil.wait_procs(workers, timeout=60)[1] == []
        assert ask(one.url) == "whole" and is_ready(one.url)
        assert metric(one.url, images) == 4
        with start_server(tiny_release, environment=environment) as third:
            assert ask(third.url) == "whole" and ask(one.url) == "whole"
        assert ask(one.url) == "whole", "one that ends as it should takes nothing along"
    kept = [json.loads(line)["id"] for path in (tmp_path / "receipts").glob("receipts-*")
            for line in path.open()]  # fmt: skip
    assert len(kept) == len(set(kept)) == 8
