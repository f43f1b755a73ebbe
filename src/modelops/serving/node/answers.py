"""Answers to requests: filtered, marked and encoded images, with their receipts."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from modelops.serving.api import ApiError, ImageData, ImagesRequest, ImagesResponse, as_api_errors
from modelops.serving.engine.jobs import EngineImage, Job
from modelops.serving.moderation.quarantine import Quarantine, Withheld
from modelops.serving.node.filters import NodeFilters
from modelops.serving.provenance.seal import Sealer
from modelops.serving.telemetry.drift import DriftLog
from modelops.serving.telemetry.metrics import NodeMetrics
from modelops.serving.telemetry.tracing import RequestTrace

log = logging.getLogger("modelops.serving")


@dataclass(slots=True)
class Ticket:
    """Accepted request: its jobs in the engine."""

    request: ImagesRequest
    jobs: list[Job]
    trace: RequestTrace
    started: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """Stop the work before its next step."""
        for job in self.jobs:
            job.cancel()


class AnswerMaker:
    """Maker of answers from the engine's images. Thread-safe.

    Args:
        filters: the node's; images that they block are not sent.
        sealer: marks and encodes images and keeps receipts.
        metrics: count what was done.
        size: of every image, "WIDTHxHEIGHT".
        quarantine: keeps images that were blocked.
        drift: notes images for monitoring.
    """

    def __init__(
        self,
        filters: NodeFilters,
        sealer: Sealer,
        metrics: NodeMetrics,
        *,
        size: str,
        quarantine: Quarantine | None,
        drift: DriftLog | None,
    ) -> None:
        self.filters, self.sealer, self.metrics = filters, sealer, metrics
        self.size, self.quarantine, self.drift = size, quarantine, drift

    def finish(self, ticket: Ticket, images: Sequence[EngineImage]) -> ImagesResponse:
        """Filter and encode the images of a ticket.

        Raises:
            ApiError: 400 (withheld by the filter) or 503 (the filter gave no answer).
        """
        observe, trace = self.metrics.on_phase, ticket.trace
        for name, began, ended in (phase for image in images for phase in image.phases):
            observe(name, trace.add(name, began, ended))
        with trace.phase("image_filter"):
            scores, blocked = self.filters.check_images([one.pixels for one in images])
        observe("image_filter", trace.seconds()["image_filter"])
        self.metrics.on_filter("image", len(images), blocked=any(blocked))
        if self.drift is not None:
            seconds = {**trace.seconds(), "total": time.monotonic() - ticket.started}
            self.drift.note_images(trace.id, images, scores, blocked, seconds)
        if any(blocked):
            self._keep_blocked(
                trace, [(one.pixels, one.request, one.batch_rows) for one in images],
                scores, blocked,
            )  # fmt: skip
            raise ApiError(
                400, "content_policy_violation",
                "the image was withheld by the image filter; try another seed or prompt",
            )  # fmt: skip
        output_format = ticket.request.output_format or "png"
        with trace.phase("encode"):
            data = [
                self._encode(image, output_format, score)
                for image, score in zip(images, scores, strict=True)
            ]
        observe("encode", trace.seconds()["encode"])
        observe("total", time.monotonic() - ticket.started)
        self.metrics.on_images(output_format, len(data))
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=output_format,
            size=self.size,
        )

    def preview(self, ticket: Ticket, index: int, pixels: npt.NDArray[np.uint8]) -> bytes:
        """Filter and mark a partial image of a ticket, so that it may leave; it has no receipt.

        Args:
            index: 0-based number of the partial image.
            pixels: [H, W, 3] uint8 RGB.

        Raises:
            ApiError: as `finish`.
        """
        (score,), (blocked,) = self.filters.check_images([pixels])
        if blocked:
            self.metrics.on_filter("image", 1, blocked=True)
            self._keep_blocked(
                ticket.trace, [(pixels, ticket.jobs[0].request, ())], [score], [True], partial=index
            )
            raise ApiError(
                400, "content_policy_violation",
                "an unfinished image was withheld by the image filter, and the work stopped; try "
                "another seed or prompt",
            )  # fmt: skip
        with as_api_errors():
            return self.sealer.seal_partial(
                pixels, ticket.jobs[0].request, ticket.request.output_format or "png", index
            )

    def _keep_blocked(
        self,
        trace: RequestTrace,
        images: Sequence[Withheld],
        scores: Sequence[float],
        blocked: Sequence[bool],
        *,
        partial: int | None = None,
    ) -> None:
        if self.quarantine is not None:
            self.quarantine.keep_pictures(
                trace.id, images, scores, blocked,
                self.sealer.origin.filters["image"], self.filters.image.info, partial=partial,
            )  # fmt: skip

    def _encode(self, image: EngineImage, output_format: str, score: float) -> ImageData:
        with as_api_errors():
            encoded, receipt = self.sealer.seal(image, output_format, score)
        return ImageData(b64_json=base64.b64encode(encoded).decode("ascii"), x_modelops=receipt)
