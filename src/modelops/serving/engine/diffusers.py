"""Any diffusers pipeline, taken apart at the calls of its denoiser.

Each request runs the pipeline's own `__call__` in a coroutine of its own: its prompt encoding,
scheduler, guidance and decoding are the pipeline's, for that request alone. Where the pipeline
calls its denoiser the coroutine waits, and the calls that wait together are made as one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import greenlet
import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline

from modelops.base.errors import UsageError
from modelops.export.runtimes.modules import ExportedModule
from modelops.models.pipelines.arguments import floats_to_uint8, images_of
from modelops.models.pipelines.form import DENOISERS, denoiser_of
from modelops.models.pipelines.merge import Call, answers, content_key, merged, read_any_call
from modelops.models.pipelines.observe import find_traits
from modelops.models.pipelines.signatures import parameters_of
from modelops.models.pipelines.state import GlobalNoise, Samplers
from modelops.models.pipelines.tokens import PromptReader
from modelops.models.pipelines.traits import Traits
from modelops.models.pipelines.watch import tensors_with_rows
from modelops.models.request import GUIDANCE_OFF, ImageRequest
from modelops.serving.engine.jobs import Job

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_MARK = "of_an_engine"  # of methods in place of the pipeline's own
_ROUNDING = 0.02  # of the norm of an answer; in half precision batches round by a tenth of that
_TEXTS = 64  # answers of text encoders that are kept; each may be megabytes


@dataclass(slots=True)
class PipelineTrack:
    """Unfinished image: a call of the pipeline that waits for its denoiser.

    Attributes:
        routine: coroutine in which the pipeline runs; switching to it continues the pipeline.
        samplers: state of its samplers.
        noise: state of the global generators, where its pipeline draws from them.
        call: the denoiser call that it waits for; None when only decoding is left.
        known: shared tensors of earlier calls, with their digests.
    """

    job: Job | None
    routine: Any
    samplers: list[dict[str, Any]]
    noise: GlobalNoise | None = None
    call: Call | None = None
    known: dict[str, tuple[torch.Tensor, str]] = field(default_factory=dict)
    picture: npt.NDArray[np.uint8] | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        return () if self.call is None else self.call.key

    @property
    def rows(self) -> int:
        return 0 if self.call is None else self.call.rows

    @property
    def finished(self) -> bool:
        return self.call is None


class PipelineModel:
    """Step model of a diffusers text-to-image (or unconditional) pipeline with one denoiser.

    The `forward` of its denoiser and text encoders and the `decode` of its decoder are replaced
    until `close`. A call that does not come from a track reaches the original method.

    Args:
        pipeline: with its networks in torch or in another runtime.
        traits: of the pipeline; measured if not given.

    Raises:
        UsageError: it has neither a transformer nor a UNet, or belongs to another engine.
    """

    previews = False

    def __init__(self, pipeline: Any, traits: Traits | None = None) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        self._denoiser = denoiser_of(pipeline)
        if self._denoiser is None:
            raise UsageError(
                f"{type(pipeline).__name__} has no denoiser that requests could share",
                hint=f"a pipeline with a {' or a '.join(DENOISERS)} can be served",
            )
        if hasattr(vars(self._denoiser).get("forward"), _MARK):
            raise UsageError("the pipeline belongs to another engine", hint="close that one first")
        self._traits = traits or find_traits(pipeline)
        self._traits.require_no_image()
        self.height, self.width = self._size()
        self._reader = PromptReader(pipeline)
        self.max_tokens = self._reader.max_tokens
        self._samplers = Samplers(pipeline)
        self._parameters = _parameters(self._denoiser)
        self._rowed = tensors_with_rows(pipeline, self._traits)
        self._rows: dict[bool, int] = {}  # of a call, with guidance and without, once it was seen
        self._tracks: dict[Any, PipelineTrack] = {}  # by routine
        self._example: Call | None = None
        self._widths: Iterator[int] | None = None
        self._evaluate: Callable[..., Any] = self._denoiser.forward
        self._undo = [_replace(self._denoiser, "forward", self._meet)]
        self._texts: OrderedDict[tuple[str, str], Any] = OrderedDict()
        for name in _TEXT_ENCODERS:
            if (part := getattr(pipeline, name, None)) is not None:
                meet = functools.partial(self._meet_text, name, part.forward)
                self._undo.append(_replace(part, "forward", meet))
        decoder = getattr(pipeline, "vae", None)
        if decoder is not None:
            self._decode = decoder.decode
            self._undo.append(_replace(decoder, "decode", self._meet_decoder))
        self._shares = True
        self._shares = self._rows_are_independent()

    def _rows_are_independent(self) -> bool:
        """Return whether two requests get the same answers from a shared evaluation as alone.

        False where that cannot be found out.
        """
        height, width = self._traits.quick_size or (None, None)
        prompts = (self._traits.any_prompt, self._traits.other_prompt)
        tracks = []
        try:
            for seed, prompt in enumerate(prompts):
                request = ImageRequest(
                    prompt=prompt, seed=seed, steps=2, height=height, width=width
                )
                tracks.append(self._started(request, None))
            calls = [track.call for track in tracks if track.call is not None]
            if len({call.key for call in calls}) > 1 or calls[0].raw is not None:
                return True  # they do not share one
            rows = sum(call.rows for call in calls)
            with torch.no_grad():
                shared = answers(calls, self._evaluate(**merged(calls, rows)), rows)
                alone = [
                    answers([call], self._evaluate(**merged([call])), call.rows)[0]
                    for call in calls
                ]
        except Exception:  # an artifact may take short prompts alone; a request says so itself
            return False
        finally:
            for track in tracks:
                self.drop(track)
        return all(_close(one, other) for one, other in zip(shared, alone, strict=True))

    # --- what a request may ask for -----------------------------------------------------------

    def usable_prompts(self, prompts: Sequence[str]) -> list[str]:
        return self._traits.usable_prompts(prompts)

    def fill(self, request: ImageRequest) -> ImageRequest:
        steps = request.steps or self._traits.form.default("num_inference_steps")
        if steps is None or steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        self._traits.check(request)
        guidance = self._traits.guidance_of(request)
        filled = replace(
            request, steps=int(steps), guidance=GUIDANCE_OFF if guidance is None else guidance,
            height=request.height or self.height, width=request.width or self.width,
        )  # fmt: skip
        assert filled.height and filled.width
        scale = int(getattr(self.pipeline, "vae_scale_factor", 1))
        if min(filled.height, filled.width) < 1 or filled.height % scale or filled.width % scale:
            raise UsageError(
                f"height and width must be positive multiples of {scale}, "
                f"got {filled.height}x{filled.width}"
            )
        return filled

    def _size(self) -> tuple[int, int]:
        height, width = self._traits.native_size
        assert height and width
        return height, width

    def rows_of(self, request: ImageRequest) -> int:
        guided = _is_guided(request)
        both = 2 if guided and self._traits.negative else 1
        return self._rows.get(guided, both)

    def count_tokens(self, text: str) -> int:
        return self._reader.count(text)

    # --- steps --------------------------------------------------------------------------------

    def prepare(self, max_rows: int) -> None:
        usual = self.fill(ImageRequest(prompt=self._traits.any_prompt, seed=0))
        for request in (replace(usual, guidance=1.0), usual):
            track = self._started(request, None)
            self._example = track.call
            self.drop(track)

    def evaluate(self, rows: int) -> None:
        assert self._example is not None
        if self._example.raw is not None:
            raise UsageError("the denoiser's calls cannot be repeated")
        with torch.no_grad():
            self._evaluate(**merged([self._example], rows))
        if self._device.type == "cuda":  # pragma: no cover - no GPU here
            torch.cuda.synchronize(self._device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.pipeline._execution_device
        return device

    def begin(self, jobs: Sequence[Job]) -> list[PipelineTrack | Exception]:
        tracks: list[PipelineTrack | Exception] = []
        for job in jobs:
            try:
                tracks.append(self._started(job.request, job))
            except Exception as error:
                tracks.append(error)
        return tracks

    def _started(self, request: ImageRequest, job: Job | None) -> PipelineTrack:
        """Start a track and run it to its first call of the denoiser."""

        def run() -> None:
            with torch.no_grad():
                output = pipeline(**self._traits.arguments([request]))
            track.picture = floats_to_uint8(images_of(output))[0]
            height, width = track.picture.shape[:2]
            if (request.height or height, request.width or width) != (height, width):
                raise UsageError(f"the pipeline made an image of {width}x{height} pixels")

        pipeline = _copy_of(self.pipeline)
        noise = GlobalNoise(request.seed) if self._traits.global_noise else None
        track = PipelineTrack(job, greenlet.greenlet(run), self._samplers.fresh(), noise)
        self._tracks[track.routine] = track
        self._go_on(track)
        if track.call is None:
            self.drop(track)
            raise RuntimeError("the pipeline never called its denoiser")
        self._rows[_is_guided(request)] = track.call.rows
        return track

    def advance(self, tracks: Sequence[PipelineTrack]) -> list[Exception | None]:
        calls = [track.call for track in tracks if track.call is not None]
        assert len(calls) == len(tracks)
        rows = sum(call.rows for call in calls)
        if self._widths is not None:
            rows = max(rows, next(self._widths, 0))
        with torch.no_grad():
            if calls[0].raw is not None:
                args, kwargs = calls[0].raw
                found = [self._evaluate(*args, **kwargs)]
            else:
                found = answers(calls, self._evaluate(**merged(calls, rows)), rows)
        problems: list[Exception | None] = []
        for track, answer in zip(tracks, found, strict=True):
            try:
                self._go_on(track, answer)
                problems.append(None)
            except Exception as error:
                problems.append(error)
        return problems

    def _go_on(self, track: PipelineTrack, answer: Any = None) -> None:
        """Run a track's pipeline until it waits again, or is done."""
        track.call = None
        try:
            # A track that waits leaves its gradient mode behind: no_grad restores the caller's.
            noise = track.noise or contextlib.nullcontext()
            with torch.no_grad(), self._samplers.using(track.samplers), noise:
                track.routine.switch(*(() if answer is None else (answer,)))
        finally:
            if track.routine.dead:
                self._tracks.pop(track.routine, None)

    def _meet(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the denoiser's forward."""
        track = self._tracks.get(greenlet.getcurrent())
        if track is None:
            return self._evaluate(*args, **kwargs)
        call = read_any_call(self._parameters, args, kwargs, track.known, self._rowed)
        track.call = call if self._shares else replace(call, key=(object(),))
        return track.routine.parent.switch()

    def _meet_text(self, name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for a text encoder's forward, with a cache of its earlier answers."""
        writes = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        if writes or self._tracks.get(greenlet.getcurrent()) is None:
            return plain(*args, **kwargs)  # writing a text, a call leaves more than its answer
        key = (name, content_key(args, kwargs))
        if key not in self._texts:
            self._texts[key] = plain(*args, **kwargs)
            if len(self._texts) > _TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def _meet_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the decoder's decode: the steps are done."""
        track = self._tracks.get(greenlet.getcurrent())
        if track is not None:
            track.routine.parent.switch()
        return self._decode(*args, **kwargs)

    def preview(self, track: PipelineTrack) -> npt.NDArray[np.uint8]:
        raise NotImplementedError("what a pipeline's latents would look like is not known")

    def pixels(self, track: PipelineTrack) -> npt.NDArray[np.uint8]:
        if not track.routine.dead:
            self._go_on(track)
        if track.picture is None:
            self.drop(track)
            raise RuntimeError("the pipeline called its denoiser after its decoder")
        return track.picture

    def drop(self, track: PipelineTrack) -> None:
        if not track.routine.dead:
            with torch.no_grad():
                track.routine.throw()  # GreenletExit: the pipeline unwinds
        self._tracks.pop(track.routine, None)

    @contextlib.contextmanager
    def widened(self, widths: Sequence[int]) -> Iterator[None]:
        self._widths = iter(widths)
        try:
            yield
        finally:
            self._widths = None

    def close(self) -> None:
        for track in list(self._tracks.values()):
            self.drop(track)
        while self._undo:
            self._undo.pop()()


def _replace(part: Any, name: str, instead: Callable[..., Any]) -> Callable[[], None]:
    """Set a method of one object; return a function that restores the old one."""
    hidden = vars(part).get(name)

    @functools.wraps(getattr(part, name))  # `generate` of a language model reads its signature
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return instead(*args, **kwargs)

    setattr(replaced, _MARK, True)
    object.__setattr__(part, name, replaced)

    def undo() -> None:
        object.__delattr__(part, name)
        if hidden is not None:
            object.__setattr__(part, name, hidden)

    return undo


def _parameters(denoiser: Any) -> list[str]:
    """Names of its arguments, in the order of positions."""
    if isinstance(denoiser, ExportedModule):
        return denoiser.parts["forward"][1].parameters
    plain = getattr(denoiser, "_orig_mod", denoiser)  # of a compiled one
    return [name for name in parameters_of(type(plain).forward) if name != "self"]


def _is_guided(request: ImageRequest) -> bool:
    return request.guidance is not None and request.guidance > 1.0


def _close(first: Any, second: Any) -> bool:
    """Return whether two answers are the same but for rounding, by their first tensor."""
    one, other = (answer[0].float() for answer in (first, second))
    if one.shape != other.shape:
        return False
    return bool((one - other).norm() <= _ROUNDING * other.norm())


def _copy_of(pipeline: Any) -> Any:
    """Return a pipeline whose calls leave their guidance and more in attributes of its own; its
    parts are shared."""
    copied = copy.copy(pipeline)
    for name, part in vars(pipeline).items():
        if isinstance(part, DiffusionPipeline):  # the prior and the decoder of a combined one
            vars(copied)[name] = copy.copy(part)
    return copied
