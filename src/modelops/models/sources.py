"""Model sources: anything that turns (prompt, seed, steps, guidance, size) into an image.

A checkpoint, an exported artifact and a live endpoint answer to the same protocol, so one
evaluation serves all of them. Where a source is opened from a path or URL:
`modelops.evaluation.sources.open`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelops.base.errors import ImageError, ModelopsError, UsageError, first_line
from modelops.base.extras import missing_package
from modelops.base.files import sha256_bytes, sha256_file
from modelops.base.private import private_copy
from modelops.models.devices import open_device
from modelops.models.hub import pipeline_directory
from modelops.models.pipelines.arguments import floats_to_uint8, images_of
from modelops.models.pipelines.inputs import image_arguments, takes_image
from modelops.models.pipelines.load import load_diffusers, load_pixel_flow
from modelops.models.pipelines.observe import find_traits
from modelops.models.pipelines.state import GlobalNoise, Samplers
from modelops.models.pipelines.tokens import PromptReader
from modelops.models.pipelines.traits import Traits
from modelops.models.request import Image, ImageRequest
from modelops.records.evaluation import SourceInfo

# sha256 of the pipeline.py of earlier releases, whose checkpoints this one's pipeline runs.
EARLIER_PIPELINES = (
    "043d034e64a95f04a70cee52702aed0c4fff566f9808ff9af9257fe6ac1d6646",
    "e9be8dfef7a4adafb1f05946f72b50c28d12420367370dbc1f88409ed29cdb95",
    "d2c54cecae40645b5c946dcf403734c11ddf5a2965370693ef0b5e065d3214d4",
)
_log = logging.getLogger(__name__)
TRAINING_STATE = "training_state"  # beside a checkpoint's pipeline; not part of its digest


class ModelSource(ABC):
    """Source of images from requests. One thread at a time uses an instance.

    Attributes:
        info: kind, digest, runtime and precision, for the record.
        scheduler_name: class name of the sampler.
        batch_size: requests that one call of `generate` takes well.
        n_images: number of images that are there already; None where they are made.
        files, prompts: of these images; prompts are None where nothing says them.
        numbers: line of the prompt of each of them, where their names say it.
        notes: remarks on these images, for every measurement on them.
        runs_here: whether the networks run in this process, on torch's threads or a device.
    """

    info: SourceInfo
    scheduler_name: str
    batch_size: int
    n_images: int | None = None
    files: Sequence[Path] = ()
    prompts: list[str] | None = None
    numbers: list[int] | None = None
    notes: Sequence[str] = ()
    runs_here = False

    @property
    @abstractmethod
    def defaults(self) -> ImageRequest:
        """A request with the source's own steps, guidance, height and width filled in."""

    @abstractmethod
    def generate(self, requests: Sequence[ImageRequest]) -> list[Image]:
        """Make images [H, W, 3] uint8 RGB, one per request and in their order.

        All requests of a call must agree in steps, guidance, height and width.

        Raises:
            ModelopsError: an image could not be made.
        """

    def generate_each(self, requests: Sequence[ImageRequest]) -> list[Image | ModelopsError]:
        """Make the image of each request, or return its error; see `generate`.

        One image that cannot be made does not affect the others.
        """
        if len(requests) > 1:
            try:
                return [_checked(image) for image in self.generate(requests)]
            except ModelopsError:
                pass  # find out below which of them it was
        return [self.generate_one(request) for request in requests]

    def generate_one(self, request: ImageRequest) -> Image | ModelopsError:
        """Make the image of one request, or return its error."""
        try:
            return _checked(self.generate([request])[0])
        except ModelopsError as error:
            return error

    @property
    def takes_images(self) -> bool:
        """Whether a request may carry an input image."""
        return False

    def check(self, request: ImageRequest) -> None:  # noqa: B027 (most find out when they are asked)
        """Refuse a request that the source cannot fulfil, before any image is made.

        Raises:
            UsageError: something that has no effect, or that no image can be made of.
        """

    def whole_calls(self, request: ImageRequest) -> int:
        """Return the number of requests like this one, near `batch_size`, that waste no call."""
        return self.batch_size

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts that are known not to be read to their ends."""
        return []

    def close(self) -> None:  # noqa: B027 (most sources hold nothing)
        """Let go of connections."""


def _checked(image: Image) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ImageError(f"the source gave an array of shape {image.shape}, {image.dtype}")
    return image


# Images of every call of a pipeline on a CPU up to SMALL pixels; larger ones fill the cores alone.
CPU_ROWS = 8
SMALL = 256 * 256


class PipelineSource(ModelSource):
    """Any diffusers text-to-image pipeline, with its networks in torch or in another runtime.

    Args:
        pipeline: the loaded pipeline.
        info: what to say of it in records.
        batch_size: images per call of the pipeline, where that changes no image; see
            `rows_per_call`. Calls are always filled up with copies of the last request, so that an
            image does not depend on the others in its call.
        traits: of the pipeline; measured when first needed if not given.
    """

    runs_here = True

    def __init__(
        self,
        pipeline: Any,
        info: SourceInfo,
        *,
        batch_size: int = 16,
        traits: Traits | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.info = info
        self._traits = traits
        self._samplers = Samplers(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self.scheduler_name = type(pipeline.scheduler).__name__

    @cached_property
    def traits(self) -> Traits:
        """Traits of the pipeline, measured once; the record says which images share a call."""
        found = self._traits or find_traits(self.pipeline)
        self.info.details["prompts_per_call"] = found.sharing
        return found

    @cached_property
    def _reader(self) -> PromptReader:
        return PromptReader(self.pipeline)

    @property
    def defaults(self) -> ImageRequest:
        height, width = self.traits.native_size
        steps = self.traits.form.default("num_inference_steps")
        return ImageRequest(
            prompt="", seed=0, steps=steps, guidance=self.traits.default_guidance,
            height=height, width=width,
        )  # fmt: skip

    @property
    def takes_images(self) -> bool:
        return takes_image(self.traits.form)

    def check(self, request: ImageRequest) -> None:
        self.traits.check(request)
        if request.image is not None:
            with suppress(ImageError):  # it is counted as a failure when its turn comes
                image_arguments(self.traits.form, request.image)

    def rows_per_call(self, request: ImageRequest) -> int:
        """Images of every call of the pipeline.

        On a CPU it does not depend on `batch_size`: convolution and matrix kernels are chosen by
        the number of rows and round differently, so that between 1, 2 to 7, and 8 or more rows 2 to
        5 of 64 images of the pilot differed by one grey level (bench/bench_seeds.py).
        """
        if not self.info.runtime.lower().endswith("cpu"):
            return self.batch_size
        pixels = (request.height or 0) * (request.width or 0)
        return CPU_ROWS if 0 < pixels <= SMALL else 1

    def whole_calls(self, request: ImageRequest) -> int:
        rows = self.rows_per_call(request)
        return -(-self.batch_size // rows) * rows

    def cut(self, prompts: Sequence[str]) -> list[str]:
        return [prompt for prompt in prompts if self._reader.is_cut(prompt)]

    def generate(self, requests: Sequence[ImageRequest]) -> list[Image]:
        if len({(r.steps, r.guidance, r.height, r.width) for r in requests}) > 1:
            raise UsageError("requests of one call must share steps, guidance and size")
        images: dict[int, Image] = {}
        for places in self._groups(requests):
            real = [requests[place] for place in places]
            alone = self.traits.sharing == "one" or real[0].image is not None
            rows = 1 if alone else self.rows_per_call(real[0])
            for start in range(0, len(real), rows):
                chunk = real[start : start + rows]
                filled = chunk + [chunk[-1]] * (rows - len(chunk))
                images.update(zip(places[start:], self._call(filled)[: len(chunk)], strict=False))
        return [images[place] for place in range(len(requests))]

    def _groups(self, requests: Sequence[ImageRequest]) -> list[list[int]]:
        """Return the places of requests that may share calls."""
        groups: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            self.traits.check(request)
            key: Any = None
            if self.traits.sharing == "same length":
                texts = request.prompt, request.negative_prompt
                key = [self._reader.lengths(text) for text in texts]
            # A pipeline takes negative prompts for all images of a call or for none.
            parts = key, not request.negative_prompt, request.image is None
            groups.setdefault(repr(parts), []).append(place)
        return list(groups.values())

    def _call(self, requests: list[ImageRequest]) -> list[Image]:
        arguments = self.traits.arguments(requests)
        noise = GlobalNoise(requests[0].seed) if self.traits.global_noise else None
        first = requests[0]
        try:
            with (
                torch.no_grad(),
                self._samplers.using(self._samplers.fresh()),
                noise or nullcontext(),
            ):
                images = floats_to_uint8(images_of(self.pipeline(**arguments)))
        except ImportError as error:
            raise missing_package(error, needed_for=type(self.pipeline).__name__) from error
        except Exception as error:  # each runtime has its own for a size that a network cannot have
            size = first.height, first.width
            usual = size in ((None, None), self.traits.native_size)
            known = isinstance(error, ValueError) or first.image is not None
            if isinstance(error, ModelopsError) or (usual and not known):
                raise
            name, reason = type(self.pipeline).__name__, first_line(error)
            if usual:
                raise UsageError(
                    f"{name} does not make this image: {reason}",
                    hint="run with --debug for the pipeline's own report"
                    if first.image is None
                    else "does it take such an image? With few --steps its strength may leave none",
                ) from error
            raise UsageError(
                f"{name} makes no image of {first.width}x{first.height} pixels: {reason}",
                hint="ask for a size that the model takes, or leave it out",
            ) from error
        height, width = images.shape[1:3]
        if (first.height or height, first.width or width) != (height, width):
            raise UsageError(
                f"{type(self.pipeline).__name__} made an image of {width}x{height} pixels where "
                f"{first.width}x{first.height} were asked for",
                hint="ask for a size that the model takes, or leave it out",
            )
        return list(images)


def load_checkpoint(
    path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Load a diffusers directory (or hub id) as a pipeline; see `load_with_digest`."""
    return load_with_digest(path, device=device, dtype=dtype)[0]


