"""The whole command killed with its workers and run again, and under `accelerate launch`: the same
images to the byte, and the same numbers in the record."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelops.base.files import sha256_file
from record_numbers import numbers

pytestmark = pytest.mark.slow
IMAGES = 20


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def arguments(checkpoint: Path, corpus: Any, *, steps: int, out: Path) -> list[str]:
    return [
        "eval", str(checkpoint), "--manifest", str(corpus.manifest), "--splits",
        str(corpus.splits), "--lit", str(corpus.lit), "-n", str(IMAGES), "--replicates", "2",
        "--steps", str(steps), "--resamples", "200", "--batch-size", "1", "--no-report",
        "--out", str(out),
    ]  # fmt: skip


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def images(record: Path) -> dict[str, str]:
    found = (record.with_suffix("") / "samples").rglob("*.png")
    return {path.name: sha256_file(path) for path in found}


@pytest.fixture(scope="module")
def undisturbed(
    tiny_checkpoint: Path, corpus: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The record of a run in one process that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "record.json"
    module = [sys.executable, "-m", "modelops.cli.main"]
    run([*module, *arguments(tiny_checkpoint, corpus, steps=20, out=out)])
    return out


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_group_killed_midway_and_resumed_gives_the_same_record(
    undisturbed: Path, tiny_checkpoint: Path, corpus: Any, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "record.json"
    command = [
        sys.executable, "-m", "modelops.cli.main",
        *arguments(tiny_checkpoint, corpus, steps=20, out=out), "--processes", str(processes),
    ]  # fmt: skip
    interrupted = 0
    for wanted in (1, 8):  # images that are there when the kill comes: twice, to resume a resume
        child = subprocess.Popen(
            command, env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        limit = time.monotonic() + 300
        while len(images(out)) < wanted and child.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        interrupted += wanted <= len(images(out)) < IMAGES
    assert interrupted == 2 and not out.exists()
    run(command)
    assert images(out) == images(undisturbed) and len(images(out)) == IMAGES
    assert numbers(out) == numbers(undisturbed)
    assert not list(tmp_path.rglob(".*.modelops-tmp"))


# The command, and a note of which process wrote which image.
_WITNESS = """
import os, sys
from pathlib import Path
from modelops.cli.main import main
from modelops.evaluation.workers import making
write = making.write_bytes
def witness(path, data):
    write(path, data)
    if path.suffix == ".png":
        Path(__file__).with_name("rank-" + os.environ["RANK"]).joinpath(path.name).touch()
making.write_bytes = witness
sys.exit(main(sys.argv[1:]))
"""


def test_accelerate_launch_merges_to_the_same_record(
    undisturbed: Path, tiny_checkpoint: Path, corpus: Any, tmp_path: Path
) -> None:
    """Each of two processes makes half of the images, and the first of them the record.

    accelerate starts one process only with --cpu, however many are asked for; with --multi_gpu it
    starts them all, and without --device they run on the CPU.
    """
    script, out = tmp_path / "witness.py", tmp_path / "record.json"
    script.write_text(_WITNESS, "utf-8")
    ranks = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
    for folder in ranks:
        folder.mkdir()
    launcher = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0", str(script),
    ]  # fmt: skip
    run([*launcher, *arguments(tiny_checkpoint, corpus, steps=20, out=out)])
    made = [{path.name for path in folder.iterdir()} for folder in ranks]
    assert [len(names) for names in made] == [IMAGES // 2, IMAGES // 2]
    assert made[0] | made[1] == set(images(out))
    assert images(out) == images(undisturbed)
    assert numbers(out) == numbers(undisturbed)
