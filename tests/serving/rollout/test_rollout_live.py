"""A swap in `modelops serve run` under BentoML, with OpenAI's client asking during all of it."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from modelops.base.errors import ServingError
from modelops.base.files import sha256_bytes, sha256_file
from modelops.cli.main import main
from modelops.releases.verify import RECORD_FILE
from modelops.serving.deploy.check import get
from modelops.serving.deploy.launch import free_port, stop_server
from modelops.serving.http.keys import create_key
from modelops.serving.provenance.receipts import utc_now, verify_receipt
from modelops.serving.provenance.signing import VerifyingKey, load_verifying_key
from modelops.serving.rollout.active_release import (
    ActiveRelease,
    read_active_release,
    write_active_release,
)
from rollouts import Caller, build_releases, second_checkpoint
from waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def releases(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Two releases with different weights; "stable" is the one that stands."""
    folder = tmp_path / "releases"
    other = second_checkpoint(tiny_checkpoint, tmp_path / "checkpoint")
    build_releases(folder, tiny_checkpoint, other, names=("stable", "next"))
    write_active_release(folder, ActiveRelease(
        release="stable", name="tiny", version="0.1", promoted=utc_now(), by="a test",
        sha256=sha256_file(folder / "stable" / RECORD_FILE),
    ))  # fmt: skip
    return folder


@contextlib.contextmanager
def run_command(releases: Path, keys: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """(base URL, process id) of `modelops serve run RELEASES --releases RELEASES`, ready."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable, "-m", "modelops.cli.main", "serve", "run", str(releases),
        "--releases", str(releases), "--keys", str(keys), "--port", str(port),
    ]  # fmt: skip
    environment = {
        **os.environ, "BENTOML_HOME": str(folder / "bentoml"), "OMP_NUM_THREADS": "1",
        "MODELOPS_CACHE": str(folder / "cache"), "MODELOPS_PROFILE_S": "0",
    }  # fmt: skip
    environment.pop("MODELOPS_RELEASE", None)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:

            def up() -> bool:
                assert process.poll() is None, log.read_text()
                return ready(url)

            wait_until(up)
            yield url, process.pid
        finally:
            code = stop_server(process)
    assert code == 0, log.read_text()


def ready(url: str) -> bool:
    with contextlib.suppress(ServingError):
        return get(f"{url}/readyz")[0] == 200
    return False


@dataclass
class Clients:
    """OpenAI's client in several threads, each asking as soon as it is answered, without retries.

    `answers` holds (order of asking, stable or canary by the moment, base64 of the file, receipt).
    """

    url: str
    key: str
    moment: str = "stable"
    asked: int = 0
    answers: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        ended, lock = threading.Event(), threading.Lock()

        def ask(stream: bool) -> None:
            client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)
            while not ended.is_set():
                with lock:
                    self.asked += 1
                moment = self.moment
                try:
                    made = picture(client, stream)
                except Exception as error:
                    self.errors.append(error)
                else:
                    self.answers.append((moment, *made))

        threads = [threading.Thread(target=ask, args=(n == 0,), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join(60)

    def more(self, count: int) -> None:
        """Wait until so many more were answered."""
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal or bool(self.errors))


def picture(client: openai.OpenAI, stream: bool) -> tuple[str, dict[str, Any]]:
    """(base64 of the file, its receipt)."""
    extra = {"steps": 4, "guidance": 2.0}
    if not stream:
        image: Any = client.images.generate(prompt="a red heart", extra_body=extra).data
        return image[0].b64_json, image[0].x_modelops
    events: list[Any] = list(
        client.images.generate(
            prompt="a red heart", stream=True, partial_images=1, extra_body=extra
        )
    )
    assert events[-1].type == "image_generation.completed"
    return events[-1].b64_json, events[-1].x_modelops


def check(file: str, receipt: dict[str, Any], key: VerifyingKey) -> str:
    """The version that an image names: by its signed receipt and by its own metadata."""
    verified = verify_receipt(receipt, key)
    data = base64.b64decode(file)
    assert sha256_bytes(data) == verified.output_sha256
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["release"] == f"{verified.release.name} {verified.release.version}"
        assert image.info["release_sha256"] == verified.release.sha256
    return verified.release.version


def test_a_swap_under_bentoml_loses_no_request(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.json"
    admin, user = create_key(keys, "ops", admin=True), create_key(keys, "alice")
    monkeypatch.setenv("MODELOPS_ADMIN_KEY", admin)
    with run_command(releases, keys, tmp_path) as (url, process):
        caller, clients = Caller(url, admin, user), Clients(url, user)
        with clients.running():
            clients.more(6)
            order = {
                "release": "next", "share": 0.5, "requests": 20, "seconds": 4.0, "block_s": 0.25,
                "error_margin": 0.5, "filter_margin": 0.5, "latency_margin": 100.0,
            }  # fmt: skip
            clients.moment = "loading"
            assert caller.swap("canary", order)[0] == 202
            wait_until(lambda: caller.swap()[1]["canary"] is not None)
            clients.moment = "canary"
            certificates = {
                entry["x_modelops"]["version"]: entry["x_modelops"]["signing"]["certificates"]
                for entry in caller.post("/v1/models")[1]["data"]
            }
            assert set(certificates) == {"0.1", "0.2"}
            wait_until(lambda: main(["serve", "swap", "status", url]) == 0)  # it is no worse
            clients.moment = "promoting"
            assert main(["serve", "swap", "promote", url, "--wait"]) == 0
            clients.moment = "promoted"
            clients.more(12)
        status = caller.swap()[1]
        assert (status["stable"]["release"], status["after_restart"]) == ("tiny@0.2", "tiny@0.2")
        standing = read_active_release(releases)
        assert standing is not None and standing.release == "next" and standing.by == "ops"

        # A worker that is killed comes back with what was promoted.
        family = psutil.Process(process).children(recursive=True)
        (worker,) = [one for one in family if "worker.service" in " ".join(one.cmdline())]
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(30)
        wait_until(lambda: ready(url))
        assert caller.swap()[1]["stable"]["release"] == "tiny@0.2"

    assert not clients.errors and len(clients.answers) == clients.asked  # none was lost
    chain = tmp_path / "chain.pem"
    made: dict[str, set[str]] = {}
    for moment, file, receipt in clients.answers:
        chain.write_text(certificates[receipt["release"]["version"]])
        made.setdefault(moment, set()).add(check(file, receipt, load_verifying_key(chain)))
    assert made["stable"] == {"0.1"}
    assert made["canary"] == {"0.1", "0.2"}
    assert made["promoted"] == {"0.2"}
