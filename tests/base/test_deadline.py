"""A run of tests that may not start new ones after a time says which it left out, and passes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
# The time is over as soon as a process has run one test.
TESTS = """
import pytest

@pytest.fixture
def made(tmp_path_factory):
    tmp_path_factory.mktemp("made")

@pytest.mark.parametrize("number", range(6))
def test_number(number, made, request):
    request.config.option.no_new_test_after = 0
"""


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take seconds to load
    environment["PYTHONPATH"] = str(CONFTEST.parent / "helpers")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-p", "no:cacheprovider",
         "--basetemp", "base", "--no-new-test-after", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_each_of_two_processes_runs_one_and_the_others_are_named(tmp_path: Path) -> None:
    code, text = run(tmp_path, "4e9", "-n", "2")
    assert (code, "2 passed, 4 skipped" in text) == (0, True), text
    named = text.partition("4 tests were not started: it was after 07:06:40 UTC")[2].splitlines()
    assert len({line for line in named if line.startswith("test_it.py::test_number[")}) == 4


def test_after_the_time_no_fixture_is_made(tmp_path: Path) -> None:
    code, text = run(tmp_path, "0")
    assert (code, "6 tests were not started" in text) == (0, True), text
    assert not list(tmp_path.glob("base/made*"))
