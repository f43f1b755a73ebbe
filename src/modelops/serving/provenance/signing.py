"""Signing key of a node: a configured key and chain, or a development key made here.

One P-256 key signs both the C2PA manifest of an image (ES256) and its receipt (ECDSA with SHA-256
over DSSE's pre-authentication encoding). P-256 in PEM is also what the `model-signing` tool takes,
so a team can keep one kind of key.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import cache_directory, sha256_bytes

log = logging.getLogger("modelops.serving")

ALGORITHM = "ecdsa-p256-sha256"
DEVELOPMENT = "modelops DEVELOPMENT, not for production"  # the organisation in its certificates
DEVELOPMENT_FILE = "development.pem"
_YEARS = timedelta(days=3650)


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """Private key and its certificates.

    Attributes:
        private_key: P-256.
        chain: the signer's certificate first, then its issuers, PEM.
        key_id: hex sha256 of the public key (DER, SubjectPublicKeyInfo).
        serial: of the signer's certificate, decimal; C2PA readers show it.
        development: whether it is this machine's development key.
    """

    private_key: ec.EllipticCurvePrivateKey
    chain: bytes
    key_id: str
    serial: str
    development: bool

    @property
    def key_pem(self) -> bytes:
        """Return the private key as unencrypted PKCS #8 PEM. Never log it."""
        return _private_pem(self.private_key)

    def sign(self, payload_type: str, payload: bytes) -> str:
        """Return the base64 (DER) signature over DSSE's encoding of a payload and its type."""
        message = pre_authentication_encoding(payload_type, payload)
        signature = self.private_key.sign(message, ec.ECDSA(hashes.SHA256()))
        return base64.b64encode(signature).decode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyingKey:
    """Trusted public key and its digest; `chain` (PEM) if it came with one."""

    public_key: ec.EllipticCurvePublicKey
    key_id: str
    chain: bytes | None = None

    def verify(self, payload_type: str, payload: bytes, signature: str) -> None:
        """Raise IntegrityError unless `signature` (base64) is this key's over the payload."""
        message = pre_authentication_encoding(payload_type, payload)
        try:
            self.public_key.verify(
                base64.b64decode(signature, validate=True), message, ec.ECDSA(hashes.SHA256())
            )
        except (InvalidSignature, ValueError) as error:
            raise IntegrityError("the signature does not match the content") from error


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Encode by DSSE's PAE v1 what is signed, so that one type can never pass for another.

    https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def open_signing_key(key: str | Path | None = None, chain: str | Path | None = None) -> SigningKey:
    """Open the configured key with its chain, or this machine's development key without one.

    Args:
        key: PEM with an unencrypted P-256 private key.
        chain: PEM with the signer's certificate first, then its issuers.

    Raises:
        UsageError: only one of the two is given, a file is not such a PEM, or the certificate is
            not the key's or not valid today.
    """
    if not key and not chain:
        return development_key()
    if not key or not chain:
        raise UsageError(
            "a signing key needs its certificate chain, and the other way round",
            hint="set both MODELOPS_SIGNING_KEY and MODELOPS_SIGNING_CHAIN, or neither",
        )
    private = _read_private_key(Path(key))
    if Path(key).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("%s: others on this machine can read the signing key", key)
    return _signing_key(private, _read(Path(chain)), where=str(chain), development=False)


def development_key(folder: str | Path | None = None) -> SigningKey:
    """Open this machine's development key, made on first use in a folder only its owner can read.

    Args:
        folder: `signing` in modelops' cache when not given.

    Raises:
        IntegrityError: others can read the file.
        ModelopsError: the file cannot be written.
    """
    path = Path(folder or cache_directory("signing")) / DEVELOPMENT_FILE
    if not path.exists():
        _make_development_file(path)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise IntegrityError(
            f"{path}: others can read this key", hint="delete it; a new one is made at next use"
        )
    data = _read(path)
    return _signing_key(_read_private_key(path), data, where=str(path), development=True)


