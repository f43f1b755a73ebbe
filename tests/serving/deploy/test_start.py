"""What cannot start is said before a worker is started, for it would be started for ever."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import modelops
from certificates import FAULTS, write_chain
from modelops.base.errors import ModelopsError, UsageError
from modelops.cli.main import main
from modelops.serving.deploy.start import check_names, check_the_start
from modelops.serving.settings import NodeSettings, known_variables


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
    documents = Path(__file__).resolve().parents[3] / "docs"
    text = "".join(
        path.read_text("utf-8") for path in [*package.rglob("*.py"), *documents.rglob("*.md")]
    )
    named = set(re.findall(r"\bMODELOPS_[A-Z][A-Z0-9_]*[A-Z0-9]\b", text))
    assert len(named) > 20
    assert named - {"MODELOPS_SERVICE_HOST"} <= known_variables()  # which Kubernetes makes


@pytest.mark.parametrize("name, value, said", [
    ("MODELOPS_DEVICE", "cuda:7", r"device 'cuda:7': \d+ CUDA devices are visible"),
    ("MODELOPS_RELEASES", "/nowhere", "/nowhere: no such folder"),
    ("MODELOPS_RELEASE", "/nowhere", "/nowhere: not a release"),
    ("OTEL_TRACES_EXPORTER", "pigeon", "unknown exporter"),
    ("MODELOPS_MAX_ROW", "4", "MODELOPS_MAX_ROW: no such setting"),
    ("MODELOPS_CLIENT_TIMEOUT_S", "soon", "MODELOPS_CLIENT_TIMEOUT_S='soon' is not a number"),
    ("MODELOPS_RECEIPTS_FAILURE", "maybe", "MODELOPS_RECEIPTS_FAILURE"),
    ("MODELOPS_IMAGE_FILTER", "none", "none"),
    ("MODELOPS_IMAGE_FILTER", "transformers:a/b", "it is not pinned"),
    ("MODELOPS_RECEIPTS", "/dev/null/x", "/dev/null/x: receipts cannot be kept here"),
    ("MODELOPS_DRIFT_LOG", "/dev/null/x", "/dev/null/x: drift log cannot be kept here"),
    ("MODELOPS_QUARANTINE", "/dev/null/x", "/dev/null/x: no quarantine can be kept here"),
    ("MODELOPS_LOG_FILE", "/dev/null/x", "MODELOPS_LOG_FILE=/dev/null/x"),
    ("MODELOPS_LOG_FORMAT", "xml", "MODELOPS_LOG_FORMAT='xml' should be"),
    ("MODELOPS_LOG_PROMPTS", "maybe", "MODELOPS_LOG_PROMPTS='maybe' is not 0 or 1"),
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


@pytest.mark.parametrize(("fault", "said"), [
    ("self-signed", "the certificate was self-signed"), ("usage", "the certificate is invalid"),
    ("purpose", "the certificate is invalid"), ("alone", "signer's certificate and its issuer's"),
    ("order", "chain.pem: certificate 2 did not issue certificate 1"),
    ("stranger", "chain.pem: certificate 2 did not issue certificate 1"),
    ("expired", "signingCredential"),
])  # fmt: skip
def test_a_chain_that_verifies_no_image_is_refused(
    tiny_release: Path, tmp_path: Path, fault: str, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    key, chain = write_chain(tmp_path, fault)
    assert fault in FAULTS
    settings = NodeSettings(
        release=str(tiny_release), signing_key=str(key), signing_chain=str(chain)
    )
    with pytest.raises(UsageError, match=said):
        check_the_start(settings)
    serve = ["serve", str(tiny_release), "--signing-key", str(key), "--signing-chain", str(chain)]
    assert main([*serve, "--port", "1"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert said in error


def test_a_chain_of_three_starts(tiny_release: Path, tmp_path: Path) -> None:
    key, chain = write_chain(tmp_path)
    check_the_start(
        NodeSettings(release=str(tiny_release), signing_key=str(key), signing_chain=str(chain))
    )
