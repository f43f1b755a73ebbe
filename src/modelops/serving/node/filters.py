"""Prompt filter and image filter of a node; without their answer nothing passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.safety.probe import probe_images
from modelops.safety.registry import check_image_filter, parse_filter
from modelops.serving.api import failure_to_api_error
from modelops.serving.failures import FilterError
from modelops.serving.moderation.guard import FilterGuard
from modelops.serving.node.load import image_filter_loader, prompt_filter_loader
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.metrics import NodeMetrics
from modelops.serving.telemetry.tracing import RequestTrace

GOOD_PROMPT = "a smiling yellow sun"
BAD_PROMPT = "explicit hardcore porn"


class NodeFilters:
    """Both filters, each behind a guard that turns red when it fails.

    Args:
        settings: these name the filters.
        prompt, image: functions that load other filters in their place.
        store: folder in which the workers of a node share a filter's weights.

    Raises:
        UsageError: the settings name a filter that does not exist or is not pinned.
    """

    metrics: NodeMetrics  # given by the node, which names the filters in them

    def __init__(
        self,
        settings: NodeSettings,
        prompt: Callable[[], Any] | None = None,
        image: Callable[[], Any] | None = None,
        *,
        store: Path | None = None,
    ) -> None:
        self.names = {
            "prompt": "custom" if prompt else parse_filter(settings.prompt_filter).name,
            "image": "custom"
            if image
            else check_image_filter(settings.image_filter, pinned=True).name,
        }
        prompt = prompt or prompt_filter_loader(settings.prompt_filter)
        image = image or image_filter_loader(settings.image_filter, store)
        self.prompt = FilterGuard("prompt", prompt, timeout_s=settings.filter_timeout_s)
        self.image = FilterGuard("image", image, timeout_s=settings.filter_timeout_s)

    def problems(self) -> list[str]:
        """Return why filters are red; nothing is probed."""
        guards = (self.prompt, self.image)
        return [f"{guard.name} filter {guard.reason}" for guard in guards if guard.reason]

    def probe(self, golden: npt.NDArray[np.uint8] | None, *, every_s: float = 0.0) -> None:
        """Try red filters on inputs whose answers are known.

        Args:
            golden: the golden image [H, W, 3], which must pass. The image filter's scores of it and
                of the probe images must not all be the same.
            every_s: seconds that must lie between two probes of a filter.
        """

        def probe_prompt() -> None:
            if self.prompt.check_prompt(GOOD_PROMPT)[0]:
                raise self.prompt.broken("blocks a harmless prompt")
            if not self.prompt.check_prompt(BAD_PROMPT)[0]:
                raise self.prompt.broken("lets a known bad prompt through")

        def probe_image() -> None:
            if golden is None:
                raise self.image.broken("has no golden image to be tried on")
            scores, blocked = self.image.check_images([golden, *probe_images()])
            if blocked[0]:
                unsafe = self.image.info.get("unsafe_labels")
                labels = f" (unsafe labels: {', '.join(unsafe)})" if unsafe else ""
                raise self.image.broken(f"withholds the golden image{labels}")
            self.image.require_discerning(scores)

        for guard, check in ((self.prompt, probe_prompt), (self.image, probe_image)):
            if guard.reason is not None and not guard.probe(check, every_s=every_s):
                self.metrics.on_filter_failure(guard.name)

    def check_prompts(
        self, texts: Mapping[str, str], trace: RequestTrace
    ) -> tuple[str | None, list[str]]:
        """Return the name of the first text that is blocked, or None, and the reasons.

        Args:
            texts: those of one request, by name.

        Raises:
            ApiError: 503, the filter gave no answer.
        """
        param: str | None = None
        reasons: list[str] = []
        try:
            with trace.phase("prompt_filter"):
                for name, text in texts.items():
                    blocked, reasons = self.prompt.check_prompt(text)
                    if blocked:
                        param = name
                        break
        except FilterError as error:
            self.metrics.on_filter_failure("prompt")
            raise failure_to_api_error(error) from error
        self.metrics.on_phase("prompt_filter", trace.seconds()["prompt_filter"])
        self.metrics.on_filter("prompt", 1, blocked=param is not None)
        return param, reasons

    def check_images(
        self, images: Sequence[npt.NDArray[np.uint8]]
    ) -> tuple[list[float], list[bool]]:
        """Return (scores, blocked) of images [H, W, 3].

        Raises:
            ApiError: 503, the filter gave no answer.
        """
        try:
            return self.image.check_images(images)
        except FilterError as error:
            self.metrics.on_filter_failure("image")
            raise failure_to_api_error(error) from error

    def close(self) -> None:
        """End the threads."""
        self.prompt.close()
        self.image.close()
