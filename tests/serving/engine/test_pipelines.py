"""Any diffusers pipeline in the engine: its own images, in shared network evaluations."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

import live_node
import tiny_pipelines
from modelops.base.errors import UsageError
from modelops.base.files import sha256_tree
from modelops.cli.main import main
from modelops.export.artifact.open import open_artifact
from modelops.export.to_onnx import export_onnx
from modelops.models.pipelines.arguments import native_size
from modelops.models.pipelines.merge import answers, merged, read_any_call, read_call
from modelops.models.request import ImageRequest
from modelops.models.sources import PipelineSource, load_checkpoint
from modelops.records.evaluation import SourceInfo
from modelops.releases.build import build_release
from modelops.serving.engine.diffusers import PipelineModel
from modelops.serving.engine.engine import StepEngine
from modelops.serving.failures import CancelledError, EngineError
from modelops.serving.node.batch_invariance import release_proofs
from modelops.serving.settings import NodeSettings
from project_records import verdict_on

MIXED = [
    ImageRequest(prompt="red heart", seed=1, steps=5, guidance=3.0),
    ImageRequest(prompt="flag", seed=2, steps=2, guidance=1.0),
    ImageRequest(prompt="a yellow sun with a face", seed=3, steps=4, guidance=1.5),
    ImageRequest(prompt="star", seed=2**53 - 1, steps=3, guidance=7.0),
]


def make_pipeline(family: str) -> Any:
    """With weights that are the same each time, and without dropout."""
    torch.manual_seed(0)
    pipeline = tiny_pipelines.make(family)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


@pytest.fixture
def start() -> Iterator[Callable[..., StepEngine]]:
    engines: list[StepEngine] = []

    def start(pipeline: Any, **options: Any) -> StepEngine:
        engines.append(StepEngine(pipeline, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(drain=False, timeout_s=10)


def offline(pipeline: Any, requests: list[ImageRequest]) -> list[Any]:
    """What the pipeline makes of each request by itself."""
    source = PipelineSource(
        copy.copy(pipeline), SourceInfo(kind="checkpoint", uri="x", runtime="one by one"),
        batch_size=1,
    )  # fmt: skip
    height, width = native_size(pipeline)
    return [source.generate([replace(one, height=height, width=width)])[0] for one in requests]


def together(engine: StepEngine, requests: list[ImageRequest]) -> list[Any]:
    return [job.future.result(120) for job in engine.submit(requests)]


def difference(one: Any, other: Any) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_image_is_the_pipelines_alone_and_in_company(
    family: str, start: Callable[..., StepEngine]
) -> None:
    pipeline = make_pipeline(family)
    expected = offline(pipeline, MIXED)
    engine = start(pipeline, max_rows=8)
    for request, picture in zip(MIXED, expected, strict=True):
        (alone,) = together(engine, [request])
        assert difference(alone.pixels, picture) == 0
        assert len(alone.batch_rows) == request.steps
    company = together(engine, MIXED)
    assert max(difference(a.pixels, b) for a, b in zip(company, expected, strict=True)) <= 1
    own = max(engine.model.rows_of(request) for request in MIXED)
    assert company[0].batch_rows[0] > own  # they did share it
    assert company[0].batch_rows[-1] == own  # and the longest was alone in the end


@pytest.mark.parametrize(
    ("scheduler", "evaluations"),
    [
        ("DPMSolverMultistepScheduler", [5, 2, 4, 3]),
        ("PNDMScheduler", [6, 3, 5, 4]),
        ("HeunDiscreteScheduler", [9, 3, 7, 5]),
        ("EulerAncestralDiscreteScheduler", [5, 2, 4, 3]),
    ],
)
def test_every_sampler_keeps_its_place(
    scheduler: str, evaluations: list[int], start: Callable[..., StepEngine]
) -> None:
    """Samplers of several stages, of memory, and of noise on the way."""
    import diffusers

    pipeline = make_pipeline("sd")
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(
        pipeline.scheduler.config, skip_prk_steps=True
    )
    expected = offline(pipeline, MIXED)
    images = together(start(pipeline, max_rows=8), MIXED)
    assert [len(image.batch_rows) for image in images] == evaluations
    assert max(difference(a.pixels, b) for a, b in zip(images, expected, strict=True)) <= 1


def test_without_text(start: Callable[..., StepEngine]) -> None:
    pipeline = make_pipeline("ddpm")
    requests = [ImageRequest(prompt="", seed=seed, steps=3) for seed in (4, 5)]
    expected = offline(pipeline, requests)
    engine = start(pipeline, max_rows=8)
    images = together(engine, requests)
    assert [difference(a.pixels, b) for a, b in zip(images, expected, strict=True)] == [0, 0]
    assert images[0].batch_rows == (2, 2, 2)
    for wrong in ({"guidance": 2.0}, {"negative_prompt": "blue"}, {"steps": -1}, {"height": 0.5}):
        with pytest.raises(UsageError):
            engine.fill(replace(requests[0], **wrong))


@pytest.mark.slow
def test_an_exported_pipeline_is_served_like_its_checkpoint(
    tmp_path: Path, start: Callable[..., StepEngine]
) -> None:
    make_pipeline("sd").save_pretrained(tmp_path / "sd")
    export_onnx(tmp_path / "sd", tmp_path / "onnx")
    pipeline = open_artifact(tmp_path / "onnx", runtime="onnxruntime", threads=1).pipeline
    expected = offline(pipeline, MIXED)
    engine = start(pipeline, max_rows=8)
    images = together(engine, MIXED)
    assert max(difference(a.pixels, b) for a, b in zip(images, expected, strict=True)) <= 1
    assert max(images[0].batch_rows) > 2
    with pytest.raises(UsageError, match="another engine"):
        PipelineModel(pipeline)
    engine.close()
    profiled = start(pipeline, max_rows=8, profile_s=0.1)
    (alone,) = together(profiled, MIXED[:1])
    assert difference(alone.pixels, expected[0]) == 0
    assert set(profiled.profile.seconds) >= {1, 2}


def test_texts_are_encoded_once(start: Callable[..., StepEngine]) -> None:
    pipeline = make_pipeline("sdxl")
    requests = [
        ImageRequest(prompt=prompt, seed=seed, steps=2, guidance=2.0)
        for prompt, seed in (("a", 1), ("a", 2), ("b", 3))
    ]
    expected = offline(pipeline, requests)
    encoded: list[Any] = []
    plain = pipeline.text_encoder_2.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        encoded.append(args)
        return plain(*args, **kwargs)

    pipeline.text_encoder_2.forward = forward
    engine = start(pipeline, max_rows=8)
    encoded.clear()  # the engine has watched the pipeline
    images = together(engine, requests)
    assert max(difference(a.pixels, b) for a, b in zip(images, expected, strict=True)) <= 1
    assert len(encoded) == 2  # "a" and "b": for no negative prompt SDXL takes zeros


def test_who_leaves_takes_no_more_steps_and_disturbs_nobody(
    start: Callable[..., StepEngine],
) -> None:
    pipeline = make_pipeline("sd")
    stays, leaves = (ImageRequest(prompt="a", seed=seed, steps=6, guidance=2.0) for seed in (1, 2))
    (expected,) = offline(pipeline, [stays])
    gate, evaluations = threading.Semaphore(0), []
    wasted: list[tuple[int, str]] = []
    engine = start(pipeline, max_rows=8, on_wasted=lambda *what: wasted.append(what))
    plain = engine.model._evaluate

    def evaluate(**kwargs: Any) -> Any:
        gate.acquire()
        evaluations.append(len(kwargs["sample"]))
        return plain(**kwargs)

    engine.model._evaluate = evaluate
    jobs = engine.submit([stays, leaves])
    gate.release()
    for _ in range(2000):
        if jobs[1].step:
            break
        threading.Event().wait(0.01)
    jobs[1].cancel()
    for _ in range(6):
        gate.release()
    assert difference(jobs[0].future.result(60).pixels, expected) <= 1
    with pytest.raises(CancelledError):
        jobs[1].future.result(60)
    # The second evaluation may have begun before it left.
    assert evaluations in ([4, 2, 2, 2, 2, 2], [4, 4, 2, 2, 2, 2])
    assert wasted == [(evaluations.count(4), "cancelled")]


def test_a_broken_network_fails_its_batch_and_a_broken_sampler_its_request(
    start: Callable[..., StepEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_pipeline("sd")
    good, bad = ImageRequest(prompt="a", seed=1, steps=3), ImageRequest(prompt="a", seed=2, steps=4)
    (expected,) = offline(pipeline, [good])
    step = type(pipeline.scheduler).step

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.num_inference_steps == bad.steps:
            raise FloatingPointError
        return step(self, *args, **kwargs)

    engine = start(pipeline, max_rows=8)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.scheduler), "step", fails)
        jobs = engine.submit([good, bad])
        assert difference(jobs[0].future.result(60).pixels, expected) <= 1
        with pytest.raises(EngineError, match="FloatingPointError"):
            jobs[1].future.result(60)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    evaluate = engine.model._evaluate
    engine.model._evaluate = broken
    for job in engine.submit([good, bad]):
        with pytest.raises(EngineError, match="the network failed: MemoryError"):
            job.future.result(60)
    engine.model._evaluate = evaluate
    assert difference(together(engine, [good])[0].pixels, expected) == 0
    assert engine.alive


def test_closing_leaves_the_pipeline_as_it_was() -> None:
    pipeline = make_pipeline("sd")
    assert torch.is_grad_enabled()
    methods = (pipeline.unet.forward, pipeline.vae.decode)
    engine = StepEngine(pipeline)
    request = ImageRequest(prompt="a", seed=1, steps=500)
    job = engine.submit([request])[0]
    engine.close(drain=False)
    with pytest.raises((CancelledError, EngineError)):
        job.future.result(60)
    assert (pipeline.unet.forward, pipeline.vae.decode) == methods
    assert "forward" not in vars(pipeline.unet)
    assert "decode" not in vars(pipeline.vae)
    assert torch.is_grad_enabled()


def test_made_in_batches_as_wide_as_then() -> None:
    pipeline = make_pipeline("sd")
    widths: list[int] = []
    engine = StepEngine(pipeline)
    plain = engine.model._evaluate

    def evaluate(**kwargs: Any) -> Any:
        widths.append(len(kwargs["sample"]))
        return plain(**kwargs)

    engine.model._evaluate = evaluate
    request = ImageRequest(prompt="a", seed=1, steps=3, guidance=2.0)
    (alone,) = together(engine, [request])
    with engine.model.widened([6, 4, 2]):
        (wide,) = together(engine, [request])
    engine.close()
    assert difference(alone.pixels, wide.pixels) <= 1
    assert widths == [2, 2, 2, 6, 4, 2]


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    pipeline = make_pipeline("sd")
    pipeline.unet = None
    with pytest.raises(UsageError, match="no denoiser"):
        PipelineModel(pipeline)


PARAMETERS = ["sample", "timestep", "states", "ids", "return_dict"]


def call(rows: int, value: float, timestep: Any, ids: Any = None) -> Any:
    states = {"inner": [torch.full((rows, 3), value)], "scale": 0.5}
    ids = torch.arange(5.0) if ids is None else ids
    sample = torch.full((rows, 2, 2, 2), value)
    return read_call(PARAMETERS, (sample, timestep), {"states": states, "ids": ids})


def test_calls_are_put_together_and_answers_taken_apart() -> None:
    one, other = call(2, 1.0, torch.tensor(9)), call(1, 2.0, torch.tensor([7]))
    assert one.key == other.key
    arguments = merged([one, other], 4)
    assert arguments["timestep"].tolist() == [9, 9, 7, 9]
    assert arguments["sample"][:, 0, 0, 0].tolist() == [1.0, 1.0, 2.0, 1.0]
    assert arguments["states"]["inner"][0][:, 0].tolist() == [1.0, 1.0, 2.0, 1.0]
    assert arguments["states"]["scale"] == 0.5
    assert arguments["ids"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert arguments["return_dict"] is False
    first, second = answers([one, other], (arguments["sample"] * 10,), 4)
    assert first.sample[:, 0, 0, 0].tolist() == [10.0, 10.0]  # an object, for it asked for none
    assert second[0][:, 0, 0, 0].tolist() == [20.0]


def test_a_list_of_images_and_what_is_no_tensor_stay_apart() -> None:
    def listed(value: float) -> Any:
        images = [torch.full((3, 1, 2, 2), value), torch.full((3, 1, 4, 2), value)]
        return read_call(PARAMETERS, (images, torch.tensor([1.0, 1.0])), {})

    one, other = listed(1.0), listed(1.0)
    assert one.rows == 2
    assert one.key != other.key
    (sample,) = merged([one], 8)["sample"][1:]
    assert sample.shape == (3, 1, 4, 2)
    (answer,) = answers([one], ([image * 2 for image in merged([one])["sample"]],), 2)
    assert [image.shape for image in answer.sample] == [(3, 1, 2, 2), (3, 1, 4, 2)]
    cache = object()
    whole = read_any_call(PARAMETERS, (torch.zeros(3, 2, 2, 2),), {"states": cache}, {}, {})
    assert whole.rows == 3
    assert whole.raw is not None
    assert whole.raw[1]["states"] is cache


def test_layers_are_no_rows_where_there_are_as_many() -> None:
    layers = torch.zeros(2, 3, 4)
    rowed = {"sample": True, "states": False}
    found = read_call(PARAMETERS, (torch.zeros(2, 2, 2, 2), 3), {"states": layers}, rowed=rowed)
    assert set(found.shared) == {"states"}


@pytest.mark.parametrize(
    "other",
    [
        call(2, 1.0, 3, torch.arange(5.0) + 1),  # other positions
        call(2, 1.0, 3, torch.arange(6.0)),
        call(2, 1.0, 3.5),  # another dtype of the timestep
        read_call(PARAMETERS, (torch.zeros(2, 2, 4, 2), 3), {}),
        read_call(PARAMETERS, (torch.zeros(2, 2, 2, 2, dtype=torch.float64), 3), {}),
    ],
)
def test_calls_that_differ_are_not_put_together(other: Any) -> None:
    assert other.key != call(2, 1.0, 3).key


def test_a_release_of_another_pipeline_is_served_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "sd"
    make_pipeline("sd").save_pretrained(checkpoint)
    proofs, files = release_proofs(checkpoint, tmp_path, steps=4)
    assert proofs["company"]["widest_rows"] > 2
    verdict_on(sha256_tree(checkpoint)).write(tmp_path / "verdict.json")
    build_release(
        tmp_path / "release", model_dir=checkpoint, verdict=tmp_path / "verdict.json",
        name="any", version="1", defaults={**proofs, "steps": 4}, extra_files=files,
        notice="Made for a test.",
    )  # fmt: skip
    request = ImageRequest(
        prompt="a yellow sun", seed=9, steps=3, guidance=2.0, negative_prompt="blue"
    )
    (expected,) = offline(load_checkpoint(checkpoint), [request])
    asked = {"seed": 9, "steps": 3, "guidance": 2.0, "negative_prompt": "blue"}
    settings = NodeSettings(max_rows=8, profile_s=0)
    with live_node.served(tmp_path / "release", settings) as live, live.client() as client:
        answer = client.images.generate(prompt="a yellow sun", n=2, extra_body=asked)
        events = list(
            client.images.generate(
                prompt="a yellow sun", stream=True, partial_images=2, extra_body=asked
            )
        )
        with pytest.raises(openai.BadRequestError, match="tokens"):
            client.images.generate(prompt="sun " * 40)
        with pytest.raises(openai.BadRequestError, match="32x32"):
            client.images.generate(prompt="sun", size="1024x1024")
    assert answer.size == "32x32"
    data = base64.b64decode(answer.data[0].b64_json)
    assert difference(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), expected) <= 1
    # Nobody knows what this pipeline's latents look like, so only the finished image comes.
    assert [event.type for event in events] == ["image_generation.completed"]
    receipt = answer.data[0].model_extra["x_modelops"]
    assert receipt["batch_rows"] == [4, 4, 4]
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    release = str(tmp_path / "release")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["replay", str(tmp_path / "receipt.json"), "--release", release]) == 0
    assert printed.getvalue() == "equal: the same pixels\n"
