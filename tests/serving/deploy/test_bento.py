"""`bentoml build` makes a bento that is whole: it serves a release with its own sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from modelops.serving.deploy.check import check_endpoint, get
from modelops.serving.deploy.launch import start_server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bento")]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BENTOML_HOME with one bento."""
    home = tmp_path_factory.mktemp("bentoml")
    subprocess.run(
        [sys.executable, "-m", "bentoml", "build", str(ROOT)],
        env={**os.environ, "BENTOML_HOME": str(home)},
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return home


@pytest.fixture(scope="module")
def bento(home: Path) -> Path:
    """The bento's folder."""
    (bento,) = (path.parent for path in home.glob("bentos/*/*/bento.yaml"))
    return bento


@pytest.fixture(scope="module")
def installed(bento: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """modelops from the bento's sources, as a container installs it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
         "-w", str(folder / "wheels"), str(bento / "src")],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = (folder / "wheels").glob("modelops-*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(folder / "lib"), wheel],
        check=True, timeout=300,
    )  # fmt: skip
    return folder / "lib"


def test_it_holds_what_its_dockerfile_copies(bento: Path) -> None:
    assert "modelops[demo]@file:." in (bento / "env/python/requirements.txt").read_text()
    copied = [
        line.split()[-2]
        for line in (bento / "env/docker/Dockerfile").read_text().splitlines()
        if line.startswith("COPY") and "./src/" in line
    ]
    assert copied and all((bento / name).exists() for name in copied)


def test_it_serves_a_release_from_its_own_sources(
    home: Path, installed: Path, tiny_release: Path, tmp_path: Path
) -> None:
    """With two workers, which is said when it is served and not when it is built."""
    about = installed / "modelops" / "__init__.py"
    about.write_text(about.read_text() + '\n__version__ = "from.the.bento"\n')
    environment = {
        "BENTOML_HOME": str(home),
        "PYTHONPATH": str(installed),
        "MODELOPS_CACHE": str(tmp_path / "cache"),
        "MODELOPS_WORKERS": "2",
        "OMP_NUM_THREADS": "1",
    }
    with start_server(
        tiny_release, environment=environment, service="modelops-image-generator:latest"
    ) as server:
        with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=30) as answer:
            assert json.load(answer)["info"]["version"] == "from.the.bento"
        checked = check_endpoint(server.url)
        assert checked.model == "tiny" and checked.receipt["modelops"] == "from.the.bento"
        _, text = get(f"{server.url}/metrics")
        assert text.count("modelops_worker_up{") == 2
