"""One process or several, any batch size, killed or not: the same images, to the byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hostile_service import serve
from modelops.base.errors import ProcessDiedError, UsageError
from modelops.base.files import sha256_file
from modelops.evaluation.prompts import PromptSet, plan_images
from modelops.evaluation.samples import Samples, draw_samples
from modelops.evaluation.sources.endpoint import EndpointSource
from modelops.evaluation.sources.open import open_source
from modelops.evaluation.workers.open import open_with_workers
from modelops.evaluation.workers.pool import WorkerPool
from modelops.evaluation.workers.ranks import launched_ranks
from modelops.evaluation.workers.tasks import Workers
from modelops.evaluation.workers.threads import threads_of
from modelops.models.request import ImageRequest
from modelops.models.sources import ModelSource

REQUEST = ImageRequest(prompt="", seed=0, steps=2, guidance=3.0, height=32, width=32)
PROMPTS = PromptSet(("red heart", "dog face", "house", "grinning face", "apple"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.rglob("*.png")}


def draw(source: Any, folder: Path, n: int = 9, workers: Workers | None = None) -> Samples:
    plan = plan_images(PROMPTS, n=n, replicates=1, seed=3)
    return draw_samples(source, plan, REQUEST, folder, workers=workers)


def shared(checkpoint: Path, processes: int) -> tuple[ModelSource, Any]:
    opening = {"uri": str(checkpoint), "batch_size": 1, "device": "cpu", "runtime": "auto"}
    source, workers = open_with_workers(opening, processes)
    assert workers is not None
    return source, workers


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Nine images of one process."""
    folder = tmp_path_factory.mktemp("alone")
    draw(open_source(str(tiny_checkpoint), batch_size=16), folder)
    return digests(folder)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
def test_batch_size_does_not_change_a_byte(
    alone: dict[str, str], tiny_checkpoint: Path, tmp_path: Path, batch_size: int
) -> None:
    source: Any = open_source(str(tiny_checkpoint), batch_size=batch_size)
    draw(source, tmp_path)
    assert digests(tmp_path) == alone
    assert source.batch_size == batch_size


def test_two_processes_make_the_same_images_and_each_makes_its_share(
    alone: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source, workers = shared(tiny_checkpoint, 2)
    samples = draw(source, tmp_path, workers=workers)
    assert digests(tmp_path) == alone
    assert samples.made == list(range(9)) and not samples.failures


def test_a_worker_that_is_killed_gives_one_line_and_the_next_run_goes_on(
    alone: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source, workers = shared(tiny_checkpoint, 2)

    def kill() -> None:
        while not workers._running:
            pass
        os.kill(workers._running[1]._child.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ProcessDiedError, match=r"process 2 of 2 was killed by SIGKILL after \d of"):
        draw(source, tmp_path, workers=workers)
    assert len(digests(tmp_path)) < 9
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    draw(open_source(str(tiny_checkpoint), batch_size=4), tmp_path)
    assert digests(tmp_path) == alone
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_worker_that_cannot_open_the_source_says_why(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    inner = open_source(str(tiny_checkpoint), batch_size=1)
    missing = {"uri": str(tmp_path / "gone"), "batch_size": 1, "device": "cpu"}
    with pytest.raises(ProcessDiedError, match=r"process 2 of 2 ended with 2 .*no such directory"):
        draw(inner, tmp_path / "samples", n=2, workers=WorkerPool(2, missing))


_COMMAND = ["--prompts", "prompts.txt", "-n", "6", "--steps", "2", "--safety", "none"]


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_worker_and_goes_on(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """SIGKILL for the whole command in the middle; then the ranks of a launcher finish the job."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS.prompts) + "\n", "utf-8")
    module = ["-m", "modelops.cli.main", "eval", str(tiny_checkpoint), *_COMMAND]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=tmp_path, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    assert run(*module, "--out", "whole.json").wait() == 0
    killed = run(*module, "--steps", "40", "--processes", "2", "--out", "parts.json")
    while not digests(tmp_path / "parts" / "samples") and killed.poll() is None:
        pass
    killed.kill()
    killed.wait()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    for out, steps in (("parts.json", "40"), ("ranks.json", "2")):
        command = [*launcher, *module[1:], "--steps", steps, "--out", out]
        assert run(*command).wait() == 0
        assert (tmp_path / out).is_file()
    assert digests(tmp_path / "ranks" / "samples") == digests(tmp_path / "whole" / "samples")
    assert len(digests(tmp_path / "parts" / "samples")) == 6
    assert not list((tmp_path / "parts").rglob(".*.modelops-tmp"))


def test_endpoints_are_not_divided_and_launchers_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as service, pytest.raises(UsageError, match="endpoint is not divided"):
        open_with_workers({"uri": service.url, "device": "cpu"}, 2)
    assert launched_ranks({}) is None
    assert launched_ranks({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}) is None
    several = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
    assert launched_ranks(several) == (3, 4, 1)
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    opening = {"uri": str(tmp_path), "batch_size": 1, "device": "cpu", "runtime": "auto"}
    with pytest.raises(UsageError, match="within a launcher's 4 processes"):
        open_with_workers(opening, 2)


def test_threads_are_divided_and_never_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_of(1) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_of(10_000) == 1


def test_an_image_that_was_replaced_is_made_again(
    alone: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = open_source(str(tiny_checkpoint), batch_size=4)
    assert draw(source, tmp_path).reused == 0
    assert draw(source, tmp_path).reused == 9
    first, second = sorted(tmp_path.rglob("*.png"))[:2]
    first.write_bytes(second.read_bytes())  # a whole image, of another prompt
    assert draw(source, tmp_path).reused == 8
    assert digests(tmp_path) == alone
    for log in tmp_path.rglob("made-*.jsonl"):  # images that nobody says were made here
        log.unlink()
    assert draw(source, tmp_path).reused == 0
    assert digests(tmp_path) == alone


def test_another_url_of_the_same_release_is_asked(tmp_path: Path) -> None:
    """A record of production must not be made of what staging drew."""
    with serve() as staging, serve() as production:  # both name one release
        for service in (staging, production):
            source = EndpointSource(service.url)
            assert source.info.sha256
            samples = draw(source, tmp_path, n=3)
            assert (samples.reused, len(samples.made), len(service.bodies)) == (0, 3, 3)
        assert draw(EndpointSource(production.url), tmp_path, n=3).reused == 3
