"""Quarantine of blocked requests, for people who review the filter; off without a folder.

Without it a blocked image is forgotten and only counted. With it each blocked request becomes one
file in a folder that nobody else can read; `modelops serve review` lists, shows and decides them.
The prompt is left out unless the settings ask for it, and nothing is sent anywhere. The folder is
bounded by bytes and by age. Errors here are counted and logged; the request stays blocked.

With a reviewer's public key the files are encrypted (`encryption.py`), so that the node itself
cannot read them again.
"""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter

from modelops import __version__
from modelops.base.errors import ModelopsError
from modelops.base.files import canonical_json, sha256_json, write_bytes
from modelops.base.pixels import pixels_sha256
from modelops.serving.moderation.clock import FolderClock
from modelops.serving.moderation.encryption import encrypt_entry, hpke_suite, read_public_key
from modelops.serving.moderation.entry import BlockedPicture, BlockedRequest, BlockingFilter, Entry
from modelops.serving.moderation.store import (
    SEALED,
    entry_name,
    make_private,
    newest_written,
    tidy_folder,
)
from modelops.serving.provenance.receipts import ReceiptRelease, text_digest, utc_now
from modelops.serving.telemetry.outage import Outage

if TYPE_CHECKING:
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    from modelops.models.request import ImageRequest
    from modelops.serving.provenance.seal import Origin
    from modelops.serving.settings import NodeSettings

log = logging.getLogger("modelops.serving")

Withheld = tuple["npt.NDArray[np.uint8]", "ImageRequest", Sequence[int]]
RESULTS = ("written", "failed", "expired", "displaced")


