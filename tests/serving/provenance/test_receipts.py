"""A receipt holds as it was signed, in full or without its texts; the folder never overflows."""

from __future__ import annotations

import base64
import copy
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import CollectorRegistry

import live_node
from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.serving.provenance.receipts import (
    PAYLOAD_TYPE,
    ReceiptLog,
    canonical_bytes,
    new_receipt_id,
    read_receipt,
    sign_receipt,
    signed_bytes,
    text_digest,
    utc_now,
    verify_receipt,
    without_texts,
)
from modelops.serving.provenance.signing import (
    SigningKey,
    VerifyingKey,
    development_key,
    load_verifying_key,
    pre_authentication_encoding,
)
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.segments import LONGEST, SEGMENTS


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[SigningKey, VerifyingKey]:
    folder = tmp_path_factory.mktemp("signing")
    return development_key(folder), load_verifying_key(folder / "development.pem")


@pytest.fixture
def receipt(keys: tuple[SigningKey, VerifyingKey]) -> dict[str, Any]:
    return make_receipt(keys[0])


def make_receipt(key: SigningKey, prompt: str = "ein Zebra, bitte 🎈") -> dict[str, Any]:
    return sign_receipt(
        {
            "kind": "receipt",
            "schema_version": 1,
            "id": new_receipt_id(),
            "created": utc_now(),
            "modelops": "0.1.0",
            "request": {
                "prompt": prompt,
                "prompt_sha256": text_digest(prompt),
                "negative_prompt": "",
                "negative_prompt_sha256": text_digest(""),
                "seed": 2**53 - 1, "steps": 8, "guidance": 3.0,
                "size": "32x32", "output_format": "png",
            },
            "release": {"name": "tiny", "version": "0.1", "sha256": "1" * 64},
            "model_sha256": "2" * 64,
            "runtime": "torch-cpu",
            "precision": "float32",
            "batch_rows": [2, 2, 4],
            "mean_rows": 2.67,
            "filters": {"prompt": "words", "image": "open_nsfw", "image_score": 0.000012},
            "pixels_sha256": "3" * 64,
            "output_sha256": "4" * 64,
            "output_bytes": 1234,
            "queue_s": 0.0, "denoise_s": 0.25,
        },
        key,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "text"),
    [  # RFC 8785, appendix B
        ("0000000000000000", "0"), ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"), ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"), ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"), ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"), ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"), ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"), ("41b3de4355555556", "333333333.3333334"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)  # fmt: skip
def test_numbers_are_rfc_8785s(bits: str, text: str) -> None:
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical_bytes(number) == text.encode()


def test_texts_and_order_are_rfc_8785s() -> None:
    # Sections 3.2.2 and 3.2.3.
    value = json.loads(
        r'{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],'
        r'"string":"\u20ac$\u000F\u000aA\u0027\u0042\u0022\u005c\\\"\/",'
        r'"literals":[null,true,false]}'
    )
    assert canonical_bytes(value).decode() == (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        r'"string":"€$\u000f\nA' + "'" + r'B\"\\\\\"/"}'
    )
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    order = list(json.loads(canonical_bytes(dict.fromkeys(keys, 0))))
    assert order == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    for bad in (float("nan"), float("inf"), "\ud800", 2**53):
        with pytest.raises(ValueError, match=r"representable|codepoints|safe integer"):
            canonical_bytes([bad])


def test_it_verifies_in_full_without_texts_and_after_other_programs(
    receipt: dict[str, Any], keys: tuple[SigningKey, VerifyingKey]
) -> None:
    assert verify_receipt(receipt, keys[1]).request.seed == 2**53 - 1
    kept = without_texts(receipt)
    assert "Zebra" not in json.dumps(kept) and "prompt" not in kept["request"]
    assert verify_receipt(kept, keys[1]).request.prompt is None
    # JavaScript writes 3.0 as 3 and orders as it likes.
    other = json.loads(json.dumps(receipt, indent=3).replace("3.0,", "3,"))
    other = dict(sorted(other.items(), reverse=True))
    assert other["request"]["guidance"] == 3
    verify_receipt(other, keys[1])


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path


