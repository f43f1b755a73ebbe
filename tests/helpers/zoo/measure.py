"""Measurement of one family: diffusers' own call against modelops' sample, server and artifact."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Picture

from modelops.base.errors import ModelopsError
from modelops.export.artifact.open import open_artifact
from modelops.export.calibration import DEFAULT_PROMPTS
from modelops.export.to_int8 import Int8Options, export_int8
from modelops.export.to_onnx import export_onnx
from modelops.models.pipelines.inputs import list_input
from modelops.models.request import Image, ImageRequest, InputImage
from modelops.models.sources import ModelSource, load_checkpoint, open_checkpoint
from modelops.serving.engine.engine import StepEngine
from zoo.family import Family

SHORT, MIDDLE = "red heart", "a green house"
LONG = "a dog with a face and the flag of a house and a cat and a red sun with a blue heart of suns"
CLASSES = {SHORT: "1", MIDDLE: "2", LONG: "3"}
EXPORT_PROMPTS = (SHORT, "dog", "house of the sun", "green flag")


@dataclass
class Row:
    """Findings about one family: a largest pixel difference of 255, a number, or a sentence.

    Attributes:
        sample: alone, against diffusers' own call.
        company: beside a short and a long prompt.
        served: two requests of different steps in shared evaluations.
        export: PSNR of the artifact's images in dB.
        other: of the artifact, at another size, step count, with a long prompt and other guidance.
        int8: PSNR of the INT8 artifact's images in dB.
        seconds: of the export.
    """

    family: str
    sample: int | str = ""
    company: int | str = ""
    served: int | str = ""
    export: float | str = ""
    other: int | str = ""
    int8: float | str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """A family's checkpoint, and diffusers' own images of it.

    Args:
        family: of the zoo.
        folder: an empty one.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.checkpoint = folder / "checkpoint"
        family.make().save_pretrained(self.checkpoint)
        self._pipeline: Any = None
        self._inputs: dict[str, InputImage] = {}

    @property
    def prompts(self) -> tuple[str, ...]:
        return DEFAULT_PROMPTS if self.family.kind == "class" else EXPORT_PROMPTS

    def request(self, prompt: str, **fields: Any) -> ImageRequest:
        text = CLASSES[prompt] if self.family.kind == "class" else prompt
        size = self.family.size or (None, None)
        if self.family.kind == "image":
            fields["image"] = self._input(prompt)
        fields = {
            "seed": 7,
            "steps": self.family.steps[0],
            "height": size[0],
            "width": size[1],
        } | fields
        return ImageRequest(prompt=text, **fields)

    def _input(self, prompt: str) -> InputImage:
        """The input image of a prompt, 40 x 32 pixels, with its right half to be painted anew."""
        if prompt not in self._inputs:
            pixels = np.random.default_rng(len(prompt)).integers(0, 256, (32, 40, 3), np.uint8)
            mask = np.zeros((32, 40), np.uint8)
            mask[:, 20:] = 255
            path = self.folder / f"{prompt}.png"
            Picture.fromarray(pixels).save(path)
            if "mask_image" in inspect.signature(self._own_pipeline().__call__).parameters:
                masked = self.folder / f"{prompt}_mask.png"
                Picture.fromarray(mask).save(masked)
                self._inputs[prompt] = list_input(path, masked)
            else:
                self._inputs[prompt] = list_input(path)
        return self._inputs[prompt]

    def _own_pipeline(self) -> Any:
        if self._pipeline is None:
            from diffusers import DiffusionPipeline

            self._pipeline = DiffusionPipeline.from_pretrained(self.checkpoint)
            self._pipeline.set_progress_bar_config(disable=True)
        return self._pipeline

    def own(self, request: ImageRequest) -> Image:
        """The image [H, W, 3] uint8 that diffusers makes of a request by its own default call."""
        pipeline = copy.deepcopy(self._own_pipeline())
        wanted: dict[str, Any] = {
            "num_inference_steps": request.steps, "output_type": "np",
            "generator": torch.Generator("cpu").manual_seed(request.seed),
            "height": request.height, "width": request.width,
            "guidance_scale": request.guidance,
        }  # fmt: skip
        if request.height:
            wanted["use_resolution_binning"] = False
        if self.family.kind == "class":
            wanted["class_labels"] = [int(request.prompt)]
        elif self.family.kind in ("text", "image"):
            wanted["prompt"] = request.prompt
        if request.image is not None:
            wanted["image"] = Picture.open(request.image.path).convert("RGB")
        if request.image is not None and request.image.mask is not None:
            wanted["mask_image"] = Picture.open(request.image.mask)
        accepts = inspect.signature(pipeline.__call__).parameters
        torch.manual_seed(request.seed)
        np.random.seed(request.seed)
        given = {k: v for k, v in wanted.items() if k in accepts and v is not None}
        output = pipeline(**given)
        images = np.asarray(output.images if hasattr(output, "images") else output.image)
        return np.rint(np.clip(images[0, ..., :3], 0, 1) * 255).astype(np.uint8)

    def worst(self, requests: Sequence[ImageRequest], images: Sequence[Image]) -> int:
        pairs = zip(requests, images, strict=True)
        return max(difference(self.own(request), image) for request, image in pairs)

    def sample(self) -> int:
        request = self.request(SHORT)
        return self.worst([request], open_checkpoint(self.checkpoint).generate([request]))

    def company(self) -> int:
        requests = [self.request(SHORT), self.request(LONG, seed=8), self.request(MIDDLE, seed=9)]
        return self.worst(requests, open_checkpoint(self.checkpoint).generate(requests))

    def served(self) -> int:
        requests = [self.request(SHORT), self.request(LONG, seed=8, steps=self.family.steps[1])]
        return self._served(requests)

    def served_guided(self) -> int:
        """As `served`, of requests with other guidance."""
        return self._served([self.request(SHORT), self.request(MIDDLE, seed=9, guidance=6.0)])

    def _served(self, requests: list[ImageRequest]) -> int:
        engine = StepEngine(load_checkpoint(self.checkpoint), profile_s=0)
        try:
            jobs = engine.submit(requests)
            return self.worst(requests, [job.future.result(300).pixels for job in jobs])
        finally:
            engine.close(drain=False, timeout_s=10)

    def export(self) -> float:
        record = export_onnx(
            self.checkpoint, self.folder / "onnx", size=self.family.size, prompts=self.prompts
        )
        return min(check.value for check in record.parity if check.measure == "psnr_db")

    def other(self) -> int:
        source = open_artifact(self.folder / "onnx", runtime="onnxruntime")
        guided = self.family.guided and self.family.kind != "unconditional"
        size = self.family.other or (None, None)
        requests = [
            self.request(LONG),
            self.request(SHORT, steps=self.family.steps[1], height=size[0], width=size[1]),
            *([self.request(MIDDLE, guidance=1.0), self.request(MIDDLE, guidance=6.0)] * guided),
        ]
        return self.worst(requests, [each(source, request) for request in requests])

    def int8(self) -> float:
        record = export_int8(
            self.folder / "onnx", self.checkpoint, self.folder / "int8", allow=True,
            options=Int8Options(steps=4, rows=16, search_seconds=3, speed_rounds=3),
            prompts=self.prompts,
        )  # fmt: skip
        return min(check.value for check in record.parity if check.measure == "psnr_db")


def each(source: ModelSource, request: ImageRequest) -> Image:
    return source.generate([request])[0]


def difference(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> int:
    """Largest difference of two images, of 255; 255 where their shapes differ."""
    if first.shape != second.shape:
        return 255
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def measure(
    family: Family, folder: Path, *, columns: Sequence[str] = ("sample", "company", "served")
) -> Row:
    """Measure the given columns; a known refusal is its sentence, and another error is raised."""
    bench, row = Bench(family, folder), Row(family.name)
    for column in columns:
        if column in ("other", "int8") and isinstance(row.export, str):
            continue
        clock = time.monotonic()
        found: int | float | str
        work: Callable[[], int | float] = getattr(bench, column)
        try:
            found = work()
        except ModelopsError as error:
            found = error.message
        setattr(row, column, found)
        if column == "export":
            row.seconds = time.monotonic() - clock
    return row
