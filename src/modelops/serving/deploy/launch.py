"""Start of a `bentoml serve` process for a release. Imports no torch and no BentoML."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.base.errors import ServingError, UsageError

SERVICE = "modelops.service:ImageGenerator"
DRAIN_S = 60  # seconds that requests in progress may take after SIGTERM
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server started by `start_server`.

    Attributes:
        url: base URL; OpenAI's client takes `url + "/v1"`.
        process: BentoML's arbiter; it leads a process group of its own.
        log: what it printed.
        start_s: seconds from launch to readiness.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    start_s: float


def check_address(host: str, port: int) -> str:
    """Return the host as the numeric address that BentoML wants, if a server can listen there.

    Raises:
        UsageError: the host is not an address of this machine, or the port is out of range.
        ServingError: the port is in use.
    """
    address = "127.0.0.1" if host == "localhost" else host
    try:
        version = ipaddress.ip_address(address).version
    except ValueError as error:
        raise UsageError(
            f"{host}: not an IP address", hint="use 127.0.0.1, or 0.0.0.0 for all interfaces"
        ) from error
    if not 1 <= port <= 65535:
        raise UsageError(f"port {port}: must be 1 to 65535")
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            raise ServingError(
                f"{address}:{port}: {(error.strerror or str(error)).lower()}",
                hint="choose another one with --port, or stop what is listening there",
            ) from error
    return address


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def serve_command(host: str, port: int, *, service: str = SERVICE) -> list[str]:
    """Return the `bentoml serve` command line; `service` may also be the tag of a bento."""
    return [
        sys.executable, "-m", "bentoml", "serve", service,
        "--host", host, "--port", str(port), "--timeout-graceful-shutdown", str(DRAIN_S),
    ]  # fmt: skip


def serve_environment(
    release_dir: str | Path, *, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return this process's environment with the variables that the service reads."""
    return {
        **os.environ,
        "MODELOPS_RELEASE": str(Path(release_dir).resolve()),
        "BENTOML_DO_NOT_TRACK": os.environ.get("BENTOML_DO_NOT_TRACK", "True"),
        **(extra or {}),
    }


def run_server(
    release_dir: str | Path,
    *,
    host: str,
    port: int,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `bentoml serve` in the foreground, hand it SIGTERM and SIGINT, return its exit code.

    Args:
        environment: variables for the server, such as MODELOPS_API_KEYS_FILE.
    """
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Before the process: a signal between the two would leave it behind, holding the port.
    previous = {name: signal.signal(name, hand_on) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(
            serve_command(host, port),
            env=serve_environment(release_dir, extra=environment),
            start_new_session=True,
        )
        for number in early:
            process.send_signal(number)
        code = process.wait()
        # A signal that we passed on is how a server ends; it is not a failure.
        return 0 if code in (-signal.SIGTERM, -signal.SIGINT) else code
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
        if process is not None:
            _kill_group(process)


@contextlib.contextmanager
def start_server(
    release_dir: str | Path,
    port: int | None = None,
    *,
    log_path: str | Path | None = None,
    ready_timeout_s: float = 180.0,
    environment: Mapping[str, str] | None = None,
    service: str = SERVICE,
    on_progress: Callable[[str], Any] | None = None,
) -> Iterator[RunningServer]:
    """Serve a release on loopback until the block ends; yields when /readyz is green.

    Args:
        port: a free one when not given.
        log_path: where the server's output goes; a temporary file when not given.
        ready_timeout_s: seconds to wait for readiness.
        environment: variables for the server, such as MODELOPS_QUEUE_LIMIT.
        service: a bento's tag, in the BENTOML_HOME of `environment`.
        on_progress: called with one line about what is being waited for.

    Raises:
        ServingError: the port is in use, or the server ended or did not become ready; the message
            holds the end of its log.
    """
    port = port or free_port()
    host = check_address("127.0.0.1", port)
    url = f"http://{host}:{port}"
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelops-bentoml-"))
        log = Path(log_path) if log_path else Path(home) / "server.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # Two servers that share BENTOML_HOME delete each other's files.
        extra = {"BENTOML_HOME": home, **(environment or {})}
        output = stack.enter_context(log.open("wb"))
        began = time.monotonic()
        process = subprocess.Popen(
            serve_command(host, port, service=service),
            env=serve_environment(release_dir, extra=extra),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, cwd=home,
        )  # fmt: skip
        stack.callback(stop_server, process)
        if on_progress:
            on_progress(f"waiting for {url}/readyz")
        _wait_until_ready(url, process, log, ready_timeout_s)
        yield RunningServer(url=url, process=process, log=log, start_s=time.monotonic() - began)


def stop_server(process: subprocess.Popen[bytes], *, timeout_s: float = DRAIN_S) -> int | None:
    """Send SIGTERM, wait for requests in progress, then kill the rest of the process group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    _kill_group(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    return process.returncode


def _wait_until_ready(
    url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServingError(f"the server ended with code {process.returncode}: {_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as error:
            last = f"/readyz answered {error.code}"
        except (OSError, http.client.HTTPException) as error:
            last = str(error)
        time.sleep(_POLL_S)
    raise ServingError(f"{url} not ready after {timeout_s:.0f} s ({last}): {_tail(log)}")


def _tail(log: Path, characters: int = 600) -> str:
    text = log.read_text("utf-8", "replace").strip()
    return " | ".join(text[-characters:].splitlines()) or "it printed nothing"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # start_new_session made the process the leader of its own group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
