"""Sealing of finished pixels before they leave the node: encoded file, manifest and receipt.

    pixels ─▶ encode ─▶ C2PA manifest ─▶ read back ─▶ receipt ─▶ signed ─▶ kept ─▶ sent

With a watermark key, an invisible watermark is put in before the encoding. Without a manifest no
image is sent. If the disk has no room for the receipt the image is still sent (the receipt is in
the answer too), unless the settings say "refuse".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelops import __version__
from modelops.base.files import sha256_bytes
from modelops.base.pixels import pixels_sha256
from modelops.serving.failures import ReceiptError
from modelops.serving.provenance.images import MARK, encode_image
from modelops.serving.provenance.manifests import Marker
from modelops.serving.provenance.receipts import (
    ReceiptLog,
    new_receipt_id,
    sign_receipt,
    text_digest,
    utc_now,
    without_texts,
)
from modelops.serving.provenance.signing import open_signing_key
from modelops.serving.provenance.watermark import METHOD, Watermark, open_watermark

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from prometheus_client import CollectorRegistry

    from modelops.models.request import ImageRequest
    from modelops.records.evaluation import SourceInfo
    from modelops.records.release import ReleaseRecord
    from modelops.serving.engine.jobs import EngineImage
    from modelops.serving.settings import NodeSettings

log = logging.getLogger("modelops.serving")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Facts that all images of a node share; `filters` by kind, "prompt" and "image".
    `model_sha256` is of what was opened: the release's model, or its fallback.
    """

    release: ReleaseRecord
    release_sha256: str
    model_sha256: str
    source: SourceInfo
    filters: Mapping[str, str]


