"""`bentoml build` makes a bento that is whole: a container installs modelops from its sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_bento_builds_and_holds_what_its_dockerfile_copies(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "bentoml", "build", str(ROOT)],
        env={**os.environ, "BENTOML_HOME": str(tmp_path)},
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (bento,) = (path.parent for path in tmp_path.glob("bentos/*/*/bento.yaml"))
    assert "modelops[demo]@file:." in (bento / "env/python/requirements.txt").read_text()
    copied = [
        line.split()[-2]
        for line in (bento / "env/docker/Dockerfile").read_text().splitlines()
        if line.startswith("COPY") and "./src/" in line
    ]
    assert copied and all((bento / name).exists() for name in copied)
    wheels = tmp_path / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "--no-index", "-w", str(wheels), str(bento / "src")],
        check=True, timeout=300,
    )  # fmt: skip
    assert len(list(wheels.glob("modelops-*.whl"))) == 1
