"""What cannot start is said before a worker is started, for it would be started for ever."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import modelops
from modelops.base.errors import ModelopsError, UsageError
from modelops.serving.deploy.start import check_names, check_the_start, known_variables
from modelops.serving.settings import NodeSettings


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


@pytest.mark.parametrize("name, value, said", [
    ("MODELOPS_DEVICE", "cuda:7", r"device 'cuda:7': \d+ CUDA devices are visible"),
    ("MODELOPS_RELEASES", "/nowhere", "/nowhere: no such folder"),
    ("MODELOPS_RELEASE", "/nowhere", "/nowhere: not a release"),
    ("OTEL_TRACES_EXPORTER", "pigeon", "unknown exporter"),
    ("MODELOPS_MAX_ROW", "4", "MODELOPS_MAX_ROW: no such setting"),
    ("MODELOPS_CLIENT_TIMEOUT_S", "soon", "MODELOPS_CLIENT_TIMEOUT_S='soon': not a number"),
    ("MODELOPS_RECEIPTS_FAILURE", "maybe", "MODELOPS_RECEIPTS_FAILURE"),
    ("MODELOPS_IMAGE_FILTER", "none", "none"),
    ("MODELOPS_IMAGE_FILTER", "transformers:a/b", "it is not pinned"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(
    tiny_release: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    """In a process of `bentoml serve`: see http/test_faults_process."""
    monkeypatch.setenv("MODELOPS_RELEASE", str(tiny_release))
    monkeypatch.setenv(name, value)
    with pytest.raises(ModelopsError, match=said) as caught:
        check_the_start(NodeSettings.from_environment(os.environ), os.environ)
    assert "\n" not in str(caught.value)
