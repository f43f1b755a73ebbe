"""What cannot start is said before a worker is started, for it would be started for ever."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modelops
from modelops.errors import UsageError
from modelops.serving.start import check_names, known_variables


@pytest.mark.parametrize("name, meant", [
    ("MODELOPS_DEVCIE", "MODELOPS_DEVICE"),
    ("MODELOPS_QUEUE_LIMITS", "MODELOPS_QUEUE_LIMIT"),
    ("MODELOPS_API_KEY_FILE", "MODELOPS_API_KEYS_FILE"),
    ("MODELOPS_RECIEPTS", "MODELOPS_RECEIPTS"),
])  # fmt: skip
def test_a_misspelt_setting_is_not_ignored(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: no such setting") as caught:
        check_names({name: "1", "PATH": "/bin"})
    assert meant in (caught.value.hint or "")


def test_variables_of_others_are_left_alone() -> None:
    """Those that Kubernetes and Docker make for a service called modelops."""
    check_names({
        "MODELOPS_SERVICE_HOST": "10.0.0.1", "MODELOPS_SERVICE_PORT": "3000",
        "MODELOPS_PORT": "tcp://10.0.0.1:3000", "MODELOPS_PORT_3000_TCP_ADDR": "10.0.0.1",
        "MODELOPS_NAME": "/web/modelops", "MODELOPS_DEVICE": "cpu", "MODELOPS_RELEASE": "release",
        "MODELOPS_API_KEY": "x", "MODELOPS_ADMIN_KEY": "y", "MODELOPS_CACHE": "/tmp",
    })  # fmt: skip


def test_every_variable_that_the_package_names_is_known() -> None:
    package = Path(modelops.__file__).parent
    text = "".join(path.read_text("utf-8") for path in package.rglob("*.py"))
    named = set(re.findall(r'"(MODELOPS_[A-Z][A-Z0-9_]*)"', text))
    assert len(named) > 20
    assert named <= known_variables()


@pytest.mark.slow
@pytest.mark.parametrize("name, value, said", [
    ("MODELOPS_DEVICE", "cuda:7", r"device 'cuda:7': \d+ CUDA devices are visible"),
    ("MODELOPS_RELEASES", "nowhere", "nowhere: no such folder"),
    ("OTEL_TRACES_EXPORTER", "pigeon", "unknown exporter"),
    ("MODELOPS_MAX_ROW", "4", "MODELOPS_MAX_ROW: no such setting"),
])  # fmt: skip
def test_bentoml_serve_ends_with_one_line(
    tiny_release: Path, tmp_path: Path, name: str, value: str, said: str
) -> None:
    import re

    environment = {
        **os.environ, "MODELOPS_RELEASE": str(tiny_release), "MODELOPS_CACHE": str(tmp_path),
        name: str(tmp_path / value) if name == "MODELOPS_RELEASES" else value,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", "modelops.service:ImageGenerator", "--port",
         "0"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(said, done.stdout + done.stderr)
    assert "Traceback" not in done.stderr