def test_whatever_is_changed_is_refused(
    receipt: dict[str, Any], keys: tuple[SigningKey, VerifyingKey]
) -> None:
    changed = 0
    for path in leaves(receipt):
        bad = copy.deepcopy(receipt)
        holder = bad
        for name in path[:-1]:
            holder = holder[name]
        old = holder[path[-1]]
        if isinstance(old, bool):
            holder[path[-1]] = not old
        elif isinstance(old, str):
            holder[path[-1]] = (("0" if old[0] != "0" else "1") + old[1:]) if old else "x"
        elif isinstance(old, list):
            holder[path[-1]] = old[:-1]
        else:
            holder[path[-1]] = old + 1 if isinstance(old, int) else old + 0.5
        with pytest.raises(IntegrityError):
            verify_receipt(bad, keys[1])
        changed += 1
    assert changed == 34
    for bad in (receipt | {"extra": 1}, [receipt], None, {}, receipt | {"signature": None}):
        with pytest.raises(IntegrityError):
            verify_receipt(bad, keys[1])


def test_another_key_is_named(
    receipt: dict[str, Any], keys: tuple[SigningKey, VerifyingKey], tmp_path: Path
) -> None:
    stranger = development_key(tmp_path)
    with pytest.raises(IntegrityError, match=f"signed by key {stranger.key_id[:12]}"):
        verify_receipt(make_receipt(stranger), keys[1])
    # A stranger who claims to be us.
    forged = make_receipt(stranger)
    forged["signature"]["key_id"] = keys[1].key_id
    with pytest.raises(IntegrityError, match="was changed"):
        verify_receipt(forged, keys[1])


