"""Chains of certificates of a made-up company: root, intermediate, signer, and faulty ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from modelops.serving.provenance.signing import to_pem

FAULTS = ("self-signed", "order", "alone", "usage", "purpose", "expired", "stranger")


def write_chain(folder: Path, fault: str = "") -> tuple[Path, Path]:
    """Write (key, chain) files; `fault` is one of FAULTS."""
    root, middle, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    chain = [
        _certificate(
            "signer", signer, "middle", middle, usage=fault != "usage",
            purpose=ExtendedKeyUsageOID.SERVER_AUTH if fault == "purpose"
            else ExtendedKeyUsageOID.EMAIL_PROTECTION,
        ),
        _certificate("middle", middle, "root", root, ca=True, days=-1 if fault == "expired" else 9),
        _certificate("root", root, "root", root, ca=True),
    ]  # fmt: skip
    match fault:
        case "self-signed":
            chain = [_certificate("signer", signer, "signer", signer, ca=True)]
        case "order":
            chain[1:] = chain[:0:-1]
        case "alone":
            del chain[1:]
        case "stranger":
            chain[1] = _certificate("middle", root, "root", root, ca=True)
    (folder / "key.pem").write_bytes(
        signer.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "key.pem").chmod(0o600)
    (folder / "chain.pem").write_bytes(to_pem(chain))
    return folder / "key.pem", folder / "chain.pem"


def _certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey, *, ca: bool = False, usage: bool = True,
    purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION, days: float = 9,
) -> x509.Certificate:  # fmt: skip
    now = datetime.now(UTC)

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    public = key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=20))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if usage:
        builder = builder.add_extension(
            x509.KeyUsage(
                digital_signature=not ca, content_commitment=False, key_encipherment=False,
                data_encipherment=False, key_agreement=False, key_cert_sign=ca, crl_sign=ca,
                encipher_only=False, decipher_only=False,
            ),
            critical=True,
        )  # fmt: skip
    if not ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