class Quarantine:
    """Writer of entries to a bounded folder. Thread-safe; only the constructor raises.

    Several processes may share the folder; each may exceed the bound by one entry.

    Args:
        folder: made, for its owner only, when it is missing.
        origin: release and runtime, see `seal.Origin`.
        max_bytes: of all entries together; the oldest are deleted first.
        max_age_s: an entry is deleted when it is this old by the folder's clock, whether or not
            requests come in.
        texts: also keep prompts, and the words for which a prompt was blocked.
        reader: a reviewer's public key; entries are encrypted to it.
        registry: where the counter `modelops_quarantine_total` is registered.
        wall: the machine's clock, in seconds since 1970.

    Raises:
        ModelopsError: the folder cannot be made or written to.
        UsageError: others can read the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        origin: Origin,
        *,
        max_bytes: int,
        max_age_s: float,
        texts: bool = False,
        reader: X25519PublicKey | None = None,
        registry: CollectorRegistry | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder)
        self._clock = FolderClock(self.folder, lambda: newest_written(self.folder), wall)
        self._origin = origin
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._texts, self._reader = texts, reader
        self._lock = threading.Lock()
        self._outage = Outage("quarantine entries")
        self._counter = Counter(
            "modelops_quarantine", "Quarantine entries by what became of them", ["result"],
            registry=registry,
        )  # fmt: skip
        for result in RESULTS:
            self._counter.labels(result)
        make_private(self.folder)
        if reader is not None:
            hpke_suite()
        self._stop = threading.Event()
        self._tidy()
        self._thread = threading.Thread(
            target=self._tidy_now_and_then, name="modelops-quarantine", daemon=True
        )
        self._thread.start()

    def keep_pictures(
        self,
        request_id: str,
        images: Sequence[Withheld],
        scores: Sequence[float],
        blocked: Sequence[bool],
        filter_name: str,
        filter_info: Mapping[str, Any],
        *,
        partial: int | None = None,
    ) -> bool:
        """Write an entry of a request whose images were withheld; return False if it is lost.

        Args:
            images: (pixels [H, W, 3] uint8 RGB, request, batch_rows) of each.
            scores, blocked: the filter's answer for each.
            partial: number of the partial image, if the image was not finished.
        """

        def make() -> Entry:
            return self._entry(
                "image", request_id, images[0][1], filter_name, filter_info,
                partial=partial,
                pictures=[
                    BlockedPicture(
                        index=index,
                        seed=request.seed,
                        score=round(float(score), 6),
                        blocked=bool(stopped),
                        pixels_sha256=pixels_sha256(pixels),
                        batch_rows=list(batch_rows),
                        png=_to_png(pixels) if stopped else None,
                    )
                    for index, ((pixels, request, batch_rows), score, stopped) in enumerate(
                        zip(images, scores, blocked, strict=True)
                    )
                ],
            )  # fmt: skip

        return self._write(make)

    def keep_prompt(
        self,
        request_id: str,
        prompt: str,
        negative_prompt: str,
        reasons: Sequence[str],
        filter_name: str,
        filter_info: Mapping[str, Any],
    ) -> bool:
        """Write an entry of a prompt that was refused; return False if it is lost."""
        from modelops.models.request import ImageRequest

        def make() -> Entry:
            request = ImageRequest(prompt=prompt, seed=0, negative_prompt=negative_prompt)
            return self._entry(
                "prompt", request_id, request, filter_name, filter_info,
                # A word list's reasons quote the prompt.
                reasons=list(reasons) if self._texts else [],
            )  # fmt: skip

        return self._write(make)

    def close(self) -> None:
        """End the thread that deletes what is too old."""
        self._stop.set()
        self._thread.join(5)

    def _entry(
        self,
        stage: Literal["prompt", "image"],
        request_id: str,
        request: ImageRequest,
        name: str,
        info: Mapping[str, Any],
        **more: Any,
    ) -> Entry:
        origin = self._origin
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}
        size = f"{request.width}x{request.height}" if request.width and request.height else None
        threshold = info.get("threshold")
        return Entry(
            id=uuid.uuid4().hex,
            created=utc_now(),
            modelops=__version__,
            stage=stage,
            request_id=request_id,
            request=BlockedRequest(
                **(texts if self._texts else {}),
                prompt_sha256=text_digest(texts["prompt"]),
                negative_prompt_sha256=text_digest(texts["negative_prompt"]),
                steps=request.steps, guidance=request.guidance, size=size,
            ),
            release=ReceiptRelease(
                name=origin.release.name, version=origin.release.version,
                sha256=origin.release_sha256,
            ),
            model_sha256=origin.model_sha256,
            runtime=origin.source.runtime,
            precision=origin.source.precision,
            filter=BlockingFilter(
                name=name,
                sha256=sha256_json(dict(info)),
                threshold=threshold if isinstance(threshold, float | int) else None,
                info=dict(info),
            ),
            **more,
        )  # fmt: skip

    def _write(self, make: Any) -> bool:
        try:
            entry: Entry = make()
            data = canonical_json(entry.model_dump(exclude_none=True)).encode()
            suffix = ".json"
            if self._reader is not None:
                data, suffix = encrypt_entry(data, entry.id, self._reader), SEALED
            if len(data) > self._max_bytes:  # others are not deleted for it
                raise ModelopsError(f"an entry of {len(data)} bytes is over the bound")
            with self._lock:
                now = self._tidy(len(data))
                name = entry_name(self.folder, entry.id, suffix, now)
                write_bytes(self.folder / name, data, private=True)
        except Exception as error:  # whatever it is, the request stays blocked
            self._counter.labels("failed").inc()
            # Another's text may quote the prompt.
            self._outage.failed(
                error.message if isinstance(error, ModelopsError) else type(error).__name__
            )
            return False
        self._outage.worked()
        self._counter.labels("written").inc()
        return True

    def _tidy_now_and_then(self) -> None:
        while not self._stop.wait(min(3600.0, max(1.0, self._max_age_s / 10))):
            try:
                with self._lock:
                    self._tidy()
            except Exception as error:  # a folder that comes back later has entries to be deleted
                log.warning("quarantine: old entries cannot be deleted now: %s", error)

    def _tidy(self, room: int = 0) -> float:
        """Delete what is too old, and the oldest until `room` bytes fit; return the time."""
        now = self._clock.now()
        expired, displaced = tidy_folder(
            self.folder, max_age_s=self._max_age_s, max_bytes=self._max_bytes - room, now=now
        )
        self._counter.labels("expired").inc(expired)
        self._counter.labels("displaced").inc(displaced)
        return now


def open_quarantine(
    settings: NodeSettings, origin: Origin, registry: CollectorRegistry | None = None
) -> Quarantine | None:
    """Open the quarantine that the settings ask for, or return None.

    Raises:
        UsageError: see `check_quarantine`.
        ModelopsError: the folder cannot be written to.
    """
    reader = check_quarantine(settings)
    if not settings.quarantine:
        return None
    return Quarantine(
        settings.quarantine,
        origin,
        max_bytes=settings.quarantine_mb * 1_000_000,
        max_age_s=settings.quarantine_days * 86400,
        texts=settings.quarantine_prompts == "text",
        reader=reader,
        registry=registry,
    )


def check_quarantine(settings: NodeSettings) -> X25519PublicKey | None:
    """Read the reviewer's key that the settings name, if any; writes nothing.

    Raises:
        UsageError: the key cannot be read.
    """
    return read_public_key(settings.quarantine_key) if settings.quarantine_key else None


def _to_png(pixels: Any) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
