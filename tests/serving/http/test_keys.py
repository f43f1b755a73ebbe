"""Keys let in whom they should, and nobody else; they come and go while the node runs."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import live_node
from modelops.base.errors import ModelopsError, UsageError
from modelops.cli.main import main
from modelops.serving.http.access import Access, check_open_address, is_loopback
from modelops.serving.http.keys import (
    KeyRing,
    KeysUnavailableError,
    UnknownKeyError,
    create_key,
    read_keys,
    revoke_key,
)
from modelops.serving.settings import NodeSettings


def from_list(digests: str) -> tuple[str, ...]:
    return NodeSettings.from_environment({"MODELOPS_API_KEYS": digests}).api_keys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def name_of(ring: KeyRing, key: str) -> str | None:
    try:
        return ring.identify(f"Bearer {key}").name
    except UnknownKeyError:
        return None


def test_the_file_holds_no_key_and_each_key_is_new(path: Path) -> None:
    keys = {name: create_key(path, name) for name in ("alice", "bob")}
    text = path.read_text()
    assert len(set(keys.values())) == 2
    for name, key in keys.items():
        assert key.startswith("mo-") and len(key) == 3 + 43  # 256 bits in base64
        assert key not in text and key[3:] not in text
        stored = next(entry for entry in read_keys(path) if entry.name == name)
        assert stored.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)  # for the service's group
    create_key(path, "carol")
    assert path.stat().st_mode & 0o777 == 0o640


def test_rotation_without_a_restart(path: Path) -> None:
    old = create_key(path, "alice-1")
    ring = KeyRing(path=path)
    assert ring.required and name_of(ring, old) == "alice-1"
    new = create_key(path, "alice-2", images_per_minute=3)
    assert name_of(ring, old) == "alice-1" and name_of(ring, new) == "alice-2"
    assert ring.identify(f"bearer  {new} ").images_per_minute == 3
    revoke_key(path, "alice-1")
    assert name_of(ring, old) is None and name_of(ring, new) == "alice-2"
    revoke_key(path, "alice-2")
    assert name_of(ring, new) is None and ring.required  # no valid key lets nobody in
    again = create_key(path, "alice-1")  # the name is free again, the key another
    assert name_of(ring, again) == "alice-1" and name_of(ring, old) is None
    with pytest.raises(UsageError, match="there is a key"):
        create_key(path, "alice-1")
    with pytest.raises(UsageError, match="no valid key 'nobody'"):
        revoke_key(path, "nobody")


def test_what_is_no_key(path: Path) -> None:
    key = create_key(path, "alice")
    ring = KeyRing(path=path)
    for header in ("", key, f"Basic {key}", "Bearer", "Bearer ", f"Bearer {key}x",
                   f"Bearer {key[:-1]}", f"Bearer {key.upper()}", f"Bearer x {key}",
                   f"Bearer {read_keys(path)[0].sha256}", "Bearer \udcff\xff"):  # fmt: skip
        with pytest.raises(UnknownKeyError):
            ring.identify(header)


def test_a_file_that_breaks_lets_nobody_in_until_it_is_mended(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = create_key(path, "alice")
    ring, good = KeyRing(path=path), path.read_text()
    for bad in ('{"keys": [', '{"keys": [{"name": "x", "key": "mo-secret"}]}', ""):
        path.write_text(bad)
        with caplog.at_level(logging.INFO), pytest.raises(KeysUnavailableError):
            ring.identify(f"Bearer {key}")
    path.unlink()
    with pytest.raises(KeysUnavailableError):
        ring.identify(f"Bearer {key}")
    assert "mo-" not in caplog.text and caplog.text.count("nobody is let in") == 1
    path.write_text(good)
    assert name_of(ring, key) == "alice"
    with pytest.raises(UsageError, match="No such file"):
        KeyRing(path=path.parent / "none.json")
    (path.parent / "other.json").write_text('{"kind": "verdict"}')
    with pytest.raises(UsageError, match="not a file of API keys"):
        KeyRing(path=path.parent / "other.json")


def test_digests_in_the_environment_go_on_working() -> None:
    digests = [hashlib.sha256(key).hexdigest() for key in (b"one", b"two")]
    ring = KeyRing(digests=from_list(",".join(digests)))
    assert (name_of(ring, "one"), name_of(ring, "two"), name_of(ring, "six")) == (
        "key-1", "key-2", None,
    )  # fmt: skip
    assert not KeyRing().required
    with pytest.raises(UsageError, match="MODELOPS_API_KEYS"):
        from_list("mo-pasted")


def test_the_digest_of_nothing_lets_nobody_in() -> None:
    """`printf %s "$KEY" | sha256sum` where KEY is not set."""
    ring = KeyRing(digests=from_list(hashlib.sha256(b"").hexdigest()))
    for header in ("", "Bearer", "Bearer ", "Bearer   "):
        with pytest.raises(UnknownKeyError):
            ring.identify(header)


def test_a_place_where_no_file_can_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelopsError, match="cannot write"):
        create_key(tmp_path / "file" / "keys.json", "alice")


def test_two_who_make_keys_at_once_lose_none(path: Path) -> None:
    threads = [
        threading.Thread(target=create_key, args=(path, f"key-{number}")) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path)} == {f"key-{number}" for number in range(8)}


def test_commands(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--file", str(path)]
    assert main(["serve", "key", "create", "alice", *file, "--requests-per-minute", "60"]) == 0
    key = capsys.readouterr().out.strip()
    assert name_of(KeyRing(path=path), key) == "alice"
    assert main(["serve", "key", "list", *file]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and "60" in listed and key not in listed
    assert main(["serve", "key", "revoke", "alice", *file]) == 0
    assert main(["serve", "key", "list", *file, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out.splitlines()[-1])["keys"][0]
    assert entry["revoked"] and "sha256" not in entry
    for arguments in (["create", "a b"], ["create", ""], ["revoke", "alice"],
                      ["create", "x", "--images-per-minute", "0"]):  # fmt: skip
        assert main(["serve", "key", *arguments, *file]) == 2
    assert main(["serve", "key", "list", "--file", str(path.parent / "none")]) == 2


def test_a_key_goes_into_a_file_that_only_its_owner_reads(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "admin.key"
    create = ["serve", "key", "create", "ops", "--admin", "--file", str(path), "--out", str(out)]
    assert main([*create, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    key = out.read_text().strip()
    assert name_of(KeyRing(path=path), key) == "ops" and out.stat().st_mode & 0o777 == 0o600
    assert main(create) == 2
    assert "exists already" in capsys.readouterr().err and out.read_text().strip() == key
    out.unlink()
    assert main(create) == 2  # the name is taken
    assert not out.exists() and key not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
     (None, True), ("0.0.0.0", False), ("::", False), ("10.1.2.3", False),
     ("::ffff:10.1.2.3", False)],
)  # fmt: skip
def test_an_open_address_needs_keys(path: Path, host: str | None, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    create_key(path, "alice")
    closed, insecure = NodeSettings(api_keys_file=str(path)), NodeSettings(insecure=True)
    if host is not None:
        check_open_address(host, closed)
        check_open_address(host, insecure)
    assert Access.from_settings(insecure).identify("", host).name == "anonymous"
    if loopback:
        assert Access.from_settings(NodeSettings()).identify("", host).name == "anonymous"
    else:
        with pytest.raises(UsageError, match="no API keys"):
            check_open_address(host or "", NodeSettings())
        with pytest.raises(Exception, match="no API keys") as error:
            Access.from_settings(NodeSettings()).identify("", host)
        assert error.value.status == 403  # type: ignore[attr-defined]


def test_serve_refuses_an_open_address_without_keys(
    tiny_release: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("MODELOPS_API_KEYS_FILE", raising=False)
    create_key(path, "alice")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    serve = ["serve", str(tiny_release), "--host", "0.0.0.0", "--port", port, "--dry-run"]
    assert main(serve) == 2
    assert "there are no API keys" in capsys.readouterr().err
    assert main([*serve, "--insecure"]) == 0
    assert "MODELOPS_INSECURE=1" in capsys.readouterr().out
    assert main([*serve, "--keys", str(path), "--receipts", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert f"MODELOPS_API_KEYS_FILE={path}" in out and f"MODELOPS_RECEIPTS={tmp_path}" in out


@pytest.fixture(scope="module")
def node(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELOPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        with live_node.served(tiny_release, NodeSettings(max_rows=4)) as live:
            yield live.node


def test_the_official_client_with_and_without_a_key(
    node: Any, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = create_key(path, "alice")
    monkeypatch.setenv("MODELOPS_API_KEYS_FILE", str(path))
    wrong = "mo-wrong-" + "x" * 40
    with caplog.at_level(logging.DEBUG), live_node.http(node) as live:
        with live.client(key) as client:
            assert client.images.generate(prompt="sun", extra_body={"steps": 1}).data
        for bad in (wrong, key + "x"):
            with live.client(bad) as client, pytest.raises(openai.AuthenticationError) as error:
                client.images.generate(prompt="sun", extra_body={"steps": 1})
            assert error.value.body == {
                "message": "a valid API key is needed", "type": "authentication_error",
                "param": None, "code": "invalid_api_key",
            }  # fmt: skip
            assert error.value.response.headers["www-authenticate"] == "Bearer"
        with live.client(wrong) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        revoke_key(path, "alice")
        with live.client(key) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        path.write_text("broken")
        with live.client(key) as client, pytest.raises(openai.InternalServerError) as broken:
            client.models.list()
        assert broken.value.status_code == 503 and broken.value.code == "api_keys_unavailable"
    assert key not in caplog.text and wrong not in caplog.text
    assert key not in node.metrics.text().decode()


def test_without_keys_an_open_address_answers_nobody(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bentoml serve` chooses its own address: the node looks where each caller came in."""
    for name in ("MODELOPS_API_KEYS", "MODELOPS_API_KEYS_FILE", "MODELOPS_INSECURE"):
        monkeypatch.delenv(name, raising=False)
    address = own_address()
    if address is None:
        pytest.skip("this machine has a loopback address only")
    with live_node.http(node, host="0.0.0.0") as live:
        port = int(live.url.rsplit(":", 1)[1])

        def ask(host: str, path: str) -> tuple[int, str]:
            connection = http.client.HTTPConnection(host, port, timeout=30)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        assert ask("127.0.0.1", "/v1/models")[0] == 200
        status, body = ask(address, "/v1/models")
        assert status == 403 and json.loads(body)["error"]["code"] == "api_keys_not_configured"
        assert ask(address, "/livez")[0] == 200  # probes come from outside


def own_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            address: str = probe.getsockname()[0]
        except OSError:
            return None
    return None if is_loopback(address) else address
