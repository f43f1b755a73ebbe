"""Every file says who made it, survives reading back, and is refused when anything was changed."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from PIL import Image

import live_node
from modelops.base.errors import IntegrityError, UsageError
from modelops.serving.failures import ProvenanceError
from modelops.serving.provenance.images import SOURCE_TYPE, encode_image
from modelops.serving.provenance.manifests import (
    Marker,
    _context,
    picture_format,
    read_mark,
)
from modelops.serving.provenance.signing import (
    SigningKey,
    development_key,
    load_verifying_key,
    make_certificates,
    open_signing_key,
    to_pem,
)
from modelops.serving.settings import NodeSettings

FORMATS = ("png", "jpeg", "webp")
PROMPT = "a very Telling prompt about zebras"
SAID = {"seed": 7, "guidance": 2.5, "release_sha256": "a" * 64, "receipt": "b" * 32}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return development_key(tmp_path_factory.mktemp("signing"))


@pytest.fixture(scope="module")
def marker(key: SigningKey) -> Marker:
    return Marker(key, software=("tiny", "0.1"))


@pytest.fixture(scope="module")
def encoded() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return {name: encode_image(pixels, name, {"seed": "7"}) for name in FORMATS}


def decode(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def write_key(folder: Path, private: Any, chain: bytes) -> tuple[Path, Path]:
    (folder / "key.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "chain.pem").write_bytes(chain)
    return folder / "key.pem", folder / "chain.pem"


@pytest.mark.parametrize("name", FORMATS)
def test_the_manifest_reads_back_and_the_picture_is_the_same(
    marker: Marker, encoded: dict[str, bytes], name: str
) -> None:
    marked = marker.embed(encoded[name], name, SAID)
    found = read_mark(marked, name, signer=marker.key.chain)
    assert found.source_type == SOURCE_TYPE
    assert found.generation == SAID | {"development": True}
    assert found.generator.startswith("modelops ") and "DEVELOPMENT" in found.issuer
    assert picture_format(marked) == name
    assert np.array_equal(decode(marked), decode(encoded[name]))
    assert SOURCE_TYPE.encode() in marked and len(marked) > len(encoded[name])


def test_what_the_manifest_says_is_attributed_to_the_signer(
    marker: Marker, encoded: dict[str, bytes]
) -> None:
    """C2PA 2.3, chapter 10: gathered assertions are not, created ones are."""
    import c2pa

    marked = marker.embed(encoded["png"], "png", SAID)
    with c2pa.Reader("image/png", io.BytesIO(marked)) as reader:
        store = json.loads(reader.detailed_json())
    claim = store["manifests"][store["active_manifest"]]["claim"]
    created = {entry["url"].rsplit("/", 1)[-1] for entry in claim["created_assertions"]}
    assert created == {"c2pa.actions.v2", "org.modelops.generation", "c2pa.hash.data"}
    assert not claim.get("gathered_assertions")


@pytest.mark.parametrize(
    ("action", "state"),
    [("", "Valid"), ("c2pa.watermarked", "Invalid"), ("c2pa.watermarked.bound", "Invalid")],
)
def test_the_watermarks_action_needs_no_soft_binding(
    marker: Marker, encoded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    action: str, state: str,
) -> None:  # fmt: skip
    """The two others of the specification do, and validators refuse them without one."""
    import c2pa

    builder = c2pa.Builder
    ours = "c2pa.watermarked.unbound"
    monkeypatch.setattr(
        c2pa, "Builder", lambda text, context: builder(text.replace(ours, action or ours), context)
    )
    marked = marker._sign(encoded["png"], "image/png", {**SAID, "watermark": {"found": True}})
    assert (action or ours).encode() in marked
    with c2pa.Reader("image/png", io.BytesIO(marked), context=_context()) as reader:
        assert reader.get_validation_state() == state


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_picture_is_refused(marker: Marker, encoded: dict[str, bytes], name: str) -> None:
    marked = marker.embed(encoded[name], name, SAID)
    said, refused = read_mark(marked, name), 0
    for position in range(100, len(marked), len(marked) // 60):
        data = bytearray(marked)
        data[position] ^= 1
        try:
            found = read_mark(bytes(data), name)
        except IntegrityError:
            refused += 1
        else:  # padding inside the manifest, or the checksum of its chunk: it says the same
            assert found == said
    assert refused >= 40
    with pytest.raises(IntegrityError, match="manifest"):
        read_mark(encoded[name], name)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(marked)).save(buffer, name)  # what an image editor does
    with pytest.raises(IntegrityError, match="manifest"):
        read_mark(buffer.getvalue(), name)


def test_another_signer_is_not_trusted(
    marker: Marker, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    other = Marker(development_key(tmp_path), software=("tiny", "0.1"))
    marked = other.embed(encoded["png"], "png", SAID)
    assert read_mark(marked, "png").serial == other.key.serial
    with pytest.raises(IntegrityError, match="untrusted"):
        read_mark(marked, "png", signer=marker.key.chain)
    # The same issuer signs for others too.
    issuer = x509.load_pem_x509_certificates(other.key.chain)[1]
    colleague = to_pem([x509.load_pem_x509_certificates(marker.key.chain)[0], issuer])
    with pytest.raises(IntegrityError, match="another certificate"):
        read_mark(marked, "png", signer=colleague)
    with pytest.raises(UsageError, match="issuer"):
        read_mark(marked, "png", signer=colleague[: colleague.index(b"-----END") + 26])


def test_a_configured_key_is_no_development_key(tmp_path: Path, encoded: dict[str, bytes]) -> None:
    private, certificates = make_certificates(organisation="Example Ltd")
    paths = write_key(tmp_path, private, to_pem(certificates))
    key = open_signing_key(*paths)
    assert not key.development
    marked = Marker(key, software=("tiny", "0.1")).embed(encoded["webp"], "webp", SAID)
    found = read_mark(marked, "webp", signer=key.chain)
    assert found.generation == SAID and found.issuer == "Example Ltd"
    assert load_verifying_key(paths[1]).key_id == key.key_id
    # The certificate is one that OpenSSL accepts too.
    (tmp_path / "root.pem").write_bytes(to_pem(certificates[1:]))
    subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "root.pem"), str(paths[1])],
        check=True, capture_output=True,
    )  # fmt: skip


def test_keys_that_cannot_be_used_are_said_at_once(tmp_path: Path) -> None:
    _, certificates = make_certificates(organisation="Example Ltd")
    other, _ = make_certificates(organisation="Example Ltd")
    chain = to_pem(certificates)
    key_path, chain_path = write_key(tmp_path, other, chain)
    with pytest.raises(UsageError, match="not the signing key's"):
        open_signing_key(key_path, chain_path)
    with pytest.raises(UsageError, match="needs its certificate chain"):
        open_signing_key(key_path, None)
    with pytest.raises(UsageError, match="no unencrypted private key"):
        open_signing_key(chain_path, chain_path)
    with pytest.raises(UsageError, match="No such file"):
        open_signing_key(tmp_path / "none.pem", chain_path)
    write_key(tmp_path, rsa.generate_private_key(65537, 2048), chain)
    with pytest.raises(UsageError, match="not a P-256 key"):
        open_signing_key(key_path, chain_path)
    old, expired = make_certificates(organisation="Example Ltd", days=-0.5)
    with pytest.raises(UsageError, match="is valid from"):
        open_signing_key(*write_key(tmp_path, old, to_pem(expired)))


def test_a_self_signed_certificate_is_refused_at_start(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "me")])
    now = datetime.now(UTC)
    own = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(private, hashes.SHA256())
    )
    key = open_signing_key(*write_key(tmp_path, private, to_pem([own])))
    with pytest.raises(UsageError, match="C2PA refuses"):
        Marker(key, software=("tiny", "0.1"))


def test_the_development_key_is_private_and_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "signing"
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(development_key(folder).key_id))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = folder.iterdir()
    assert len(made) == 4 and len(set(made)) == 1
    assert path.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    assert load_verifying_key(path).key_id == made[0]
    path.chmod(0o640)
    with pytest.raises(IntegrityError, match="others can read"):
        development_key(folder)


def test_what_cannot_be_marked_is_no_picture(marker: Marker, encoded: dict[str, bytes]) -> None:
    for data in (b"", b"not an image", encoded["jpeg"]):
        with pytest.raises(ProvenanceError):
            marker.embed(data, "png", SAID)


@pytest.fixture(scope="module")
def live(
    tiny_release: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[live_node.LiveNode]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELOPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        with live_node.served(tiny_release, NodeSettings(max_rows=4)) as node:
            yield node


@pytest.mark.parametrize("name", FORMATS)
def test_served_pictures_are_marked_and_do_not_tell_the_prompt(
    live: live_node.LiveNode, name: str
) -> None:
    with live.client() as client:
        answer = client.images.generate(
            prompt=PROMPT, output_format=name,  # type: ignore[call-overload]
            extra_body={"seed": 3, "steps": 1, "negative_prompt": "Blurry horses"},
        )  # fmt: skip
        about = client.models.list().data[0].model_extra["x_modelops"]["signing"]  # type: ignore[index]
    data = base64.b64decode(answer.data[0].b64_json)
    receipt = answer.data[0].model_extra["x_modelops"]
    signer = about["certificates"].encode()
    said = read_mark(data, name, signer=signer).generation
    assert said["receipt"] == receipt["id"] and said["pixels_sha256"] == receipt["pixels_sha256"]
    assert said["release_sha256"] == live.node.release_sha256
    assert said["model_sha256"] == live.node.release.model_sha256
    assert (said["seed"], said["steps"], said["development"]) == (3, 1, True)
    assert about["development"] and about["key_id"] == receipt["signature"]["key_id"]
    for text in (PROMPT, "Telling", "zebras", "Blurry"):
        for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
            assert text.encode(encoding) not in data
        assert text.encode().lower() not in data.lower()
    digests = [receipt["request"][f"{kind}_sha256"] for kind in ("prompt", "negative_prompt")]
    assert not any(digest.encode() in data or bytes.fromhex(digest) in data for digest in digests)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        told = json.dumps({str(k): str(v) for k, v in image.info.items()}) + str(image.getexif())
    assert "zebra" not in told.lower()


def test_no_mark_no_pixels(live: live_node.LiveNode) -> None:
    """The real key fails as it would with a chain renewed for another key: nothing is sent."""
    marker = live.node.sealer._marker
    good = marker.key
    other = ec.generate_private_key(ec.SECP256R1())
    try:
        marker.key = dataclasses.replace(good, private_key=other)
        with live.client() as client, pytest.raises(openai.InternalServerError) as error:
            client.images.generate(prompt="sun", extra_body={"steps": 1})
    finally:
        marker.key = good
    assert error.value.status_code == 503 and error.value.code == "provenance_unavailable"
    assert "b64_json" not in error.value.response.text
    with live.client() as client:
        assert client.images.generate(prompt="sun", extra_body={"steps": 1}).data