def test_openssl_verifies_the_signature(
    receipt: dict[str, Any], keys: tuple[SigningKey, VerifyingKey], tmp_path: Path
) -> None:
    (tmp_path / "chain.pem").write_bytes(keys[0].chain)
    public = subprocess.run(
        ["openssl", "x509", "-in", str(tmp_path / "chain.pem"), "-pubkey", "-noout"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    (tmp_path / "public.pem").write_bytes(public)
    assert load_verifying_key(tmp_path / "public.pem").key_id == keys[1].key_id
    (tmp_path / "signature").write_bytes(base64.b64decode(receipt["signature"]["value"]))
    message = pre_authentication_encoding(PAYLOAD_TYPE, signed_bytes(receipt))
    assert message.startswith(b"DSSEv1 37 application/vnd.modelops.receipt+json ")
    checked = subprocess.run(
        ["openssl", "dgst", "-sha256", "-verify", str(tmp_path / "public.pem"),
         "-signature", str(tmp_path / "signature")],
        input=message, check=True, capture_output=True,
    )  # fmt: skip
    assert checked.stdout == b"Verified OK\n"


def test_the_folder_is_bounded_and_keeps_the_newest(
    keys: tuple[SigningKey, VerifyingKey], tmp_path: Path
) -> None:
    limit = SEGMENTS * LONGEST
    logs = [ReceiptLog(tmp_path / "receipts", max_bytes=limit) for _ in range(2)]
    written = []
    for number in range(480):
        receipt = make_receipt(keys[0])
        assert logs[number % 2].write(receipt)
        written.append(receipt["id"])
        size = sum(path.stat().st_size for path in (tmp_path / "receipts").iterdir())
        assert size <= limit
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "receipts").iterdir())
    kept = [
        json.loads(line)["id"]
        for path in sorted((tmp_path / "receipts").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert 80 < len(kept) < 480
    assert set(kept) >= set(written[-80:]) and not set(kept) & set(written[:160])
    found = read_receipt(tmp_path / "receipts", receipt_id=written[-1][:12])
    assert verify_receipt(found, keys[1]).id == written[-1]
    with pytest.raises(UsageError, match="no receipt"):
        read_receipt(tmp_path / "receipts", receipt_id=written[0])
    with pytest.raises(UsageError, match=r"\d+ receipts"):
        read_receipt(tmp_path / "receipts")
    for log in logs:
        log.close()


def test_every_receipt_of_a_folder_is_found_again(
    keys: tuple[SigningKey, VerifyingKey], tmp_path: Path
) -> None:
    """Also one whose prompt holds what Unicode calls a line's end, beside one cut in a letter."""
    log = ReceiptLog(tmp_path, max_bytes=SEGMENTS * LONGEST)
    made = [make_receipt(keys[0], f"one{end}two") for end in ("\u2028", "\u0085", "\x0b", "\r\n")]
    assert all(map(log.write, made))
    log.close()
    (file,) = tmp_path.iterdir()
    torn = canonical_bytes(make_receipt(keys[0], "Zoë"))
    with file.open("ab") as handle:  # as a power cut would leave it
        handle.write(torn[: torn.index("ë".encode()) + 1])
    for receipt in made:
        found = read_receipt(tmp_path, receipt_id=receipt["id"])
        assert verify_receipt(found, keys[1]).request.prompt == receipt["request"]["prompt"]
    file.write_bytes(b'{"seed": ' + b"9" * 5000 + b"}")
    with pytest.raises(UsageError, match="no receipt"):
        read_receipt(file)


def fill_disk(log: ReceiptLog) -> None:
    """Its open file becomes /dev/full: the kernel itself answers that no space is left."""
    assert log._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file)
    os.close(full)


def test_a_full_disk_is_counted_and_recovered_from(
    keys: tuple[SigningKey, VerifyingKey], tmp_path: Path
) -> None:
    registry = CollectorRegistry()
    log = ReceiptLog(tmp_path, max_bytes=1_000_000, registry=registry)
    receipt = make_receipt(keys[0])
    assert log.write(receipt)
    fill_disk(log)
    assert not log.write(receipt) and not log.write(receipt) and log.failing
    log.close()  # as when the segment is full: a new file is opened
    assert log.write(receipt) and not log.failing
    assert registry.get_sample_value("modelops_receipts_total", {"result": "failed"}) == 2
    assert registry.get_sample_value("modelops_receipts_total", {"result": "written"}) == 2
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert [json.loads(line)["id"] for line in lines] == [receipt["id"]] * 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelopsError, match="cannot be kept here"):
        ReceiptLog(tmp_path / "file", max_bytes=1_000_000)


@pytest.mark.parametrize("failure", ["send", "refuse"])
def test_a_node_whose_disk_is_full(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    settings = NodeSettings(
        receipts=str(tmp_path / "receipts"), receipts_mb=1, receipts_failure=failure
    )
    with live_node.served(tiny_release, settings) as live, live.client() as client:

        def ask() -> Any:
            answer = client.images.generate(prompt="a zebra", extra_body={"steps": 1, "seed": 1})
            assert answer.data
            return answer.data[0].model_extra["x_modelops"]  # type: ignore[index]

        sent = ask()
        assert sent["request"]["prompt"] == "a zebra"
        kept = read_receipt(tmp_path / "receipts", receipt_id=sent["id"])
        assert kept == without_texts(sent)
        log = live.node.sealer.receipts
        assert log is not None
        fill_disk(log)
        if failure == "send":
            assert ask()["signature"]
        else:
            with pytest.raises(openai.InternalServerError) as error:
                ask()
            assert error.value.code == "receipt_unavailable"
        assert live.metric('modelops_receipts_total{result="failed"}') == 1


def test_settings_that_mean_nothing_stop_the_node(tiny_release: Path) -> None:
    from modelops.serving.node.node import InferenceNode

    for name in ("receipts_failure", "receipts_prompts"):
        with pytest.raises(UsageError, match=f"MODELOPS_{name.upper()}='maybe'"):
            InferenceNode(tiny_release, settings=NodeSettings(**{name: "maybe"}))  # type: ignore[arg-type]