class Sealer:
    """Sealer of images. Thread-safe.

    Args:
        origin: see Origin.
        settings: signing_key, signing_chain, watermark_key, and the receipts' settings.
        registry: for the counter of receipts.

    Raises:
        UsageError: a key, chain or setting cannot be used.
        MissingExtraError: c2pa-python is not installed.
        ModelopsError: the receipts' folder cannot be written to.
    """

    def __init__(
        self, origin: Origin, settings: NodeSettings, registry: CollectorRegistry | None = None
    ) -> None:
        self.origin = origin
        self._refuse = settings.receipts_failure == "refuse"
        self._texts = settings.receipts_prompts == "text"
        self.key = open_signing_key(settings.signing_key, settings.signing_chain)
        release = origin.release
        self.watermark: Watermark | None = (
            open_watermark(settings.watermark_key) if settings.watermark_key else None
        )
        self._marker = Marker(self.key, software=(release.name, release.version))
        self.receipts = (
            ReceiptLog(
                settings.receipts,
                max_bytes=settings.receipts_mb * 1_000_000,
                writers=settings.workers,
                registry=registry,
            )
            if settings.receipts
            else None
        )
        if self.key.development:
            log.warning(
                "DEVELOPMENT signing key: the images are marked, but by nobody anyone can trust; "
                "set MODELOPS_SIGNING_KEY and MODELOPS_SIGNING_CHAIN in production"
            )

    @property
    def about(self) -> dict[str, Any]:
        """Describe how others can check what this node signs: the key's digest and its
        certificates.
        """
        return {
            "key_id": self.key.key_id,
            "development": self.key.development,
            "certificates": self.key.chain.decode("ascii"),
        }

    def seal(
        self, image: EngineImage, output_format: str, image_score: float
    ) -> tuple[bytes, dict[str, Any]]:
        """Return (file, signed receipt) of an image that passed the filters.

        Raises:
            ProvenanceError: the image cannot be marked and must not be sent.
            ReceiptError: the receipt cannot be written, and the settings say "refuse".
        """
        request, release = image.request, self.origin.release
        receipt_id = new_receipt_id()
        shown, watermark = self._with_watermark(image.pixels)
        generation = {
            **self._generation(request, image.pixels), **watermark, "receipt": receipt_id
        }  # fmt: skip
        encoded = encode_image(shown, output_format, _visible(generation))
        marked = self._marker.embed(encoded, output_format, generation)
        content = {
            **watermark,
            "kind": "receipt",
            "schema_version": 1,
            "id": receipt_id,
            "created": utc_now(),
            "modelops": __version__,
            "request": {
                "prompt": request.prompt,
                "prompt_sha256": text_digest(request.prompt),
                "negative_prompt": request.negative_prompt,
                "negative_prompt_sha256": text_digest(request.negative_prompt),
                "seed": request.seed,
                "steps": request.steps,
                "guidance": request.guidance,
                "size": generation["size"],
                "output_format": output_format,
            },
            "release": {
                "name": release.name,
                "version": release.version,
                "sha256": self.origin.release_sha256,
            },
            "model_sha256": self.origin.model_sha256,
            "runtime": self.origin.source.runtime,
            "precision": self.origin.source.precision,
            "batch_rows": list(image.batch_rows),
            "mean_rows": round(image.mean_rows, 2),
            "filters": {
                "prompt": self.origin.filters["prompt"],
                "image": self.origin.filters["image"],
                "image_score": round(image_score, 6),
            },
            "pixels_sha256": generation["pixels_sha256"],
            "output_sha256": sha256_bytes(marked),
            "output_bytes": len(marked),
            "queue_s": round(image.queue_s, 4),
            "denoise_s": round(image.denoise_s, 4),
        }
        receipt = sign_receipt(content, self.key)
        self._keep(receipt)
        return marked, receipt

    def seal_partial(
        self, pixels: npt.NDArray[np.uint8], request: ImageRequest, output_format: str, index: int
    ) -> bytes:
        """Return the file of a partial image [H, W, 3] that passed the filter: marked, no receipt.

        Args:
            request: as the engine filled it in.
            index: 0-based number of the partial image, which its manifest holds.

        Raises:
            ProvenanceError: the image cannot be marked and must not be sent.
        """
        shown, watermark = self._with_watermark(pixels)
        generation = {
            **self._generation(request, pixels), **watermark, "partial_image_index": index
        }  # fmt: skip
        encoded = encode_image(shown, output_format, _visible(generation))
        return self._marker.embed(encoded, output_format, generation)

    def _with_watermark(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        """Return (pixels to send, the watermark's entry in manifest and receipt; {} without)."""
        if self.watermark is None:
            return pixels, {}
        made = self.watermark.embed(pixels)
        said = {
            "method": METHOD,
            "key_id": self.watermark.key_id,
            "psnr_db": round(made.psnr_db, 2),
            "z": round(made.detection.z, 2),
            "found": made.detection.found,
            "pixels_sha256": pixels_sha256(made.pixels),
        }
        return made.pixels, {"watermark": said}

    def _generation(self, request: ImageRequest, pixels: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """Describe how an image was made, without the prompt: this goes where the image goes."""
        release = self.origin.release
        return {
            "release": f"{release.name} {release.version}",
            "release_sha256": self.origin.release_sha256,
            "model_sha256": self.origin.model_sha256,
            "runtime": self.origin.source.runtime,
            "seed": request.seed,
            "steps": request.steps,
            "guidance": request.guidance,
            "size": f"{request.width}x{request.height}",
            "pixels_sha256": pixels_sha256(pixels),
        }

    def close(self) -> None:
        """Close the receipts' file."""
        if self.receipts is not None:
            self.receipts.close()

    def _keep(self, receipt: Mapping[str, Any]) -> None:
        if self.receipts is None:
            return
        kept = self.receipts.write(receipt if self._texts else without_texts(receipt))
        if not kept and self._refuse:
            raise ReceiptError("the receipt cannot be kept, so no image is sent")


def _visible(generation: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata for programs that know no C2PA, which read it in the file itself."""
    return {
        "Software": "modelops",
        "Notice": MARK,
        "seed": str(generation["seed"]),
        "steps": str(generation["steps"]),
        "guidance": f"{generation['guidance']:g}",
        "release": generation["release"],
        "release_sha256": generation["release_sha256"],
    }
