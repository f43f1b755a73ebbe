"""A log file is bounded, no process loses a line to a rotation, and logrotate is followed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelops.base.errors import UsageError
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.logs import LineWriter, configure_logging
from modelops.serving.telemetry.rotation import RotatingFile

WRITER = """
import sys, os
from modelops.serving.telemetry.rotation import RotatingFile
file = RotatingFile(sys.argv[1], max_bytes=8192, keep=1000)
for number in range(1500):
    line = f"{sys.argv[2]} {number} {'x' * 40}\\n".encode()
    os.write(file.descriptor(len(line)), line)
"""


def all_lines(path: Path) -> list[str]:
    files = path.parent.glob(f"{path.name}*")
    return [line for file in files for line in file.read_text().splitlines()]


def write(file: RotatingFile, text: str) -> None:
    data = text.encode() + b"\n"
    os.write(file.descriptor(len(data)), data)


def test_four_processes_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(name)]) for name in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    expected = sorted(f"{name} {number} {'x' * 40}" for name in range(4) for number in range(1500))
    assert sorted(all_lines(path)) == expected
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) > 20 and max(sizes) <= 8192 + 4 * 64


def test_files_stay_within_their_bound(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatingFile(path, max_bytes=1000, keep=2)
    for number in range(500):
        write(file, f"{number:049}")
    file.close()
    assert {entry.name for entry in tmp_path.iterdir()} == {"log", "log.1", "log.2"}
    assert sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= 3000
    newest = [int(line) for name in ("log.2", "log.1", "log")
              for line in (tmp_path / name).read_text().splitlines()]  # fmt: skip
    assert newest == list(range(500 - len(newest), 500))


def test_a_logrotate_from_outside_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatingFile(path, max_bytes=0, keep=4)
    write(file, "one")
    path.rename(tmp_path / "log-20250101")
    write(file, "two")
    shutil.copy(path, tmp_path / "copy")
    os.truncate(path, 0)  # logrotate's copytruncate
    write(file, "three")
    path.unlink()
    write(file, "four")
    file.close()
    assert (tmp_path / "log-20250101").read_text() == "one\n"
    assert (tmp_path / "copy").read_text() == "two\n"
    assert path.read_text() == "four\n"
    assert path.stat().st_mode & 0o777 == 0o640 & ~_umask()


def test_a_file_that_cannot_be_rotated_loses_lines_and_counts_them(tmp_path: Path) -> None:
    """The bound holds: a folder in the way of the older file, as a failing disk would be."""
    path = tmp_path / "log"
    (tmp_path / "log.1" / "in the way").mkdir(parents=True)
    (tmp_path / "log.2" / "in the way").mkdir(parents=True)
    writer = LineWriter(RotatingFile(path, max_bytes=510, keep=2), own=True)  # type: ignore[arg-type]
    writer.setFormatter(logging.Formatter("%(message)s"))
    for _ in range(20):
        writer.emit(logging.LogRecord("x", logging.INFO, "", 1, "y" * 99, None, None))
    writer.close()
    assert path.stat().st_size == 500 and writer.lost == 15


def test_the_server_log_is_bounded_by_default_and_by_the_environment(tmp_path: Path) -> None:
    logger = logging.getLogger("modelops")
    before = logger.handlers[:], logger.level, logger.propagate
    variables = {
        "MODELOPS_LOG_FILE": str(tmp_path / "log"), "MODELOPS_LOG_MB": "0.02",
        "MODELOPS_LOG_KEEP": "1",
    }  # fmt: skip
    writer = configure_logging(NodeSettings.from_environment(variables))
    try:
        for number in range(500):
            logging.getLogger("modelops.serving").info("line %d", number)
        writer.flush()
    finally:
        writer.close()
        logger.handlers[:], logger.level, logger.propagate = before
    files = [tmp_path / "log.1", tmp_path / "log"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert sum(file.stat().st_size for file in files) <= 20_000
    messages = [json.loads(line)["message"] for file in files
                for line in file.read_text().splitlines()]  # fmt: skip
    assert messages[-1] == "line 499" and writer.lost == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("MB", "many"), ("MB", "-1"), ("MB", "nan"), ("MB", "0.001"), ("KEEP", "0"), ("KEEP", "1.5")],
)
def test_bounds_that_make_no_sense_are_refused(tmp_path: Path, name: str, value: str) -> None:
    variables = {"MODELOPS_LOG_FILE": str(tmp_path / "log"), f"MODELOPS_LOG_{name}": value}
    with pytest.raises(UsageError, match=f"MODELOPS_LOG_{name}"):
        configure_logging(NodeSettings.from_environment(variables))


def test_a_pipe_is_never_rotated(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = RotatingFile(path, max_bytes=10, keep=1)
    for _ in range(5):
        write(file, "0123456789")
    assert os.read(reader, 100) == b"0123456789\n" * 5
    file.close()
    os.close(reader)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