def load_with_digest(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sha256: str | None = None,
    store: Path | None = None,
) -> tuple[Any, str]:
    """Load a diffusers directory (or hub id) as a pipeline: (it, digest of what was loaded).

    It is loaded from a private copy, and the digest is the copy's: later changes of the directory
    change neither. Its custom code is never run. If it has exactly the bytes of this
    package's pipeline, or of an earlier release of it, this package's pipeline is run.

    Args:
        path: a directory with model_index.json, or a hub id; see `hub.pipeline_directory`.
        device: of torch.
        dtype: of the weights.
        sha256: digest that a directory must have, without its training state.
        store: see `private_copy`.

    Raises:
        UsageError: there is no such device or directory, it is not diffusers', or it has custom
            code that is not modelops'.
        IntegrityError: the digest is another, or there is a symbolic link.
        MissingWeightsError: a hub id is neither cached nor available.
        MissingExtraError: a package that a part needs is not installed.
    """
    where, directory = open_device(device), pipeline_directory(path)
    if not (directory / "model_index.json").is_file():
        raise UsageError(
            f"{path}: not a diffusers checkpoint (no model_index.json)",
            hint="name a directory such as runs/pilot/checkpoints/step-1000",
        )
    copying = private_copy(directory, exclude=[TRAINING_STATE], sha256=sha256, store=store)
    with copying as copy:
        load = load_pixel_flow if _is_own(copy.path) else load_diffusers
        pipeline = load(copy.path, dtype).to(where)
        pipeline.register_to_config(_name_or_path=str(directory))
        if variant := pipeline.config.get("_variant"):
            _log.warning(
                "%s: its weights are taken from the variant %s; there are no others", path, variant
            )
        if store is not None:  # for its other processes; here the files are open
            copy.keep_for(pipeline)
        return pipeline, copy.sha256


