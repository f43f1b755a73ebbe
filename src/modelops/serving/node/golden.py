"""Golden image: a node must make it again before it is ready, and goes on making it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from modelops.base.errors import IntegrityError, ModelopsError, ServingError
from modelops.base.files import atomic_path, safe_join
from modelops.base.pixels import pixels_sha256
from modelops.models.request import ImageRequest
from modelops.models.sources import PipelineSource
from modelops.records.evaluation import SourceInfo
from modelops.records.release import ReleaseDefaults
from modelops.serving.engine.jobs import EngineImage

log = logging.getLogger("modelops.serving")

GOLDEN_FILE, FALLBACK_FILE = "golden.png", "golden-fallback.png"
DEFAULT_PROMPT = "red heart"
DEFAULT_SEED = 7
# Mean absolute difference in grey levels that another processor's rounding may make. Another model,
# broken weights or a wrong sampler are tens of levels away.
MEAN_BOUND = 4.0


class GoldenImage:
    """Golden image of a node.

    Args:
        submit: queues a request in the engine that serves.
        request: of the golden image.
        check: compares the pixels of the start with the release's; see `check_golden`.

    Attributes:
        pixels: [H, W, 3] uint8 of the start; None until they are right.
        check: difference of the start from the release.
        problem: reason why the node is not ready, or None.
    """

    def __init__(
        self,
        submit: Callable[[ImageRequest], Future[EngineImage]],
        request: ImageRequest,
        check: Callable[[npt.NDArray[np.uint8]], GoldenCheck],
    ) -> None:
        self._submit, self._request, self._compare = submit, request, check
        self.pixels: npt.NDArray[np.uint8] | None = None
        self.check: GoldenCheck | None = None
        self.problem: str | None = "the golden image has not been made yet"
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def make(self, timeout_s: float) -> None:
        """Make it and compare it with the release's; a problem is noted and logged."""
        try:
            self.pixels = self._submit(self._request).result(timeout_s).pixels
            self.check = self._compare(self.pixels)
            self.problem = None
            log.info("golden image: %s", self.check)
        except (ModelopsError, TimeoutError) as error:
            self.problem = f"golden image: {error}"
            log.error(self.problem)
        self._last = time.monotonic()

    def make_again(self, every_s: float) -> None:
        """Begin to make it again if the last time is `every_s` seconds ago; 0 never does.

        It is compared with that of the start. A node that makes another image now stays unready.
        """
        with self._lock:
            if self.problem or not every_s or time.monotonic() - self._last < every_s:
                return
            self._last = time.monotonic()
        with contextlib.suppress(ServingError):  # a full queue: next time
            self._submit(self._request).add_done_callback(self._made_again)

    def _made_again(self, made: Future[EngineImage]) -> None:
        if made.cancelled() or made.exception() is not None:
            return  # a deadline or a shutdown; the engine answers for itself
        assert self.pixels is not None
        off = np.abs(made.result().pixels.astype(np.int16) - self.pixels).mean()
        if off > MEAN_BOUND:
            self.problem = (
                f"golden image: {off:.1f} grey levels from that of the start; restart the node"
            )
            log.error(self.problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCheck:
    """Difference of the golden image of this start from the released one.

    Attributes:
        pixels_sha256: of this start's pixels.
        mean_difference: in grey levels; None when the release has no golden image.
        max_difference: in grey levels.
    """

    pixels_sha256: str
    mean_difference: float | None = None
    max_difference: int | None = None

    @property
    def equal(self) -> bool | None:
        """True if bitwise equal; None when the release has no golden image."""
        return None if self.max_difference is None else self.max_difference == 0


def make_golden(
    model_dir: str | Path,
    out_path: str | Path,
    *,
    prompt: str | None = None,
    seed: int = DEFAULT_SEED,
    steps: int | None = None,
    guidance: float | None = None,
    runtime: str = "auto",
) -> dict[str, Any]:
    """Make a model's golden image with the offline pipeline and write it as PNG.

    Returns the value of a release's `defaults["golden"]`; the file goes to
    `extra_files={"golden.png": out_path}` of `build_release`.
    """
    from modelops.serving.node.load import open_model

    pipeline, _ = open_model(Path(model_dir), runtime=runtime)
    source = PipelineSource(pipeline, SourceInfo(kind="artifact", uri=str(model_dir)), batch_size=1)
    if prompt is None:
        (prompt,) = source.traits.usable_prompts([DEFAULT_PROMPT])
    request = ImageRequest(prompt=prompt, seed=seed, steps=steps, guidance=guidance)
    pixels = source.generate([request])[0]
    with atomic_path(out_path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")
    return {
        "prompt": prompt,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "file": GOLDEN_FILE,
        "pixels_sha256": pixels_sha256(pixels),
    }


def golden_request(defaults: ReleaseDefaults, prompt: str = DEFAULT_PROMPT) -> ImageRequest:
    """Return the golden request of a release, or one with this prompt."""
    golden = defaults.get("golden") or {}
    return ImageRequest(
        prompt=str(golden.get("prompt", prompt)),
        seed=int(golden.get("seed", DEFAULT_SEED)),
        steps=golden.get("steps") or defaults.get("steps"),
        guidance=golden.get("guidance") or defaults.get("guidance"),
    )


def check_golden(
    pixels: npt.NDArray[np.uint8],
    release_dir: Path,
    defaults: ReleaseDefaults,
    *,
    fallback: bool = False,
) -> GoldenCheck:
    """Compare this start's golden image with the release's, or with that of its fallback.

    Raises:
        ServingError: the difference is more than rounding, or the image is one flat colour.
        IntegrityError: the release's golden image cannot be read.
    """
    digest = pixels_sha256(pixels)
    if int(pixels.max()) == int(pixels.min()):
        raise ServingError("the golden image is one flat colour")
    golden = defaults.get("golden") or {}
    name = golden.get("fallback_file") if fallback else golden.get("file")
    if name is None:
        return GoldenCheck(pixels_sha256=digest)
    path = safe_join(release_dir, name)
    try:
        with Image.open(path) as picture:
            expected = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: golden image cannot be read") from error
    if expected.shape != pixels.shape:
        raise ServingError(f"the golden image is {pixels.shape}, released as {expected.shape}")
    difference = np.abs(expected.astype(np.int16) - pixels.astype(np.int16))
    if float(difference.mean()) > MEAN_BOUND:
        raise ServingError(
            f"the golden image is {difference.mean():.1f} grey levels from the released one "
            f"(at most {MEAN_BOUND:g})"
        )
    return GoldenCheck(
        pixels_sha256=digest,
        mean_difference=float(difference.mean()),
        max_difference=int(difference.max()),
    )
