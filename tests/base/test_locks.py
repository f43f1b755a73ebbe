"""One process at a time writes an output; the kernel gives the lock of a killed one back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelops.base.errors import InUseError, ModelopsError
from modelops.base.locks import output_lock

HOLD = """
import sys
from modelops.base.locks import output_lock
with output_lock(sys.argv[1], inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path, where: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), where],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_the_second_process_is_told_who_is_at_work(tmp_path: Path, where: str) -> None:
    target, inside = tmp_path / "out", where == "inside"
    with holder(target, where) as first:
        for spelling in (target, tmp_path / "." / "out" / ".." / "out"):
            with (
                pytest.raises(InUseError, match=f"in use by process {first.pid} ") as caught,
                output_lock(spelling, inside=inside),
            ):
                raise AssertionError
        assert caught.value.exit_code == 1
        first.send_signal(signal.SIGKILL)
        first.wait()
    with output_lock(target, inside=inside):
        with (
            pytest.raises(InUseError, match=f"process {os.getpid()} "),
            output_lock(target, inside=inside),
        ):
            raise AssertionError
        with output_lock(tmp_path / "other", inside=inside):
            pass
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [], "a lock leaves nothing behind"


def test_a_second_process_may_wait(tmp_path: Path) -> None:
    with holder(tmp_path, "inside") as first:
        assert first.stdin is not None
        said: list[str] = []

        def on_wait() -> None:
            said.append("waiting")
            first.stdin.close()  # the first one ends

        with output_lock(tmp_path, inside=True, wait_s=60, on_wait=on_wait):
            assert said == ["waiting"]


def test_an_output_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelopsError, match="cannot write"), output_lock(tmp_path / "file" / "out"):
        raise AssertionError
