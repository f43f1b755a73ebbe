"""Signed C2PA manifests of encoded images, read back before an image is sent.

The manifest names the kind of source (IPTC `trainedAlgorithmicMedia`), the release, the seed and
the receipt. It never holds the prompt, nor a digest of it (a short prompt can be guessed from its
digest). An image that cannot be marked, or whose mark does not read back, is not sent:
ProvenanceError.

No trusted timestamp is requested (it would put a third party's server between model and client), so
a manifest outlives its certificate only for readers that keep the receipt.

Content Credentials specification 2.3: https://spec.c2pa.org/specifications/specifications/2.3/
"""

from __future__ import annotations

import importlib
import io
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from modelops import __version__
from modelops.base.errors import IntegrityError, MissingExtraError, ModelopsError, UsageError
from modelops.serving.failures import ProvenanceError
from modelops.serving.provenance.images import SOURCE_TYPE
from modelops.serving.provenance.signing import SigningKey, to_pem

ASSERTION = "org.modelops.generation"
GENERATOR = "modelops"
MIME_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_SETTINGS: dict[str, dict[str, Any]] = {
    # Nothing here may use the network: no remote manifests, no revocation lists.
    "verify": {
        "verify_trust": False,  # we compare the certificate with our own, see `read_back`
        "verify_after_sign": False,  # done by reading the final bytes
        "remote_manifest_fetch": False,
        "ocsp_fetch": False,
    },
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """Content of an image's manifest.

    Attributes:
        generation: our assertion: release and model digests, seed, steps, guidance, size, pixel
            digest, receipt id, the watermark if there is one, and `development` when signed with a
            development key.
        generator: claim generator and version, such as "modelops 0.1.0".
        source_type: IPTC's digital source type.
        serial: of the signer's certificate, decimal.
        issuer: the organisation in the certificate.
    """

    generation: dict[str, Any]
    generator: str
    source_type: str
    serial: str
    issuer: str


class Marker:
    """Marker that embeds manifests with one key. Thread-safe.

    Args:
        key: signing key; see `modelops.serving.provenance.signing`.
        software: name and version of the release, the manifest's software agent.

    Raises:
        MissingExtraError: c2pa-python is not installed.
        UsageError: C2PA refuses the certificate, or its chain does not verify what it signed.
    """

    def __init__(self, key: SigningKey, *, software: tuple[str, str]) -> None:
        self.key = key
        self._software = {"name": software[0], "version": software[1]}
        self._c2pa = _library()
        self._made = threading.local()
        self._probe()

    def embed(self, encoded: bytes, output_format: str, generation: Mapping[str, Any]) -> bytes:
        """Return the image with a manifest, which was read back from these bytes.

        Args:
            encoded: a PNG, JPEG or WebP file.
            output_format: "png", "jpeg" or "webp".
            generation: our assertion; JSON values.

        Raises:
            ProvenanceError: the manifest cannot be embedded, or reads back differently.
        """
        said = {**generation, "development": True} if self.key.development else dict(generation)
        try:
            marked = self._sign(encoded, MIME_TYPES[output_format], said)
            found = read_mark(marked, output_format)
        except ModelopsError as error:
            raise ProvenanceError(f"the manifest did not read back: {error.message}") from error
        except Exception as error:  # the library's, which come from native code
            raise ProvenanceError(f"no manifest ({type(error).__name__}: {error})") from error
        expected = (said, f"{GENERATOR} {__version__}", SOURCE_TYPE, self.key.serial)
        if (found.generation, found.generator, found.source_type, found.serial) != expected:
            raise ProvenanceError("the manifest reads back as another than was written")
        return marked

    def _sign(self, encoded: bytes, mime_type: str, said: dict[str, Any]) -> bytes:
        c2pa, out = self._c2pa, io.BytesIO()
        action = {
            "action": "c2pa.created",
            "digitalSourceType": SOURCE_TYPE,
            "softwareAgent": self._software,
        }
        actions = [action]
        if "watermark" in said:
            # "unbound": it leads to no manifest, so it creates no soft binding. New in 2.3, which
            # deprecates plain `c2pa.watermarked`; that one and `.bound` are invalid without one.
            actions.append({"action": "c2pa.watermarked.unbound"})
        manifest = {
            "claim_generator_info": [{"name": GENERATOR, "version": __version__}],
            "title": "AI generated image",
            # "created": what is gathered only is not attributed to the signer (2.3, chapter 10).
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": actions}, "created": True},
                {"label": ASSERTION, "data": said, "created": True},
            ],
        }
        with c2pa.Builder(json.dumps(manifest), _context()) as builder:
            builder.sign(self._signer(), mime_type, io.BytesIO(encoded), out)
        return out.getvalue()

    def _signer(self) -> Any:
        """Return this thread's signer, whose key is read once (a fifth of an embedding's time)."""
        if getattr(self._made, "key", None) is not self.key:
            c2pa = self._c2pa
            self._made.signer = c2pa.Signer.from_info(
                c2pa.C2paSignerInfo(
                    c2pa.C2paSigningAlg.ES256, self.key.chain, self.key.key_pem, None
                )
            )
            self._made.key = self.key
        return self._made.signer

    def _probe(self) -> None:
        """Refuse a key or chain at start that C2PA does not accept, or that verifies no image."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        try:
            marked = self.embed(buffer.getvalue(), "png", {"probe": True})
        except ProvenanceError as error:
            raise UsageError(
                f"C2PA refuses the signing key or its certificates: {error.message}",
                hint="the certificate needs digitalSignature, e-mail protection or document "
                "signing, and must not be self-signed",
            ) from error
        try:
            read_mark(marked, "png", signer=self.key.chain)
        except (IntegrityError, UsageError) as error:
            raise UsageError(
                f"the signing chain verifies no image that its key signs: {error.message}",
                hint="it needs the signer's own certificate, then its issuers, valid today",
            ) from error


def read_mark(encoded: bytes, output_format: str, *, signer: bytes | None = None) -> Marked:
    """Read an image's manifest and check its signature and its hash of the image.

    Args:
        output_format: "png", "jpeg" or "webp".
        signer: certificates (PEM); the first one must have signed it, and the next one issued the
            first. Without them any signer is accepted.

    Raises:
        IntegrityError: there is no modelops manifest, or it does not fit the image.
        MissingExtraError: c2pa-python is not installed.
    """
    c2pa = _library()
    leaf, anchors = (None, None) if signer is None else _leaf_and_anchors(signer)
    try:
        with c2pa.Reader(
            MIME_TYPES[output_format], io.BytesIO(encoded), context=_context(anchors)
        ) as reader:
            state = reader.get_validation_state()
            manifest: dict[str, Any] = reader.get_active_manifest() or {}
            problems = (reader.get_validation_results() or {}).get("activeManifest", {})
    except (c2pa.C2paError, KeyError) as error:  # KeyError: the store lacks what it calls active
        raise IntegrityError(f"no readable C2PA manifest ({str(error).splitlines()[0]})") from error
    if state not in (("Valid", "Trusted") if signer is None else ("Trusted",)):
        codes = sorted({str(entry.get("code")) for entry in problems.get("failure", [])})
        raise IntegrityError(f"its C2PA manifest is {state}: {', '.join(codes) or 'no reason'}")
    try:
        data = {entry["label"]: entry["data"] for entry in manifest["assertions"]}
        generator = manifest["claim_generator_info"][0]
        found = Marked(
            generation=dict(data[ASSERTION]),
            generator=f"{generator['name']} {generator['version']}",
            source_type=str(data["c2pa.actions.v2"]["actions"][0]["digitalSourceType"]),
            serial=str(manifest["signature_info"]["cert_serial_number"]),
            issuer=str(manifest["signature_info"].get("issuer", "")),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise IntegrityError(f"its C2PA manifest is not modelops' (no {error})") from error
    if leaf is not None and found.serial != str(leaf.serial_number):
        raise IntegrityError("its C2PA manifest is signed with another certificate")
    return found


def _leaf_and_anchors(chain: bytes) -> tuple[x509.Certificate, bytes]:
    leaf, *issuers = x509.load_pem_x509_certificates(chain)
    if not issuers:
        raise UsageError(
            "an image's manifest is checked with the signer's certificate and its issuer's",
            hint="put the issuer's certificate into the same file",
        )
    return leaf, to_pem(issuers)


def _library() -> Any:
    """Import c2pa-python, which loads a large native library, only when it is needed."""
    try:
        return importlib.import_module("c2pa")
    except ImportError as error:
        raise MissingExtraError(
            "C2PA manifests need the package c2pa-python, which is not installed",
            hint="pip install c2pa-python",
        ) from error


_local = threading.local()


def _context(anchors: bytes | None = None) -> Any:
    """Make a C2PA context: native state, cheap to keep, but not documented as thread-safe."""
    c2pa = _library()
    if anchors is not None:
        trusting = {**_SETTINGS, "verify": {**_SETTINGS["verify"], "verify_trust": True}}
        return c2pa.Context.from_dict(
            {**trusting, "trust": {"user_anchors": anchors.decode("ascii")}}
        )
    if not hasattr(_local, "context"):
        _local.context = c2pa.Context.from_dict(_SETTINGS)
    return _local.context


def picture_format(data: bytes) -> str | None:
    """Return "png", "jpeg" or "webp" by a file's first bytes, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
