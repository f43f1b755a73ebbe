"""Step model of modelops' own pipeline: every part of a step is done for all rows at once."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelops.base.errors import UsageError
from modelops.models.pipelines.arguments import floats_to_uint8
from modelops.models.pipelines.tokens import PromptReader
from modelops.models.request import ImageRequest
from modelops.serving.engine.batch_profile import widths
from modelops.serving.engine.jobs import Job
from modelops.serving.engine.stepping import Schedule, Stepper, guide

# pooled [1, D], tokens [1, L, D], mask [1, L]
Text = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_TEXTS = 256  # prompts whose embeddings are kept
_WARM_TEXTS = 4  # prompts at once that are worth preparing for
_INPUTS = 32  # widths and sizes whose memory is kept


@dataclass(slots=True)
class FlowTrack:
    """Unfinished image, with its own schedule and latents [1, C, h, w].

    Attributes:
        estimate: latents [1, C, h, w] where it would end if it went on straight; None unless a
            preview is due.
    """

    job: Job
    schedule: Schedule
    latents: torch.Tensor
    text: Text
    negative: Text | None
    estimate: torch.Tensor | None = None

    @property
    def group(self) -> tuple[int, ...]:
        return tuple(self.latents.shape)

    @property
    def rows(self) -> int:
        return 1 if self.negative is None else 2

    @property
    def finished(self) -> bool:
        return self.job.step >= len(self.schedule.timesteps)

    @property
    def level(self) -> float:
        """Noise level (sigma) of the next step."""
        return self.schedule.levels[self.job.step]


class NetworkInputs:
    """Inputs of the network, in memory that every step uses again.

    Where the network is a graph on the CPU this is the graph's own memory, so that nothing is
    copied there. A row's text is written only if another one was there before.

    Args:
        width: number of rows; the last ones may be padding that the network needs.
        latents: of one row, [1, C, h, w]; the others have the same shape.
        text: of one row; the others have the same shapes.
    """

    def __init__(self, pipeline: Any, width: int, latents: torch.Tensor, text: Text) -> None:
        self.width = width
        self._latents = latents.repeat(width, 1, 1, 1)
        self._parts = [part.repeat(width, *[1] * (part.ndim - 1)) for part in text]
        self._graph: Any = None
        memory = getattr(pipeline.unet, "memory", None)
        if memory is not None:
            times = torch.ones(width, dtype=latents.dtype)
            found = memory(**pipeline.unet_arguments(self._latents, times, *self._parts)) or {}
            names = ("class_labels", "encoder_hidden_states", "encoder_attention_mask")
            self._latents = found.get("sample", self._latents)
            self._parts = [
                found.get(name, part) for name, part in zip(names, self._parts, strict=True)
            ]
            self._graph = pipeline.unet.graph if found else None
        self._written: list[Text | None] = [None] * width
        self._overwritten = -1

    def put_latents(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Write at most `width` rows [1, C, h, w]; return all rows, [width, C, h, w]."""
        torch.cat(list(rows), out=self._latents[: len(rows)])
        return self._latents

    def put_texts(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        """Write at most `width` texts and pad with the last one; return pooled, tokens and mask of
        all rows."""
        overwritten = getattr(self._graph, "overwritten", 0)
        if overwritten != self._overwritten:  # by another call of the graph
            self._written, self._overwritten = [None] * self.width, overwritten
        changed = False
        for row in range(self.width):
            text = texts[min(row, len(texts) - 1)]
            if self._written[row] is not text:
                self._written[row], changed = text, True
                for part, given in zip(self._parts, text, strict=True):
                    part[row] = given[0]
        if changed and self._graph is not None:  # because others write there too
            self._graph.overwritten += 1
            self._overwritten = self._graph.overwritten
        return self._parts


class FlowModel:
    """Step model of a PixelFlowPipeline, with its networks in torch or in another runtime.

    Each row keeps its own noise, schedule, step count and guidance. A guided request takes two rows
    of the same forward pass: its prompt and its negative prompt.

    Args:
        pipeline: a PixelFlowPipeline.
        text_cache: prompts whose embeddings are kept.
    """

    previews = True

    def __init__(self, pipeline: Any, *, text_cache: int = _TEXTS) -> None:
        self.pipeline = pipeline
        self.height = self.width = int(pipeline.resolution)
        self._reader = PromptReader(pipeline)
        self.max_tokens = self._reader.max_tokens
        self._device = pipeline._execution_device
        self._dtype = pipeline.unet.dtype
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self.text_cache = text_cache
        self._stepper = Stepper(pipeline.scheduler, self._device, self._dtype)
        self._inputs: OrderedDict[tuple[int, ...], NetworkInputs] = OrderedDict()

    def usable_prompts(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def fill(self, request: ImageRequest) -> ImageRequest:
        config = self.pipeline.config
        filled = replace(
            request,
            steps=config["default_steps"] if request.steps is None else request.steps,
            guidance=config["default_guidance"] if request.guidance is None else request.guidance,
            height=request.height or self.height,
            width=request.width or self.width,
        )
        assert filled.height and filled.width and filled.steps is not None
        if filled.steps < 1:
            raise UsageError(f"steps must be at least 1, got {filled.steps}")
        if filled.guidance is None or not math.isfinite(filled.guidance):
            raise UsageError("guidance must be a finite number")
        try:
            self.pipeline.latent_shape(filled.height, filled.width)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return filled

    def rows_of(self, request: ImageRequest) -> int:
        return 1 if request.guidance == 1.0 else 2

    def count_tokens(self, text: str) -> int:
        return self._reader.count(text)

    def prepare(self, max_rows: int) -> None:
        self._encode([""])
        for count in widths(min(max_rows, _WARM_TEXTS)):  # whose shapes runtimes compile too
            self.pipeline.encode_prompt([""] * count)

    def evaluate(self, rows: int) -> None:
        shape = self.pipeline.latent_shape(self.height, self.width)
        latents = torch.zeros((rows, *shape), device=self._device, dtype=self._dtype)
        sigmas = torch.full((rows,), 0.5, device=self._device, dtype=self._dtype)
        text = self._encode([""])[""]
        parts = [part.expand(rows, *part.shape[1:]).contiguous() for part in text]
        self.pipeline.predict_velocity(latents, sigmas, *parts)
        if self._device.type == "cuda":  # pragma: no cover - no GPU here
            torch.cuda.synchronize(self._device)

    def begin(self, jobs: Sequence[Job]) -> list[FlowTrack | Exception]:
        wanted = [job.request.prompt for job in jobs]
        wanted += [job.request.negative_prompt for job in jobs if job.rows == 2]
        texts = self._encode(wanted)
        return [self._track(job, texts) for job in jobs]

    def _encode(self, wanted: list[str]) -> dict[str, Text]:
        missing = [text for text in dict.fromkeys(wanted) if text not in self._texts]
        if missing:
            pooled, tokens, mask = self.pipeline.encode_prompt(missing)
            for index, text in enumerate(missing):
                one = slice(index, index + 1)
                self._texts[text] = (
                    pooled[one].to(self._device, self._dtype),
                    tokens[one].to(self._device, self._dtype),
                    mask[one].to(self._device),
                )
        found = {}
        for text in wanted:
            self._texts.move_to_end(text)
            found[text] = self._texts[text]
        while len(self._texts) > self.text_cache:
            self._texts.popitem(last=False)
        return found

    def _track(self, job: Job, texts: dict[str, Text]) -> FlowTrack | Exception:
        request = job.request
        assert request.height and request.width and request.steps is not None
        try:
            shape = (1, *self.pipeline.latent_shape(request.height, request.width))
            generator = torch.Generator("cpu").manual_seed(request.seed)
            return FlowTrack(
                job=job,
                schedule=self._stepper.schedule(request.steps),
                latents=torch.randn(shape, generator=generator, dtype=self._dtype).to(self._device),
                text=texts[request.prompt],
                negative=texts[request.negative_prompt] if job.rows == 2 else None,
            )
        except Exception as error:
            return error

    def advance(self, tracks: Sequence[FlowTrack]) -> list[Exception | None]:
        guided = [track for track in tracks if track.negative is not None]
        rows = [*guided, *(track for track in tracks if track.negative is None)]
        texts = [row.text for row in rows] + [row.negative for row in guided if row.negative]
        everyone = [*rows, *guided]
        inputs = self._inputs_for(len(everyone), everyone[0].latents, texts[0])
        latents = inputs.put_latents([row.latents for row in everyone])
        pooled, tokens, mask = inputs.put_texts(texts)
        levels = [row.level for row in everyone]
        sigmas = torch.tensor(levels + levels[-1:] * (inputs.width - len(levels)),
                              dtype=self._dtype, device=self._device)  # fmt: skip
        velocity = self.pipeline.predict_velocity(latents, sigmas, pooled, tokens, mask)
        velocity = velocity[: len(everyone)]
        own = velocity[: len(rows)]
        if guided:
            scales = [row.job.request.guidance or 1.0 for row in guided]
            toward = guide(own[: len(guided)], velocity[len(rows) :], scales)
            own = torch.cat([toward, own[len(guided) :]])
        after = self._stepper.step(
            [row.schedule for row in rows], [row.job.step for row in rows], own,
            torch.cat([row.latents for row in rows]),  # not `latents`: a scheduler may keep them
        )  # fmt: skip
        for index, row in enumerate(rows):
            row.estimate = None
            if row.job.step + 1 in row.job.preview_at:
                row.estimate = row.latents - sigmas[index] * own[index]
            row.latents = after[index : index + 1]
        return [None] * len(tracks)

    def _inputs_for(self, rows: int, latents: torch.Tensor, text: Text) -> NetworkInputs:
        """Return the inputs for a call of this many rows, or of as many as the network needs."""
        filled = getattr(getattr(self.pipeline.unet, "graph", None), "filled", None)
        width = filled(rows) if filled else rows
        key = (width, *latents.shape[1:])
        if key not in self._inputs:
            self._inputs[key] = NetworkInputs(self.pipeline, width, latents, text)
            if len(self._inputs) > _INPUTS:
                self._inputs.popitem(last=False)
        self._inputs.move_to_end(key)
        return self._inputs[key]

    def preview(self, track: FlowTrack) -> npt.NDArray[np.uint8]:
        assert track.estimate is not None
        return self._to_pixels(track.estimate)

    def pixels(self, track: FlowTrack) -> npt.NDArray[np.uint8]:
        return self._to_pixels(track.latents)

    def _to_pixels(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Convert latents [1, C, h, w] to [H, W, 3] uint8."""
        decoded = self.pipeline.decode(latents)
        return floats_to_uint8(self.pipeline.image_processor.pt_to_numpy(decoded)[0])

    def drop(self, track: FlowTrack) -> None:
        """Do nothing: nothing is held outside the track."""

    @contextlib.contextmanager
    def widened(self, widths: Sequence[int]) -> Iterator[None]:
        pipeline, left = self.pipeline, iter(widths)
        hidden = vars(pipeline).get("predict_velocity")
        inner = pipeline.predict_velocity

        def wide(*arguments: Any) -> Any:
            rows = len(arguments[0])
            index = [row % rows for row in range(max(rows, next(left, 0)))]
            return inner(*(argument[index] for argument in arguments))[:rows]

        pipeline.predict_velocity = wide
        try:
            yield
        finally:
            del pipeline.predict_velocity
            if hidden is not None:
                pipeline.predict_velocity = hidden

    def close(self) -> None:
        """Do nothing: the pipeline was never changed."""