def _is_own(directory: Path) -> bool:
    """Return whether a directory's code is this package's.

    Raises:
        UsageError: it has other code.
    """
    code = directory / "pipeline.py"
    if not code.exists():
        return False
    if sha256_file(code) not in (*EARLIER_PIPELINES, sha256_bytes(pipeline_code())):
        raise UsageError(
            f"{code}: custom code that this modelops did not write is not run",
            hint="load it yourself with diffusers and trust_remote_code=True",
        )
    return True


def open_checkpoint(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    sha256: str | None = None,
    store: Path | None = None,
) -> PipelineSource:
    """Open a checkpoint directory or hub id as a model source; see `load_with_digest`."""
    pipeline, digest = load_with_digest(
        path, device=device, dtype=dtype, sha256=sha256, store=store
    )
    details = {}
    if variant := pipeline.config.get("_variant"):
        details["variant"] = variant
    if not Path(path).exists():
        details["revision"] = Path(pipeline.config["_name_or_path"]).name
    info = SourceInfo(
        kind="checkpoint", uri=str(path), sha256=digest, details=details,
        runtime=f"torch-{device}", precision=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return PipelineSource(pipeline, info, batch_size=batch_size)


def pipeline_code() -> bytes:
    """The source text that every checkpoint carries as `pipeline.py`."""
    return (Path(__file__).parent / "pipeline.py").read_bytes()
