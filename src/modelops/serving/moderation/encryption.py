"""Entries encrypted to a reviewer, by HPKE (RFC 9180: X25519, HKDF-SHA256, AES-256-GCM)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.base.errors import IntegrityError, MissingExtraError, UsageError
from modelops.base.files import sha256_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

_INFO = b"modelops quarantine 1"


def encrypt_entry(data: bytes, identity: str, reader: X25519PublicKey) -> bytes:
    """Encrypt an entry's JSON to a reviewer: a line that names the key, then HPKE's output.

    The id is bound to the ciphertext, so that one entry cannot be passed off as another. Entries
    are not signed, so anyone who can write to the folder can add some.
    """
    head = {"kind": "quarantine-sealed", "schema_version": 1, "key_id": key_id(reader)}
    info = _INFO + bytes.fromhex(identity)
    return json.dumps(head).encode() + b"\n" + hpke_suite().encrypt(data, reader, info=info)


def decrypt_entry(data: bytes, identity: str, path: Path, key: X25519PrivateKey | None) -> bytes:
    """Decrypt an entry and return its JSON.

    Args:
        identity: the entry's id, by the name of its file.
        path: of the file, for messages.

    Raises:
        UsageError: no key is given.
        IntegrityError: the entry was changed, or is encrypted to another key.
    """
    from cryptography.exceptions import InvalidTag

    head, _, body = data.partition(b"\n")
    try:
        reader = str(json.loads(head)["key_id"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path}: not a quarantine entry") from error
    if key is None:
        raise UsageError(
            f"{path.name} is encrypted to key {reader[:12]}",
            hint="give the reviewer's private key with --key",
        )
    if key_id(key.public_key()) != reader:
        raise IntegrityError(f"{path.name} is encrypted to key {reader[:12]}, not to the one given")
    try:
        plain: bytes = hpke_suite().decrypt(body, key, info=_INFO + bytes.fromhex(identity))
    except (InvalidTag, ValueError) as error:
        raise IntegrityError(f"{path}: was changed, it does not decrypt") from error
    return plain


def read_public_key(path: str | Path) -> X25519PublicKey:
    """A reviewer's X25519 public key (PEM).

    Raises:
        UsageError: there is none in the file.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _read_key(path, load_pem_public_key, X25519PublicKey, "public")


def read_private_key(path: str | Path) -> X25519PrivateKey:
    """A reviewer's X25519 private key (PEM, without a passphrase).

    Raises:
        UsageError: there is none in the file.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _read_key(
        path, lambda data: load_pem_private_key(data, None), X25519PrivateKey, "private"
    )


def key_id(key: X25519PublicKey) -> str:
    """Hex sha256 of the raw public key."""
    return sha256_bytes(key.public_bytes_raw())


def _read_key(path: str | Path, load: Any, kind: type, what: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = load(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path}: no {what} key in PEM without a passphrase") from error
    if not isinstance(key, kind):
        made = "openssl genpkey -algorithm X25519 -out reviewer.pem"
        public = "openssl pkey -in reviewer.pem -pubout -out reviewer.pub"
        raise UsageError(
            f"{path}: not an X25519 {what} key", hint=made if what == "private" else public
        )
    return key


def hpke_suite() -> Any:
    """HPKE's algorithms.

    Raises:
        MissingExtraError: cryptography is too old for it.
    """
    try:
        from cryptography.hazmat.primitives import hpke
    except ImportError as error:
        raise MissingExtraError(
            "encrypting the quarantine needs a newer cryptography",
            hint="pip install 'cryptography>=47'",
        ) from error
    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
