"""The engine over a graph that reads its inputs where they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelops.export.runtimes.openvino import batch_bucket
from modelops.models.request import ImageRequest
from modelops.serving.engine.flow import FlowModel
from modelops.serving.engine.jobs import Job
from modelops.serving.node.load import open_model

REQUESTS = [
    ImageRequest(prompt="red heart", seed=1, steps=5, guidance=3.0),
    ImageRequest(prompt="flag", seed=2, steps=2, guidance=1.0),
    ImageRequest(prompt="a yellow sun", seed=3, steps=7, guidance=1.5, negative_prompt="blue"),
    ImageRequest(prompt="star", seed=0, steps=3, guidance=1.0),
]


@pytest.fixture(params=["openvino", "onnxruntime"])
def pipeline(request: Any, onnx_artifact: Path) -> Any:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    found, _ = open_model(onnx_artifact, runtime=request.param, batch_size=8)
    return found


def alone(pipeline: Any, request: ImageRequest) -> Any:
    return pipeline(
        request.prompt, num_inference_steps=request.steps, guidance_scale=request.guidance,
        negative_prompt=request.negative_prompt, output_type="np",
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).images[0]  # fmt: skip


@torch.no_grad()
def drive(model: FlowModel, requests: list[ImageRequest], between: Any = None) -> list[Any]:
    """Images of requests that start together, each leaving when it is done."""
    jobs = []
    for request in requests:
        filled = model.fill(request)
        jobs.append(Job(filled, None, rows=model.rows_of(filled), previews=0, on_preview=None))
    tracks: list[Any] = model.begin(jobs)
    running = list(tracks)
    while running:
        model.advance(running)
        for track in running:
            track.job.step += 1
        running = [track for track in running if not track.finished]
        if between:
            between()
    return [model.pixels(track) for track in tracks]


def levels_apart(pictures: list[Any], expected: list[Any]) -> int:
    rounded = [np.rint(np.clip(image, 0, 1) * 255).astype(int) for image in expected]
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(pictures, rounded, strict=True))


def test_pictures_are_the_pipelines_while_rows_come_and_go(pipeline: Any) -> None:
    expected = [alone(pipeline, request) for request in REQUESTS]
    model = FlowModel(pipeline)
    for picks in ([0, 1, 2, 3], [3, 2], [2, 0, 1]):  # memory of earlier batches is used again
        made = drive(model, [REQUESTS[pick] for pick in picks])
        assert levels_apart(made, [expected[pick] for pick in picks]) <= 1
    assert levels_apart(drive(model, [REQUESTS[1]]), [expected[1]]) == 0


@pytest.mark.parametrize("widths", [(1, 2, 3, 4, 6, 8), (5, 7)])  # the latter are filled up
def test_another_call_of_the_graph_between_two_steps_changes_nothing(
    pipeline: Any, widths: tuple[int, ...]
) -> None:
    """It writes other texts into the very memory that the requests' are in."""
    model = FlowModel(pipeline)
    expected = drive(model, REQUESTS)

    def disturb() -> None:
        for rows in widths:
            model.evaluate(rows)
            latents = torch.full((rows, *pipeline.latent_shape(32, 32)), 9.0)
            texts = pipeline.encode_prompt(["something else"] * rows)
            pipeline.predict_velocity(latents, torch.full((rows,), 0.1), *texts)

    made = drive(model, REQUESTS, between=disturb)
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))


def test_two_engines_models_of_one_pipeline_do_not_take_the_others_texts(pipeline: Any) -> None:
    first, second = FlowModel(pipeline), FlowModel(pipeline)
    expected = [drive(first, REQUESTS[:1])[0], drive(second, REQUESTS[2:3])[0]]
    made: list[Any] = []

    def other() -> None:
        made.extend(drive(second, REQUESTS[2:3]))

    mine = drive(first, REQUESTS[:1], between=other)
    assert np.array_equal(mine[0], expected[0])
    assert all(np.array_equal(picture, expected[1]) for picture in made) and made


def test_the_graph_copies_no_text_while_the_batch_stays_the_same(
    onnx_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    pipeline, _ = open_model(onnx_artifact, runtime="openvino", batch_size=8)
    model, graph = FlowModel(pipeline), pipeline.unet.graph
    seen: list[int] = []
    drive(model, REQUESTS[:1] * 3, between=lambda: seen.append(graph.overwritten))
    assert len(seen) == 5 and len(set(seen)) == 1, seen
    widths = {key[0] for key in model._inputs}
    assert widths == {batch_bucket(6)}