def load_verifying_key(path: str | Path) -> VerifyingKey:
    """Load the key of a PEM file: a public key, or the first certificate of a chain.

    Raises:
        UsageError: the file is not such a PEM, or the key is not P-256.
    """
    data, chain = _read(Path(path)), None
    try:
        if b"BEGIN CERTIFICATE" in data:
            certificates = x509.load_pem_x509_certificates(data)
            public, chain = certificates[0].public_key(), to_pem(certificates)
        else:
            public = serialization.load_pem_public_key(data)  # type: ignore[assignment]
    except (ValueError, IndexError) as error:
        raise UsageError(f"{path}: neither a public key nor a certificate in PEM") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise UsageError(f"{path}: not a P-256 key")
    return VerifyingKey(public_key=public, key_id=key_id(public), chain=chain)


def find_verifying_key(path: str | Path | None = None) -> VerifyingKey:
    """Find the key to trust: the named one, the configured chain's, or the development key.

    Raises:
        UsageError: there is none of these.
    """
    chosen = path or os.environ.get("MODELOPS_SIGNING_CHAIN")
    if chosen:
        return load_verifying_key(chosen)
    own = cache_directory("signing") / DEVELOPMENT_FILE
    if own.is_file():
        return load_verifying_key(own)
    raise UsageError(
        "no key to check the signature with",
        hint="name the node's certificate with --key; /v1/models shows it",
    )


def key_id(public: ec.EllipticCurvePublicKey) -> str:
    """Return the hex sha256 of a public key's DER."""
    return sha256_bytes(
        public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def make_certificates(
    *, organisation: str, days: float = 365
) -> tuple[ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
    """Make a new P-256 key with [its certificate, the root that issued it] for C2PA.

    The root's key is thrown away: it can never issue another. The profile (X.509 v3, not
    self-signed, digital signature only, e-mail protection, both key identifiers) is the C2PA
    specification's for signing credentials.
    """
    start = datetime.now(UTC) - timedelta(days=1)  # clocks differ
    end = start + timedelta(days=1 + days)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def name(common: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
                x509.NameAttribute(NameOID.COMMON_NAME, common),
            ]
        )

    def builder(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("modelops root"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )

    root = (
        builder("modelops root", root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificates=True), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    leaf = (
        builder("modelops image signer", key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()),
            critical=False,
        )
        .sign(root_key, hashes.SHA256())
    )
    return key, [leaf, root]


def to_pem(certificates: Sequence[x509.Certificate]) -> bytes:
    """Join certificates as one PEM text."""
    return b"".join(
        certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates
    )


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=certificates,
        crl_sign=certificates, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _make_development_file(path: Path) -> None:
    key, certificates = make_certificates(organisation=DEVELOPMENT, days=_YEARS.days)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # mode 0600
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_private_pem(key) + to_pem(certificates))
                file.flush()
                os.fsync(file.fileno())
            # A link never replaces: of two processes that make one at once, the first one's stays.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ModelopsError(
            f"{path}: a development signing key cannot be kept here: {error.strerror or error}",
            hint="set MODELOPS_SIGNING_KEY and MODELOPS_SIGNING_CHAIN, or MODELOPS_CACHE",
        ) from error


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _signing_key(
    private: ec.EllipticCurvePrivateKey, chain: bytes, *, where: str, development: bool
) -> SigningKey:
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError as error:
        raise UsageError(f"{where}: holds no certificate chain in PEM") from error
    leaf, now = certificates[0], datetime.now(UTC)
    public = leaf.public_key()
    own = key_id(private.public_key())
    if not isinstance(public, ec.EllipticCurvePublicKey) or key_id(public) != own:
        raise UsageError(
            f"{where}: the first certificate is not the signing key's",
            hint="put the signer's own certificate first, then its issuers",
        )
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise UsageError(
            f"{where}: the certificate is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to "
            f"{leaf.not_valid_after_utc:%Y-%m-%d} only",
            hint="delete the file, a new one is made" if development else "renew the certificate",
        )
    for number, (certificate, issuer) in enumerate(pairwise(certificates), 1):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise UsageError(
                f"{where}: certificate {number + 1} did not issue certificate {number}",
                hint="the signer's own certificate comes first, then each one's issuer",
            ) from error
    return SigningKey(
        private_key=private,
        chain=to_pem(certificates),
        key_id=own,
        serial=str(leaf.serial_number),
        development=development,
    )


def _read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        private = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:  # the library's message may quote the file
        raise UsageError(f"{path}: holds no unencrypted private key in PEM") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name != "secp256r1":
        raise UsageError(
            f"{path}: not a P-256 key", hint="openssl ecparam -genkey -name prime256v1"
        )
    return private


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
